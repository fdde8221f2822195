"""SMART in one process: what the two halves add, and how the perturbation is found. That both are the same at every
number of processes and ZeRO stage is shown with the exactness of the step."""

import os
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from known_tasks import QUORA, SST, STS, TASKS
from safetensors.torch import load_file
from small_model import build, build_batch
from small_runs import CORPUS
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.trainer import train as training
from minbert.trainer.checkpoint.format import published, read_manifest
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.engine.copies import TEACHER, copies_of
from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.choice import Sum, build_objective
from minbert.trainer.objectives.divergence import divergence
from minbert.trainer.objectives.noise import normal, token_noise
from minbert.trainer.objectives.proximal import Proximal
from minbert.trainer.objectives.smoothness import Smoothness
from minbert.trainer.objectives.supervised import supervised

WEIGHTS = {"sst": 1.0, "quora": 0.5}
SMOOTH = Smoothness(WEIGHTS, seed=0)
MULTILABEL = SST.model_copy(update={"kind": "multilabel"})


def total(forward: Forward, clean: dict[str, Tensor], perturbation: Tensor) -> Tensor:
    """The divergence of all examples when their embeddings are moved."""
    moved = forward.again(embeddings=forward.embeddings.detach() + perturbation).outputs
    tasks = forward.model.tasks
    return torch.cat([divergence(tasks[name], clean[name].detach(), outputs) for name, outputs in moved.items()]).sum()


# Divergences

numbers = st.floats(-60, 60, width=32)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(numbers, numbers), min_size=5, max_size=5), st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
def test_divergences_are_symmetric_to_the_bit_and_never_negative(pairs, near):
    one = torch.tensor([a for a, _ in pairs])[None]
    other = one + near * torch.tensor([b for _, b in pairs])[None]
    for task, width in ((SST, 5), (MULTILABEL, 5), (QUORA, 1), (STS, 1)):
        a, b = one[:, :width], other[:, :width]
        found = divergence(task, a, b)
        assert found.shape == (1,) and found.isfinite().all() and (found >= 0).all()
        assert torch.equal(found, divergence(task, b, a)) and torch.equal(divergence(task, a, a), torch.zeros(1))


def test_divergences_are_those_of_the_distributions():
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 5, dtype=torch.float64) * 3

    def both_ways(kind, *outputs: Tensor) -> Tensor:
        p, q = (kind(logits=output) for output in outputs)
        return kl_divergence(p, q) + kl_divergence(q, p)

    torch.testing.assert_close(divergence(SST, a, b), both_ways(Categorical, a, b))
    torch.testing.assert_close(divergence(MULTILABEL, a, b), both_ways(Bernoulli, a, b).mean(1))
    torch.testing.assert_close(divergence(QUORA, a[:, :1], b[:, :1]), both_ways(Bernoulli, a[:, 0], b[:, 0]))
    torch.testing.assert_close(divergence(STS, a[:, :1], b[:, :1]), (5 * (a.sigmoid() - b.sigmoid())[:, 0]).square())


def test_a_divergence_of_close_outputs_is_exact_in_single_precision():
    """Where p - q would have lost all its digits."""
    torch.manual_seed(0)
    a = torch.randn(50, 5)
    b = a + 1e-4 * torch.randn(50, 5)
    for task, width in ((SST, 5), (QUORA, 1)):
        exact = divergence(task, a[:, :width].double(), b[:, :width].double())
        torch.testing.assert_close(divergence(task, a[:, :width], b[:, :width]).double(), exact, rtol=2e-2, atol=1e-11)


# Noise


