"""Losses of classes in an order, smoothed labels, and those that compare the examples of a batch: against libraries,
against loops that are written out, and the options that choose them.

That a coupled loss is the same at every number of processes is shown with the exactness of the step.
"""

from dataclasses import replace
from math import exp, log

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from known_tasks import COSENT, QUORA, SST, STS, TASKS
from scipy.stats import wasserstein_distance
from sklearn.metrics import cohen_kappa_score, mean_absolute_error
from small_model import SHAPE, build, build_batch

from minbert.data.errors import UserError
from minbert.trainer.config import parse_config
from minbert.trainer.evaluation.scoring import beside
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.multitask import Forward, MultitaskModel
from minbert.trainer.objectives.coupled import cosent, coupled_losses, pearson
from minbert.trainer.objectives.supervised import Supervised, example_losses, predictions, squared_emd, supervised
from minbert.trainer.options import EncoderConfig, HeadsConfig
from minbert.tuning.extensions import combine, extension

floats = st.floats(-3, 3, width=32)


@given(st.lists(floats, min_size=5, max_size=5), st.integers(0, 4))
def test_the_ordinal_loss_sums_squared_differences_of_cumulative_distributions(logits, label):
    found = squared_emd(torch.tensor([logits], dtype=torch.float64), torch.tensor([float(label)])).item()
    p = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
    expected = sum((p[: k + 1].sum() - (k >= label)) ** 2 for k in range(5))
    assert found == pytest.approx(expected, abs=1e-12)
    # With the first power it would be the earth mover's distance.
    distance = sum(abs(p[: k + 1].sum() - (k >= label)) for k in range(5))
    assert distance == pytest.approx(wasserstein_distance(range(5), [label], p, [1.0]), abs=1e-9)


def test_a_class_beside_the_label_costs_less_than_one_far_away():
    certain = torch.eye(5) * 50
    losses = squared_emd(certain, torch.zeros(5))
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert len(set(F.cross_entropy(certain, torch.zeros(5).long(), reduction="none").tolist())) == 2


def test_smoothed_labels_are_those_of_pytorch():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.arange(6.0) % 5
    expected = F.cross_entropy(logits, labels.long(), reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(example_losses(SST, logits, labels, 0.2), expected)
    logit, yes = torch.randn(6, 1), torch.arange(6.0) % 2
    two = torch.cat([torch.zeros_like(logit), logit], 1)
    expected = F.cross_entropy(two, yes.long(), reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(example_losses(QUORA, logit, yes, 0.2), expected)
    model, batch = build(), build_batch()
    found, plain = model(batch, Supervised({"sst": 0.1})), model(batch, supervised)
    assert not torch.equal(found["sst"], plain["sst"]) and torch.equal(found["quora"], plain["quora"])


@given(st.lists(st.tuples(floats, st.integers(0, 3)), min_size=1, max_size=8))
def test_cosent_is_the_sum_over_pairs(rows):
    scores, labels = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    pairs = [(s, t) for s, y in rows for t, z in rows if y > z]
    expected = log(1 + sum(exp(20 * (t - s)) for s, t in pairs))
    assert cosent(scores, labels).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=12))
def test_the_correlation_is_that_of_numpy_and_its_gradient_is_finite(rows):
    scores, labels = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    scores.requires_grad_()
    loss = pearson(scores, labels)
    loss.backward()
    assert scores.grad.isfinite().all()
    if scores.std() > 1e-3 and labels.std() > 1e-3:
        expected = 1 - np.corrcoef(scores.detach().numpy(), labels.numpy())[0, 1]
        assert loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", [cosent, pearson])
def test_gradients_are_those_of_finite_differences(loss):
    torch.manual_seed(0)
    scores, labels = torch.randn(7, dtype=torch.float64, requires_grad=True) / 5, torch.arange(7.0).double() % 4
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (scores,))


