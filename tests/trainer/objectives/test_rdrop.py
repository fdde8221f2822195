"""R-Drop against the formula of its authors' code, on two passes whose dropout is known."""

import pytest
import torch
import torch.nn.functional as F
from known_tasks import STS
from small_model import build, build_batch

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.choice import build_objective
from minbert.trainer.objectives.divergence import divergence
from minbert.trainer.objectives.rdrop import RDrop
from minbert.trainer.objectives.supervised import supervised


def reference(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """The mean of two cross entropies and half the sum of two Kullback-Leibler divergences, of logits (B, K)."""
    entropy = (F.cross_entropy(p, labels, reduction="none") + F.cross_entropy(q, labels, reduction="none")) / 2
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    one = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    other = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return entropy + weight * (one + other) / 2


def two_passes(weights: dict[str, float], tasks: tuple[str, ...]):
    """What the objective says, and the outputs of the two passes that it made."""
    model, batch = build(dropout=0.3), build_batch()
    torch.manual_seed(1)
    found = model(batch, RDrop(supervised, weights))
    torch.manual_seed(1)
    forward = Forward(model, batch)
    one = dict(forward.outputs)
    return batch, found, one, forward.only(tasks).again().outputs


def test_losses_are_those_of_the_authors_formula():
    batch, found, one, other = two_passes({"sst": 1.0, "quora": 0.5}, ("sst", "quora"))
    labels = {name: part.labels.long() for name, part in batch.tasks.items()}
    expected = reference(one["sst"], other["sst"], labels["sst"], 1.0)
    torch.testing.assert_close(found["sst"], expected)

    def two_classes(logit: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(logit), logit], 1)

    expected = reference(two_classes(one["quora"]), two_classes(other["quora"]), labels["quora"], 0.5)
    torch.testing.assert_close(found["quora"], expected)
    assert (one["sst"] - other["sst"]).abs().max() > 0.1


def test_a_task_without_a_weight_has_one_pass():
    batch, found, one, other = two_passes({"sst": 2.0, "quora": 0.0}, ("sst",))
    torch.testing.assert_close(
        found["quora"],
        F.binary_cross_entropy_with_logits(one["quora"][:, 0], batch.tasks["quora"].labels, reduction="none"),
    )
    torch.testing.assert_close(found["sst"], reference(one["sst"], other["sst"], batch.tasks["sst"].labels.long(), 2.0))


def test_without_dropout_it_is_the_plain_loss_with_the_plain_gradient():
    gradients = []
    for objective in (supervised, RDrop(supervised, {"sst": 1.0, "quora": 1.0})):
        model = build()
        sum(loss.sum() for loss in model(build_batch(), objective).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_the_divergence_of_regressions_is_the_squared_error_of_similarities():
    one, other = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [3.0]])
    expected = (5 * (one.sigmoid() - other.sigmoid())[:, 0]) ** 2
    torch.testing.assert_close(divergence(STS, one, other), expected)


def test_options_choose_it():
    assert build_objective(RunConfig(), 10) is supervised
    assert build_objective(parse_config({"rdrop_weight": 0}, "here"), 10) is supervised
    chosen = build_objective(parse_config({"rdrop_weight": [1, 2, 0], "smart_weight": 1}, "here"), 10)
    assert chosen.base == RDrop(supervised, {"sst": 1.0, "quora": 2.0, "sts": 0.0}) and len(chosen.terms) == 1
    with pytest.raises(UserError, match="rdrop_weight needs one number, or one for each of sst, quora, sts"):
        parse_config({"rdrop_weight": [1, 2]}, "here")
    with pytest.raises(UserError, match="without it they are the same"):
        parse_config({"rdrop_weight": 1, "encoder_dropout": 0, "head_dropout": 0}, "here")
