"""The seam for objectives, in one process: each toy does what it says, and stages are computed once. That they are the
same on several processes and under ZeRO is shown with the exactness of the step."""

import pytest
import torch
from small_model import build, build_batch
from torch import Tensor
from toy_objectives import OBJECTIVES, Taught, masked, twice

from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.supervised import supervised


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_gives_one_loss_per_example_and_gradients_to_all(name):
    model, batch = build(), build_batch()
    losses = model(batch, OBJECTIVES[name], 2)
    assert {task: loss.shape for task, loss in losses.items()} == {"sst": (3,), "quora": (2,)}
    sum(loss.sum() for loss in losses.values()).backward()
    unused = ("bert.pooler",)  # the mean of the states is the sentence embedding
    for parameter, value in model.named_parameters():
        assert parameter.startswith(unused) or (value.grad is not None and value.grad.isfinite().all()), parameter


def test_stages_are_those_of_the_plain_model_and_computed_once(monkeypatch):
    model, batch = build(), build_batch()
    forward = Forward(model, batch)
    calls = []
    monkeypatch.setattr(type(model.bert), "encode", _counted(type(model.bert).encode, calls))
    supervised(forward)
    assert torch.equal(forward.outputs["sst"], model(batch)["sst"])
    assert len(calls) == 2  # once each
    assert forward.hidden.shape == (35, 16)
    assert torch.equal(forward.again(embeddings=forward.embeddings).outputs["quora"], forward.outputs["quora"])


def _counted(function, calls: list):
    def call(*arguments) -> Tensor:
        calls.append(1)
        return function(*arguments)

    return call


def test_targets_made_from_the_step_change_with_it():
    model, batch = build(), build_batch()
    first, again, second = (model(batch, masked, step)["sst"] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_two_passes_have_dropout_of_their_own():
    plain, two = build(), build(dropout=0.3)
    assert torch.equal(plain(build_batch(), twice)["sst"], plain(build_batch(), supervised)["sst"])
    torch.manual_seed(3)
    with_penalty = two(build_batch(), twice)["sst"]
    torch.manual_seed(3)
    assert (with_penalty > two(build_batch(), supervised)["sst"]).all()


def test_a_teacher_that_agrees_costs_nothing():
    model = build()
    taught = Taught(model)
    assert sum(loss.sum() for loss in model(build_batch(), taught).values()) == 0
    with torch.no_grad():
        model.heads["sst"].layers[-1].bias += 1.0
    assert torch.allclose(model(build_batch(), taught)["sst"], torch.ones(3))
    assert not any(parameter.requires_grad for parameter in taught.teacher.parameters())
