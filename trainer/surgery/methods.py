"""The methods that make one update of several tasks: from losses or from the Gramian of the gradients to weights.

Nearly every method of gradient surgery is a function from the T x T Gramian of the task gradients to T weights. That is
what makes it exact on shards: a Gramian is a sum over coordinates, so each process needs only its own. A method of
one's own is such a function, given as `--aggregator package.module:function` or registered by name:

    @register("mine")
    def mine(gramian: Tensor) -> Tensor: ...

Methods that torchjd has are taken from there.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minbert.data.errors import UserError, shown
from minbert.trainer.processes.random_state import stream

Weighting = Callable[[Tensor], Tensor]
Source = Literal["losses", "gramian", "coordinates"]


@dataclass(frozen=True)
class Method:
    """A method: what it looks at, how it is built for T tasks, its options with their defaults, its source.

    The weights of a `scale_free` one do not change when all gradients are multiplied by the same number. It is given
    the Gramian at scale one, because solvers have absolute tolerances. An `unseeing` one looks at no number, so that it
    runs where the Gramian lies and nobody waits for it; the others get it on the CPU.
    """

    source: Source
    build: Callable[..., Any]
    options: Mapping[str, float]
    reference: str
    scale_free: bool = False
    unseeing: bool = False


METHODS: dict[str, Method] = {}


def register(name: str, reference: str = "") -> Callable[[Weighting], Weighting]:
    """Make a function from Gramian (T, T) to weights (T,), both float64 on the CPU, a method called `name`."""

    def add(function: Weighting) -> Weighting:
        METHODS[name] = Method("gramian", lambda tasks: function, {}, reference)
        return function

    return add


@register("nash_mtl", "Navon et al. 2022, Multi-Task Learning as a Bargaining Game, equation 2")
def nash_mtl(gramian: Tensor) -> Tensor:
    """The Nash bargaining solution: the weights a > 0 with G a = 1 / a.

    The reference solves a sequence of linearised problems and starts each step from the last one's weights; this is as
    good as the arithmetic, with no state.
    """
    return fairgrad(gramian, 1.0)


def fairgrad(gramian: Tensor, alpha: float) -> Tensor:
    """The alpha-fair weights: a > 0 with G a = a ** (-1 / alpha); uniform ones for alpha = 0.

    Alone, task i would get s_i = G_ii ** (-alpha / (1 + alpha)). In v = a / s the equations are M v = v ** (-1 / alpha)
    with ones on M's diagonal, so neither tolerance nor ridge depends on how long the gradients are. They are the slope
    of a convex function of v, divided by c; Newton's method with a line search solves them to the arithmetic's
    precision. A small ridge bounds the weights where gradients oppose each other exactly.
    """
    count = len(gramian)
    if alpha == 0:
        return torch.full((count,), 1 / count, dtype=gramian.dtype)
    squares = gramian.diagonal()
    s, c = squares ** (-alpha / (1 + alpha)), squares ** ((1 - alpha) / (1 + alpha))
    matrix = gramian * s * (s / c)[:, None] + 1e-9 * torch.eye(count, dtype=gramian.dtype)
    v = torch.ones_like(squares)
    for _ in range(200):
        slope = matrix @ v - v ** (-1 / alpha)
        step = torch.linalg.solve(matrix + torch.diag(v ** (-1 / alpha - 1) / alpha), -slope)
        descent = -(c * slope) @ step
        size = min(1.0, float((0.99 * v / (-step).clamp_min(1e-300)).min()))
        # The slope along a convex function rises: where it has not become positive lies the near side of the minimum.
        while (c * (matrix @ (v + size * step) - (v + size * step) ** (-1 / alpha))) @ step > 0.1 * descent:
            size /= 2
            if size < 1e-6:  # nothing but rounding is left
                return s * v
        v = v + size * step
        if size == 1 and (step / v).abs().max() < 1e-8:  # the error is of the order of its square
            break
    return s * v


def _fairgrad(tasks: int, alpha: float) -> Weighting:
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is a number from 0 on, not {alpha:g}")
    return partial(fairgrad, alpha=alpha)


@register("config", "Liu et al. 2025, ConFIG: Towards Conflict-free Training, equation 2")
def config(gramian: Tensor) -> Tensor:
    """The direction with the same cosine to every task's gradient.

    The method does not care for the basis, so it can be run on any matrix with the right Gramian: here its square
    root R, whose rows then stand for the gradients. The result lies in their span, so weights w with w R = result
    exist.
    """
    from torchjd.aggregation import ConFIG

    values, vectors = torch.linalg.eigh(gramian)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return torch.linalg.lstsq(root.T, ConFIG()(root)[:, None], driver="gelsd").solution[:, 0]


def _projection(name: str, reference: str, attribute: str, scale_free: bool = False, **options: float) -> None:
    def build(tasks: int, **chosen: float) -> Weighting:
        found = getattr(import_module("minbert.trainer.surgery.projections"), attribute)
        return found(**chosen) if isinstance(found, type) else found

    METHODS[name] = Method("gramian", build, options, reference, scale_free, unseeing=True)


def _torchjd(name: str, reference: str, weighting: str, scale_free: bool = True, **options: float) -> None:
    """Register a Gramian weighting of torchjd under our name; `options` are its arguments with our defaults."""

    def build(tasks: int, **chosen: float) -> Weighting:
        return getattr(import_module("torchjd.aggregation"), weighting)(**chosen)

    METHODS[name] = Method("gramian", build, options, reference, scale_free)


def _scalarizer(name: str, reference: str, scalarizer: str, sized: bool = False, **options: float) -> None:
    def build(tasks: int, **chosen: float) -> nn.Module:
        kind = getattr(import_module("torchjd.scalarization"), scalarizer)
        return kind(tasks, **chosen) if sized else kind(**chosen)

    METHODS[name] = Method("losses", build, options, reference)


_projection("pcgrad", "Yu et al. 2020, Gradient Surgery for Multi-Task Learning, algorithm 1", "pcgrad")
METHODS["sum"] = Method("losses", lambda tasks: torch.sum, {}, "the plain sum; --task-weights fixes other weights")
_scalarizer("uncertainty", "Kendall et al. 2018, Multi-Task Learning Using Uncertainty, equation 10", "UW", sized=True)
_scalarizer("dwa", "Liu et al. 2019, End-to-End Multi-Task Learning with Attention, equation 7", "DWA", temperature=2.0)
_scalarizer("famo", "Liu et al. 2023, FAMO, algorithm 1", "FAMO", sized=True, lr=0.025, weight_decay=1e-3)
_scalarizer("random", "Lin et al. 2022, Reasonable Effectiveness of Random Weighting, algorithm 2", "Random")
_projection("gradvac", "Wang et al. 2021, Gradient Vaccine, algorithm 1", "GradVac", scale_free=True, beta=0.01)
_torchjd("mgda", "Desideri 2012; Sener and Koltun 2018, algorithm 2", "MGDAWeighting")
_torchjd("cagrad", "Liu et al. 2021, Conflict-Averse Gradient Descent, algorithm 1", "CAGradWeighting", c=0.5)
_torchjd("imtl_g", "Liu et al. 2021, Towards Impartial Multi-task Learning, equation 6", "IMTLGWeighting")
_torchjd("aligned_mtl", "Senushkin et al. 2023, Independent Component Alignment, section 3", "AlignedMTLWeighting")
_torchjd("upgrad", "Quinton and Rey 2024, Jacobian Descent, equation 5", "UPGradWeighting")
_torchjd("dualproj", "Lopez-Paz and Ranzato 2017, Gradient Episodic Memory, equation 11", "DualProjWeighting")
METHODS["fairgrad"] = Method(
    "gramian", _fairgrad, {"alpha": 1.0}, "Ban and Ji 2024, Fair Resource Allocation, equation 4"
)
METHODS["graddrop"] = Method(
    "coordinates", lambda tasks: None, {}, "Chen et al. 2020, Just Pick a Sign, algorithm 1"
)  # combined in surgery.py


def parse_method(text: str) -> tuple[str, Method, dict[str, float]]:
    """`name`, `name:option=value,...` or `package.module:function` -> name, method, options. Raises UserError.

    Imports nothing: a configuration may be somebody else's. Building the method does.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        if is_own(text):
            return text, Method("gramian", lambda tasks: _imported(text, tasks), {}, text), {}
        near = difflib.get_close_matches(name[:80], METHODS, n=1)
        raise UserError(
            f"unknown aggregator {shown(text)}{f'; did you mean {near[0]!r}?' if near else ''}\n"
            f"There are {', '.join(METHODS)}, and package.module:function"
        )
    method, options = METHODS[name], dict(METHODS[name].options)
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in options:
            known = ", ".join(options) or "none"
            raise UserError(f"aggregator {name} has no option {shown(key)}; its options: {known}")
        try:
            options[key] = float(value)
        except ValueError:
            options[key] = math.nan
        if not math.isfinite(options[key]):
            raise UserError(f"aggregator {name}: {key} must be a number, not {shown(value)}")
    return name, method, options


