"""The methods, from Gramian or losses to weights: hard inputs, their properties, torchjd's dense aggregators."""

import sys
from collections.abc import Sequence
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd import aggregation, scalarization

from minbert.data.errors import UserError
from minbert.trainer.processes.random_state import stream
from minbert.trainer.surgery.methods import METHODS, Aggregator, parse_method, register

GRAMIAN = [name for name, method in METHODS.items() if method.source == "gramian"]
DETERMINISTIC = [name for name in GRAMIAN if name not in ("pcgrad", "gradvac")]
DENSE = {
    "pcgrad": aggregation.PCGrad,
    "gradvac": partial(aggregation.GradVac, beta=0.01),
    "mgda": aggregation.MGDA,
    "cagrad": partial(aggregation.CAGrad, c=0.5),
    "imtl_g": aggregation.IMTLG,
    "aligned_mtl": aggregation.AlignedMTL,
    "upgrad": aggregation.UPGrad,
    "dualproj": aggregation.DualProj,
    "config": aggregation.ConFIG,
}
NON_CONFLICTING = ["upgrad", "dualproj", "mgda", "nash_mtl"]  # the update lowers no task's progress to first order


def weights(name: str, gramian: Tensor, step: int = 0) -> Tensor:
    return Aggregator(name, len(gramian), seed=0).from_gramian(gramian, step)


def jacobian(kind: str, tasks: int, seed: int) -> Tensor:
    """(T, 12) gradients in some difficult position to each other."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, 12, dtype=torch.float64, generator=generator)
    if kind == "conflicting":
        rows[1:] -= 1.5 * rows[0]
    elif kind == "parallel":
        rows = rows[:1] * torch.linspace(0.5, 2, tasks, dtype=torch.float64)[:, None]
    elif kind == "opposing":
        rows = rows[:1] * torch.tensor([(-1.0) ** t for t in range(tasks)], dtype=torch.float64)[:, None]
    elif kind == "rank-deficient":
        rows[-1] = rows[:-1].sum(0) if tasks > 1 else rows[-1]
    elif kind == "zero":
        rows[-1] = 0
    return rows


HARD = ["random", "conflicting", "parallel", "opposing", "rank-deficient", "zero"]


@pytest.mark.parametrize("name", GRAMIAN)
@given(st.sampled_from(HARD), st.integers(1, 5), st.integers(0, 1000), st.integers(-15, 15))
@settings(max_examples=25)
def test_weights_are_finite_whatever_the_gradients(name, kind, tasks, seed, exponent):
    rows = jacobian(kind, tasks, seed) * 10.0**exponent
    found = weights(name, rows @ rows.T)
    assert found.shape == (tasks,) and found.dtype == torch.float64
    assert found.isfinite().all()
    assert (found @ rows).isfinite().all()


@pytest.mark.parametrize("name", DENSE)
@given(st.sampled_from(["random", "conflicting"]), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=20)
def test_weights_combine_to_torchjds_dense_result(name, kind, tasks, seed):
    rows = jacobian(kind, tasks, seed)
    found = weights(name, rows @ rows.T, step=seed)
    torch.manual_seed(stream(0, "aggregator", seed))
    torch.testing.assert_close(found @ rows, DENSE[name]()(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NON_CONFLICTING)
@given(st.sampled_from(["random", "conflicting", "rank-deficient"]), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=25)
def test_the_update_conflicts_with_no_task(name, kind, tasks, seed):
    rows = jacobian(kind, tasks, seed)
    gramian = rows @ rows.T
    found = weights(name, gramian)
    tolerance = {"mgda": 2e-2, "nash_mtl": 1e-3}.get(name, 1e-12)  # of what iterates, MGDA to a precision of 1e-3
    if name in ("upgrad", "dualproj"):  # torchjd solves for this, so that the problem has a solution always
        gramian = gramian + 1e-4 * gramian.trace() * torch.eye(tasks, dtype=gramian.dtype)
    assert (gramian @ found >= -tolerance * gramian.diagonal().max()).all()


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=15)
def test_the_order_of_the_tasks_does_not_matter(name, tasks, seed):
    rows = jacobian("random", tasks, seed)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    gramian = rows @ rows.T
    turned = weights(name, gramian[order][:, order])
    tolerance = 2e-2 if name in ("mgda", "cagrad") else 1e-4
    torch.testing.assert_close(turned @ rows[order], weights(name, gramian) @ rows, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "config"])
@given(st.integers(0, 1000), st.integers(-6, 6))
@settings(max_examples=15)
def test_common_scale_does_not_change_weights(name, seed, exponent):
    rows = jacobian("conflicting", 3, seed)
    gramian = rows @ rows.T
    torch.testing.assert_close(weights(name, gramian * 10.0**exponent), weights(name, gramian), rtol=1e-3, atol=1e-3)


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_pcgrad_of_two_tasks_is_the_projection(seed):
    rows = jacobian("random", 2, seed)
    a, b = rows
    product = (a @ b).clamp_max(0)
    expected = a - product / (b @ b) * b + b - product / (a @ a) * a
    torch.testing.assert_close(weights("pcgrad", rows @ rows.T) @ rows, expected, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(["random", "conflicting"]), st.integers(1, 6), st.integers(0, 1000), st.integers(-10, 10))
@settings(max_examples=40)
def test_nash_mtl_solves_its_equation(kind, tasks, seed, exponent):
    """G a = 1 / a (Navon et al. 2022, equation 2)."""
    rows = jacobian(kind, tasks, seed)
    rows = rows * 10.0**exponent
    found = METHODS["nash_mtl"].build(tasks)(rows @ rows.T)
    torch.testing.assert_close(
        (rows @ rows.T @ found) * found, torch.ones(tasks, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [("nash_mtl", aggregation.NashMTL(n_tasks=3, max_norm=0)), ("fairgrad:alpha=2", aggregation.FairGrad(alpha=2.0))],
)
def test_fair_methods_agree_with_torchjd(name, reference):
    rows = jacobian("random", 3, 4)
    torch.testing.assert_close(weights(name, rows @ rows.T) @ rows, reference(rows), rtol=1e-2, atol=1e-2)


def fair_weights(gramian: Tensor, alpha: float, start: Tensor) -> list[float]:
    """The a > 0 with G a = a ** (-1 / alpha), by Newton's method in log a with 50 digits."""
    with mpmath.workdps(50):
        g, size, power = mpmath.matrix(gramian.tolist()), len(gramian), 1 / mpmath.mpf(alpha)
        x = mpmath.matrix([mpmath.log(float(a)) for a in start])
        for _ in range(30):
            a = x.apply(mpmath.exp)
            ga = g * a
            errors = mpmath.matrix([ga[i] * a[i] ** power - 1 for i in range(size)])
            slope = mpmath.matrix(size, size)
            for i in range(size):
                for j in range(size):
                    slope[i, j] = (g[i, j] * a[j] + (i == j) * ga[i] * power) * a[i] ** power
            x -= mpmath.lu_solve(slope, errors)
        assert max(map(abs, errors)) < 1e-40
        return [float(value) for value in x.apply(mpmath.exp)]