def test_noise_is_normal_and_all_its_keys_count():
    keys = torch.randint(-(2**62), 2**62, (400,), generator=torch.Generator().manual_seed(0))
    found = normal(keys, 256).double()
    assert abs(float(found.mean())) < 0.01 and abs(float(found.var()) - 1) < 0.01
    assert abs(float(found.pow(4).mean()) - 3) < 0.1 and float(found.abs().max()) > 4
    correlations = torch.corrcoef(found) - torch.eye(len(keys))
    assert float(correlations.abs().max()) < 0.4  # six standard deviations
    assert torch.equal(normal(keys, 256), normal(keys, 300)[:, :256])
    batch = build_batch()
    first = token_noise(batch, 16, 0, 0)
    assert len(first.unique(dim=0)) == batch.tokens  # tokens, sequences, sides and examples have numbers of their own
    assert not (first == token_noise(batch, 16, 1, 0)).any() and not (first == token_noise(batch, 16, 0, 1)).any()


@pytest.mark.parametrize("names", [["sst"], ["quora"]])
def test_a_task_has_its_noise_and_outputs_whoever_is_beside_it(names):
    model, batch = build(), build_batch()
    own, layout = batch.only(names), batch.sentences.layout
    rows = torch.cat(
        [rows for name, rows in zip(batch.tasks, torch.arange(batch.tokens).split(layout.tokens)) if name in names]
    )
    assert torch.equal(token_noise(own, 16, 0, 3), token_noise(batch, 16, 0, 3)[rows])
    assert torch.equal(own.sentences.input_ids, batch.sentences.input_ids[rows])
    whole, alone = Forward(model, batch), Forward(model, own)
    for found in (alone, whole.only(names)):
        assert found.outputs.keys() == set(names)
        for name in names:
            torch.testing.assert_close(found.outputs[name], whole.outputs[name])
    assert whole.only(["sst", "quora"]) is whole


def test_an_example_has_its_noise_wherever_it_is():
    """Of a batch whose examples are shared out, each keeps what it had: it counts by its place in the global batch."""
    batch = build_batch()
    task = batch.tasks["quora"]
    swapped = replace(batch, tasks=batch.tasks | {"quora": replace(task, places=task.places.flip(0))})
    first, second = token_noise(batch, 4, 0, 0), token_noise(swapped, 4, 0, 0)
    layout = batch.sentences.layout

    def of(noise: Tensor, sequence: int) -> Tensor:
        return noise[layout.sequence == sequence]

    for side in range(2):
        one, other = task.first + 2 * side, task.first + 2 * side + 1
        length = min(len(of(first, one)), len(of(first, other)))
        assert torch.equal(of(first, one)[:length], of(second, other)[:length])


# The perturbation


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (options, dtype)
        for options in ({}, {"steps": 3}, {"norm": "2"}, {"radius": 1e-3}, {"variance": 1e-10})
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if not (dtype == torch.bfloat16 and "variance" in options)  # noise far below what it can tell apart
    ],
)
def test_what_is_found_raises_the_loss_more_than_random_perturbations_of_its_size(options, dtype):
    """With bf16 arithmetic, too, which cannot tell an embedding from one a thousandth away: what is found in it is
    looked at in full precision."""
    model, batch = build(), build_batch()
    low = dtype == torch.bfloat16
    model = model.to(torch.float32 if low else dtype)
    torch.manual_seed(0)
    found, random = [], []
    for step in range(10):
        model.low_precision = low
        forward = Forward(model, batch, step)
        perturbation = replace(SMOOTH, **options).perturbation(forward, forward.outputs)
        model.low_precision = False
        forward = Forward(model, batch, step)
        found.append(total(forward, forward.outputs, perturbation).item())
        for _ in range(5):
            other = torch.randn_like(perturbation)
            other *= perturbation.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
            random.append(total(forward, forward.outputs, other).item())
    assert np.mean(found) > 1.3 * np.mean(random)
    if options.get("variance") and dtype == torch.float64:
        assert min(found) > max(random)  # from little noise the step finds much