def is_own(text: str) -> bool:
    """Whether a text looks like `package.module:function`."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text) is not None


def _imported(text: str, tasks: int) -> Weighting:
    """Import `package.module:function`, and try it on gradients that are orthogonal. Raises UserError."""
    module, _, function = text.partition(":")
    try:
        weighting = getattr(import_module(module), function)
        with _Seeded(0):
            weights = weighting(torch.eye(tasks, dtype=torch.float64))
    except Exception as error:  # whatever somebody's code may raise
        raise UserError(f"aggregator {text} cannot be used: {type(error).__name__}: {error}") from error
    if not isinstance(weights, Tensor) or weights.shape != (tasks,):
        raise UserError(f"aggregator {text} must make a tensor of {tasks} weights of a Gramian, not {shown(weights)}")
    return weighting


class Aggregator:
    """A method at work on T tasks: its weights step by step, and its state.

    All processes hold one and call it with the same numbers. Random choices depend on the seed and the step alone, so
    they are the same everywhere and nothing about them needs saving. With surgery per layer, each of `groups` layers
    has a weighting, and thereby a state, of its own.
    """

    def __init__(self, text: str, tasks: int, seed: int, groups: int = 1):
        self.name, method, self.options = parse_method(text)
        self.source: Source = method.source
        self.scale_free, self.unseeing = method.scale_free, method.unseeing
        self.tasks, self.seed, self.groups = tasks, seed, groups
        try:
            self.weightings = [method.build(tasks, **self.options) for _ in range(groups)]
        except (ImportError, ValueError) as error:
            raise UserError(f"aggregator {text}: {error}") from None
        for weighting in self.weightings:
            if isinstance(weighting, nn.Module):
                weighting.double()
        learned = list(self._scalarizer.parameters()) if self.name == "uncertainty" else []
        self._optimizer = torch.optim.Adam(learned, lr=0.01) if learned else None

    @property
    def wants_losses_after(self) -> bool:
        """Whether `observe` wants the losses of the same batch after the update."""
        return self.name == "famo"

    @property
    def _scalarizer(self) -> Any:
        return self.weightings[0]

    def from_gramian(self, gramian: Tensor, step: int) -> Tensor:
        """Weights (T,), or (groups, T) for a Gramian (groups, T, T); float64, where the method works.

        A task whose gradient is zero has no say and, having nothing to be weighted, weight 1. A Gramian that is not
        finite, whose step will be skipped, teaches nothing.
        """
        gramian = gramian if self.unseeing else gramian.cpu()
        if not self.unseeing and not gramian.isfinite().all():
            return torch.ones(gramian.shape[:-1], dtype=gramian.dtype)
        if gramian.ndim == 3:
            with self._seeded(step):
                return torch.stack([self._weigh(w, g) for w, g in zip(self.weightings, gramian, strict=True)])
        with self._seeded(step):
            return self._weigh(self.weightings[0], gramian)

    def from_losses(self, losses: Tensor, step: int) -> Tensor:
        """Weights (T,): the derivative of the method's scalar with respect to each loss (T,), float64 on the CPU.

        Parameters that the method learns by gradient descent take a step. Losses that are not finite, whose step will
        be skipped, leave no trace in what the method remembers.
        """
        if not losses.isfinite().all():
            return torch.ones_like(losses)
        values = losses.detach().clone().requires_grad_()
        with self._seeded(step), torch.enable_grad():
            self._scalarizer(values).backward()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        assert values.grad is not None
        return values.grad

    def observe(self, losses: Tensor) -> None:
        """Losses (T,) of the step's batch after the update. Those that are not finite teach nothing."""
        if losses.isfinite().all():
            self._scalarizer.update(losses)

    def end_epoch(self) -> None:
        if self.name == "dwa":
            self._scalarizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps: tensors, numbers, and lists of them."""
        return {
            "weightings": [_snapshot(weighting) for weighting in self.weightings],
            "optimizer": self._optimizer.state_dict() if self._optimizer else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for weighting, snapshot in zip(self.weightings, state["weightings"], strict=True):
            _restore(weighting, snapshot, self.tasks)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])

    def rehearse(self) -> None:
        """A step on made-up numbers, which shows whether a state fits; it leaves its trace in what is remembered."""
        ones = torch.ones(self.tasks, dtype=torch.float64)
        if self.source == "losses":
            self.from_losses(ones, 0)
        elif self.source == "gramian":
            eye = torch.diag(ones)
            self.from_gramian(eye if self.groups == 1 else eye.expand(self.groups, -1, -1), 0)
        if self.wants_losses_after:
            self.observe(ones)

    def _weigh(self, weighting: Weighting, gramian: Tensor) -> Tensor:
        weights = torch.ones(len(gramian), dtype=gramian.dtype)
        active = gramian.diagonal() > 0
        if self.unseeing:
            if self.scale_free:
                gramian = gramian / torch.where(active.any(), gramian.diagonal().sum() / active.sum(), 1.0)
            return torch.where(active, weighting(gramian), 1.0)
        if self.scale_free and active.any():
            gramian = gramian / gramian.diagonal()[active].mean()
        if active.sum() > 1 and hasattr(weighting, "reset"):
            # What it remembers is per pair of tasks: it must go on seeing all of them.
            weights[active] = weighting(gramian).to(weights)[active]
        elif active.sum() > 1:
            weights[active] = weighting(gramian[active][:, active]).to(weights)
        return weights

    def _seeded(self, step: int) -> "_Seeded":
        return _Seeded(stream(self.seed, "aggregator", step))


class _Seeded:
    """The global generator seeded inside the block, as it was after it."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.saved = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *exception: object) -> None:
        torch.set_rng_state(self.saved)