@pytest.mark.parametrize(
    "norms", [(1, 1, 1), (1e5, 1, 1), (1, 1e-5, 1), (1e3, 1, 1e-2), (1e-2, 1e-2, 1e-2), (1e-4, 1e-4, 1e-4)]
)
@pytest.mark.parametrize(
    ("name", "alpha"), [("nash_mtl", 1.0), ("fairgrad", 1.0), ("fairgrad:alpha=0.5", 0.5), ("fairgrad:alpha=2", 2.0)]
)
def test_fair_weights_are_right_however_long_the_gradients_are(name: str, alpha: float, norms: Sequence[float]):
    for seed, kind in enumerate(["random", "conflicting", "random", "conflicting"]):
        rows = (
            torch.nn.functional.normalize(jacobian(kind, 3, seed)) * torch.tensor(norms, dtype=torch.float64)[:, None]
        )
        found = weights(name, rows @ rows.T)
        expected = torch.tensor(fair_weights(rows @ rows.T, alpha, found), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_fairgrad_without_fairness_is_the_mean():
    rows = jacobian("random", 3, 4)
    assert weights("fairgrad:alpha=0", rows @ rows.T).tolist() == [1 / 3] * 3
    with pytest.raises(UserError, match="alpha is a number from 0 on, not -1"):
        Aggregator("fairgrad:alpha=-1", 3, 0)


def test_random_choices_depend_on_seed_and_step_alone():
    rows = jacobian("conflicting", 4, 1)
    aggregator = Aggregator("pcgrad", 4, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [aggregator.from_gramian(rows @ rows.T, step) for step in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = [Aggregator("pcgrad", 4, seed=0).from_gramian(rows @ rows.T, step) for step in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(not torch.equal(first[0], other) for other in first[1:])


# --- methods that look at losses ---------------------------------------------------------------------------------


def test_loss_weights_are_the_derivative_of_the_methods_scalar():
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    found = Aggregator("uncertainty", 3, 0).from_losses(losses, 0)
    torch.testing.assert_close(found, torch.full((3,), 0.5, dtype=torch.float64))  # log variances start at zero
    found = Aggregator("famo", 3, 0).from_losses(losses, 0)
    values = losses.clone().requires_grad_()
    scalarization.FAMO(3).double()(values).backward()
    torch.testing.assert_close(found, values.grad)


def test_losses_that_are_not_finite_teach_famo_nothing():
    """After an update that broke the model, its losses are looked at once more."""
    aggregator, losses = Aggregator("famo", 3, 0), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    aggregator.from_losses(losses, 0)
    aggregator.observe(losses * 0.9)
    expected = aggregator.from_losses(losses, 1)
    aggregator.observe(torch.tensor([0.5, float("nan"), float("inf")], dtype=torch.float64))
    assert torch.equal(aggregator.from_losses(losses, 2), expected) and expected.isfinite().all()


def test_uncertainty_learns_to_lower_large_losses():
    aggregator = Aggregator("uncertainty", 2, 0)
    losses = torch.tensor([0.1, 5.0], dtype=torch.float64)
    for step in range(400):
        found = aggregator.from_losses(losses, step)
    # At the optimum of exp(-s) L / 2 + s / 2 the weight is 1 / (2 L).
    assert found[0] > 1.0 and found[1] < 0.15


def test_dwa_follows_its_formula_over_epochs():
    aggregator = Aggregator("dwa", 2, 0)
    epochs = torch.tensor([[1.0, 1.0], [0.5, 0.9], [0.4, 0.8]], dtype=torch.float64)
    for losses in epochs:
        found = aggregator.from_losses(losses, 0)
        aggregator.end_epoch()
    expected = 2 * torch.softmax(epochs[1] / epochs[0] / 2.0, 0)
    torch.testing.assert_close(found, expected)


def test_random_weights_are_a_distribution_that_changes_with_the_step():
    aggregator = Aggregator("random", 3, 0)
    losses = torch.ones(3, dtype=torch.float64)
    found = [aggregator.from_losses(losses, step) for step in range(4)]
    assert all(abs(float(w.sum()) - 1) < 1e-9 and (w > 0).all() for w in found)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["gradvac", "uncertainty", "dwa", "famo"])
def test_state_survives_a_checkpoint(name, tmp_path):
    def advance(aggregator: Aggregator, steps: range) -> list[Tensor]:
        found = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            losses = torch.rand(3, dtype=torch.float64, generator=generator) + 0.1
            rows = jacobian("conflicting", 3, step)
            if aggregator.source == "gramian":
                found.append(aggregator.from_gramian(rows @ rows.T, step))
            else:
                found.append(aggregator.from_losses(losses, step))
                if aggregator.wants_losses_after:
                    aggregator.observe(losses * 0.9)
            if step % 3 == 2:
                aggregator.end_epoch()
        return found

    for stop in (0, 1, 4, 7):
        whole = Aggregator(name, 3, 0)
        advance(whole, range(stop))
        torch.save(whole.state_dict(), tmp_path / "state.pt")
        resumed = Aggregator(name, 3, 0)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        pairs = list(zip(advance(resumed, range(stop, 12)), advance(whole, range(stop, 12)), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), (name, stop)


# --- names -------------------------------------------------------------------------------------------------------


def test_names_and_options():
    assert parse_method("cagrad:c=0.4")[2] == {"c": 0.4}
    for text, message in [
        ("pcgrda", "did you mean 'pcgrad'"),
        ("cagrad:d=1", "its options: c"),
        ("cagrad:c=much", "must be a number"),
        ("cagrad:c=1e400", "must be a number"),
        ("nowhere:2", "unknown aggregator"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_method(text)


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_methods.py").write_text("def normalised(gramian):\n    return gramian.diagonal().rsqrt()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = jacobian("random", 3, 0)
    found = weights("own_methods:normalised", rows @ rows.T)
    torch.testing.assert_close(found, 1 / rows.norm(dim=1))
    sys.modules.pop("own_methods")

    register("doubled")(lambda gramian: 2 * torch.ones(len(gramian)))
    try:
        assert weights("doubled", rows @ rows.T).tolist() == [2.0, 2.0, 2.0]
    finally:
        del METHODS["doubled"]
