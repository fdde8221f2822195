"""Smoothness-inducing adversarial regularisation: the first half of SMART (Jiang et al. 2020, section 3.1).

The outputs should not change when the embeddings of an example are moved a little in the worst direction. That is
looked for by K steps of gradient ascent from random noise, with the weights held constant; then one pass over the moved
embeddings gives the penalty, which trains the weights like any other loss.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.divergence import divergence
from minbert.trainer.objectives.noise import token_noise

_TINY = 1e-20  # for a token whose gradient is zero


@dataclass(frozen=True)
class Smoothness:
    """Adds to the losses of each task with a weight. Everything is per example, or per token of one: nothing depends on
    who else is in the batch, so neither on how that is shared out.

    `norm` is that in which an ascent step has length `step_size` and the perturbation stays within `radius` (the
    paper's epsilon; None leaves it free), for each token: "infinity" or "2". With "none" the gradient is taken as it is
    and the radius is of the infinity norm.
    """

    weights: Mapping[str, float]
    seed: int
    variance: float = 1e-5
    steps: int = 1
    step_size: float = 1e-3
    norm: str = "infinity"
    radius: float | None = None

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        """The weighted penalties (B,) of the tasks that have a weight."""
        names = [name for name in forward.batch.tasks if self.weights.get(name)]
        if not names:
            return {}
        forward_of = forward.only(names)
        clean = {name: forward.outputs[name] for name in names}
        moved = forward_of.again(embeddings=forward_of.embeddings + self.perturbation(forward_of, clean))
        distances = self._distances(forward, clean, moved.outputs)
        return {name: self.weights[name] * distance for name, distance in distances.items()}

    def perturbation(self, forward: Forward, clean: Mapping[str, Tensor]) -> Tensor:
        """(N, H), a constant: noise, and what the ascent made of it (Algorithm 1, lines 4 to 8)."""
        start = forward.embeddings.detach()
        targets = {name: outputs.detach() for name, outputs in clean.items()}
        noise = token_noise(forward.batch, start.shape[1], self.seed, forward.step)
        found = self._within(noise.to(start.dtype) * self.variance**0.5)
        with torch.enable_grad(), _constant(forward.model):
            for _ in range(self.steps):
                found.requires_grad_()
                moved = forward.again(embeddings=start + found)
                distances = self._distances(forward, targets, moved.outputs)
                total = torch.cat(list(distances.values())).sum()
                (gradient,) = torch.autograd.grad(total, found)
                found = self._within(found.detach() + self.step_size * self._direction(gradient))
        return found

    def _distances(self, forward: Forward, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: divergence(forward.model.tasks[name], one[name], outputs) for name, outputs in other.items()}

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient if self.norm == "none" else gradient / self._lengths(gradient)

    def _within(self, moved: Tensor) -> Tensor:
        """Projected onto the ball of the radius."""
        if self.radius is None:
            return moved
        if self.norm == "2":
            return moved * (self.radius / self._lengths(moved)).clamp(max=1.0)
        return moved.clamp(-self.radius, self.radius)

    def _lengths(self, moved: Tensor) -> Tensor:
        """(N, 1)."""
        order = 2.0 if self.norm == "2" else float("inf")
        return torch.linalg.vector_norm(moved, order, dim=1, keepdim=True).clamp(min=_TINY)


@contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Inside, no graph leads to the weights: a third of the work of the ascent, and nothing for hooks to see."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