def test_the_ascent_follows_the_gradient_by_finite_differences():
    model, batch = build().double(), build_batch()
    forward = Forward(model, batch, 2)
    smooth = replace(SMOOTH, norm="none", step_size=1.0)
    noise = token_noise(batch, 16, 0, 2).double() * smooth.variance**0.5
    gradient = smooth.perturbation(forward, forward.outputs) - noise
    for seed in range(5):
        torch.manual_seed(seed)
        direction = torch.randn_like(noise)
        up, down = (total(forward, forward.outputs, noise + h * direction).detach() for h in (1e-6, -1e-6))
        assert float(up - down) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_the_weights_gradient_is_that_of_the_penalty_by_finite_differences(monkeypatch):
    """The perturbation is a constant: nothing is differentiated through the search for it."""
    model, batch = build().double(), build_batch()
    tasks = {name: replace(part, labels=part.labels.double()) for name, part in batch.tasks.items()}
    batch, smooth = replace(batch, tasks=tasks), replace(SMOOTH, variance=0.01, step_size=0.1)
    objective = Sum(supervised, (smooth, Proximal(0.7)))
    with torch.no_grad():
        targets = {TEACHER: {name: outputs + 0.3 for name, outputs in model(batch).items()}}

    def loss() -> Tensor:
        return torch.cat(list(model(batch, objective, 1, targets).values())).sum()

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss(), parameters)
    forward = Forward(model, batch, 1)
    fixed = smooth.perturbation(forward, forward.outputs)
    monkeypatch.setattr(Smoothness, "perturbation", lambda *_: fixed)
    for seed in range(5):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]
        values = []
        with torch.no_grad():
            for h in (1e-6, -2e-6):
                for parameter, part in zip(parameters, direction):
                    parameter += h * part
                values.append(float(loss()))
            for parameter, part in zip(parameters, direction):
                parameter += 1e-6 * part
        expected = sum(float((one * other).sum()) for one, other in zip(gradient, direction))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5)


def test_the_search_leaves_no_gradient_behind_and_weights_trainable():
    model, batch = build(), build_batch()
    model.bert.parts["layer 0"].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    forward = Forward(model, batch)
    assert not SMOOTH.perturbation(forward, forward.outputs).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with torch.no_grad():  # where a method only asks for losses
        quiet = model(batch, Sum(supervised, (SMOOTH,)))
    for name, losses in model(batch, Sum(supervised, (SMOOTH,))).items():
        torch.testing.assert_close(losses.detach(), quiet[name])


@pytest.mark.parametrize("norm", ["infinity", "2", "none"])
def test_steps_and_radius_are_lengths_for_each_token(norm):
    model, batch = build().double(), build_batch()
    forward = Forward(model, batch)
    order = 2.0 if norm == "2" else float("inf")
    noise = token_noise(batch, 16, 0, 0).double() * 1e-5
    free = replace(SMOOTH, variance=1e-10, norm=norm).perturbation(forward, forward.outputs)
    lengths = torch.linalg.vector_norm(free - noise, order, dim=1)
    if norm != "none":
        torch.testing.assert_close(lengths, torch.full_like(lengths, 1e-3))
    near = replace(SMOOTH, norm=norm, radius=2e-3, steps=2).perturbation(forward, forward.outputs)
    lengths = torch.linalg.vector_norm(near, order, dim=1)
    assert lengths.max() <= 2e-3 * (1 + 1e-9) and lengths.max() > 1.9e-3


def test_a_penalty_is_part_of_its_own_task_alone():
    model, batch = build(), build_batch()
    plain = model(batch, supervised)
    found = model(batch, Sum(supervised, (Smoothness({"sst": 2.0, "quora": 0.0}, seed=0, variance=0.01),)))
    assert (found["sst"] > plain["sst"]).all() and torch.equal(found["quora"], plain["quora"])
    once = model(batch, Sum(supervised, (Smoothness({"sst": 1.0}, seed=0, variance=0.01),)))
    torch.testing.assert_close(found["sst"] - plain["sst"], 2 * (once["sst"] - plain["sst"]))