def _snapshot(weighting: Any) -> dict[str, Any]:
    """The state of a weighting: its own attributes, parameters and buffers, and the state of optimizers inside."""
    if not isinstance(weighting, nn.Module):
        return {}
    own = {key: value for key, value in vars(weighting).items() if key not in vars(nn.Module())}
    inner = {key: value.state_dict() for key, value in own.items() if isinstance(value, torch.optim.Optimizer)}
    plain = {key: value for key, value in own.items() if key not in inner and _is_data(value)}
    tensors = {key: value.detach().clone() for key, value in weighting.named_parameters()}
    buffers = {key: None if value is None else value.detach().cpu() for key, value in weighting._buffers.items()}
    return {"attributes": plain, "optimizers": inner, "parameters": tensors, "buffers": buffers}


def _restore(weighting: Any, snapshot: Mapping[str, Any], tasks: int) -> None:
    if not snapshot:
        return
    if snapshot["optimizers"]:
        # The optimizer inside comes into being with the first update.
        ones = torch.ones(tasks, dtype=torch.float64)
        weighting(ones)
        weighting.update(ones)
    for key, optimizer in snapshot["optimizers"].items():
        getattr(weighting, key).load_state_dict(optimizer)
    for key, value in snapshot["attributes"].items():
        if key not in vars(weighting):
            raise ValueError(f"it has no {key!r}")
        setattr(weighting, key, value)
    with torch.no_grad():
        for key, value in weighting.named_parameters():
            value.copy_(snapshot["parameters"][key])
    for key, value in snapshot["buffers"].items():
        weighting._buffers[key] = value


def _is_data(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_data(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | Tensor)