def test_slices_of_a_batch_have_the_loss_and_the_gradient_of_all(monkeypatch):
    """Two processes, one after the other: what the other one adds is what the sum over processes would."""
    torch.manual_seed(0)
    part = replace(build_batch().tasks["quora"], labels=torch.tensor([0.0, 3.0, 1.0, 5.0, 2.0]), global_size=5)
    part = replace(part, weights=torch.ones(5), places=torch.tensor([3, 0, 1, 4, 2]))
    scores = torch.randn(5, requires_grad=True)
    whole = torch.dot(coupled_losses("cosent", scores, part), part.weights) / 5
    (expected,) = torch.autograd.grad(whole, scores)
    total, gradient = 0.0, torch.zeros(5)
    for own, others in (([0, 1], [2, 3, 4]), ([2, 3, 4], [0, 1])):
        table = torch.zeros(2, 5, dtype=torch.float64)
        table[:, part.places[others]] = torch.stack([scores.detach(), part.labels]).double()[:, others]
        monkeypatch.setattr("minbert.trainer.objectives.coupled.world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, table=table: tensor.add_(table))
        slice_ = replace(part, labels=part.labels[own], weights=part.weights[own], places=part.places[own])
        loss = torch.dot(coupled_losses("cosent", scores[own], slice_), slice_.weights) / 5
        gradient += torch.autograd.grad(loss, scores)[0]
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)


def test_a_cosine_head_compares_the_embeddings_and_predicts_within_the_range():
    torch.manual_seed(0)
    task = COSENT.model_copy(update={"name": "quora"})  # the batch's pairs
    model = MultitaskModel([SST, task], BertConfig(**SHAPE), EncoderConfig(), HeadsConfig()).eval()
    forward = Forward(model, build_batch())
    u, v = forward.pooled["quora"]
    expected = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))
    torch.testing.assert_close(forward.outputs["quora"][:, 0], expected)
    assert not list(model.heads["quora"].parameters()) and len(supervised(forward)["quora"]) == 2
    assert predictions(task, torch.tensor([[-0.2], [0.5], [1.0]])).tolist() == [0.0, 2.5, 5.0]


def test_numbers_beside_the_accuracy_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 5, 300), random.integers(0, 5, 300)
    guess[:150] = truth[:150]
    found = beside(SST, torch.from_numpy(guess).float(), truth.astype(np.float32))
    assert found["mean_absolute_error"] == pytest.approx(mean_absolute_error(truth, guess), abs=1e-12)
    assert found["quadratic_kappa"] == pytest.approx(cohen_kappa_score(truth, guess, weights="quadratic"), abs=1e-12)
    assert beside(SST, torch.ones(3), np.ones(3, np.float32)) == {"mean_absolute_error": 0, "quadratic_kappa": 0}
    assert beside(STS, torch.ones(3), np.ones(3, np.float32)) == {}


def test_losses_are_chosen_by_option_and_stay_with_the_run():
    config = parse_config({"losses": ["sts=cosent", "sst=squared_emd"], "label_smoothing": 0.1}, "here")
    assert [task.loss for task in config.corpus.tasks] == ["squared_emd", "binary_cross_entropy", "cosent"]
    assert config.by_task("label_smoothing") == {"sst": 0.0, "quora": 0.1, "sts": 0.0}  # only of cross entropy
    assert parse_config(config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ["stss=cosent"]}, "losses names stss, which is no task of the run; there are sst, quora, sts"),
        ({"losses": ["sts=cosnet"]}, "task sts: loss: input should be"),
        ({"losses": ["quora=pearson"]}, "a binary task takes binary_cross_entropy, not pearson"),
        ({"losses": ["sts"]}, "losses"),
        ({"losses": ["sts=pearson"], "accumulation": 2}, "would compare those of a part: use more processes"),
        ({"losses": ["sts=cosent"], "pair_encoding": "joint"}, "which pair_encoding=joint does not do"),
        ({"losses": ["sts=cosent"], "freeze": "encoder"}, "has no head to train"),
        ({"label_smoothing": [0, 0, 0.1]}, "label_smoothing of sts must be 0: it has no cross entropy over labels"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        parse_config(options, "here")


def test_extensions_find_the_tasks_that_a_loss_is_for():
    tasks = [TASKS[name] for name in ("sst", "quora", "sts", "cfimdb")]
    assert extension("ordinal", tasks) == ("ordinal", {"losses": ["sst=squared_emd"]})
    cosine = extension("cosent", tasks)[1]
    assert cosine == extension("cosent=sts", tasks)[1] == {"losses": ["sts=cosent"], "freeze": "none"}
    known = {"ordinal": extension("ordinal", tasks)[1], "cosent": cosine, "pearson": {"losses": ["sts=pearson"]}}
    assert combine(["ordinal", "cosent"], known)["losses"] == ["sst=squared_emd", "sts=cosent"]
    with pytest.raises(UserError, match="would set losses twice"):
        combine(["cosent", "pearson"], known)
    with pytest.raises(UserError, match="the loss pearson is for regression tasks: sts"):
        extension("pearson-loss=quora", tasks)