def test_over_a_frozen_encoder_the_heads_become_smooth():
    """The embeddings are moved though they are not trained, and training makes the heads' outputs move less."""
    model, batch = build(), build_batch()
    model.bert.requires_grad_(False)
    smooth = Smoothness({"sst": 1.0, "quora": 1.0}, seed=0, variance=0.01, step_size=0.1)

    def penalty() -> Tensor:
        return torch.cat(list(smooth(Forward(model, batch)).values())).sum()

    first = penalty()
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.bert.parameters())
    assert 0 < penalty() < 0.7 * first


# The teacher, and the choice


def test_a_teacher_that_agrees_adds_nothing_and_one_that_does_not_its_divergence():
    model, batch = build(), build_batch()
    plain, outputs = model(batch, supervised), model(batch)
    objective = Sum(supervised, (Proximal(3.0),))
    same = model(batch, objective, 0, {TEACHER: {name: found.detach() for name, found in outputs.items()}})
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    other = {name: found.detach() + torch.arange(found.shape[1]) + 1 for name, found in outputs.items()}
    found = model(batch, objective, 0, {TEACHER: other})
    for name in plain:
        expected = plain[name] + 3 * divergence(TASKS[name], outputs[name], other[name])
        torch.testing.assert_close(found[name], expected)
        assert (found[name] > plain[name]).all()


def test_options_choose_the_objective():
    assert build_objective(RunConfig(), 100) is supervised
    config = parse_config({"smart_weight": 0.02, "smart_steps": 2, "proximal_weight": 1}, "here")
    smooth, proximal = build_objective(config, 100).terms
    assert smooth.weights == {"sst": 0.02, "quora": 0.02, "sts": 0.02} and smooth.steps == 2
    assert proximal == Proximal(1.0)
    decay = copies_of(config, 100)[TEACHER]
    assert [decay(step) for step in (0, 9, 10, 99)] == [0.99, 0.99, 0.999, 0.999]
    only = parse_config({"smart_weight": [0.02, 0, 0]}, "here")
    assert build_objective(only, 100).terms[0].weights == {"sst": 0.02, "quora": 0.0, "sts": 0.0}
    assert copies_of(only, 100) == {}
    with pytest.raises(UserError, match="smart_weight needs one number, or one for each of sst, quora, sts"):
        parse_config({"smart_weight": [1, 2]}, "here")
    with pytest.raises(UserError, match="smart_weight"):
        parse_config({"smart_weight": -1}, "here")


def test_a_killed_run_with_teacher_and_average_goes_on_to_the_bit(tmp_path, monkeypatch):
    """With dropout, accumulation and surgery; the perturbations need no state of their own."""
    data = f"--data {CORPUS} --train-limit 60 --eval-limit 20 --batch-size 4 --accumulation 2"
    smart = "--smart-weight 1 0 0.5 --proximal-weight 1 --teacher-decays 0.5 0.9 --teacher-change 0.5"
    rest = "--aggregator pcgrad --steps 6 --average-decay 0.8 --eval-every 2 --log-every 1"
    arguments = f"{data} {smart} {rest}".split()
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(["train", "--run", str(whole), *arguments]) == 0
    original = training.Training._train_one_step

    def one_step(self) -> None:
        original(self)
        if self.state.step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_train_one_step", one_step)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["train", "--run", str(run), *arguments])
    assert main(["train", "--run", str(run)]) == 0
    ends = [published(folder / "checkpoints")[-1] for folder in (whole, run)]
    assert [sorted(read_manifest(end).copies) for end in ends] == [["average", "teacher"]] * 2
    expected, found = (load_file(end / "rank-00000.safetensors") for end in ends)
    assert any(name.startswith("teacher/heads.sst") for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert os.path.getsize(run / "best.safetensors") == os.path.getsize(whole / "best.safetensors")
