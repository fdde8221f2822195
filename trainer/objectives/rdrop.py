"""R-Drop (Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"): two passes with different dropout
should say the same.

The loss of an example is the mean of the losses of both passes, plus a weight times half the symmetrised divergence of
their outputs: the paper's loss with the mean of the losses in the place of their sum, as its published code has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from minbert.trainer.model.multitask import Forward, Objective
from minbert.trainer.objectives.divergence import divergence


@dataclass(frozen=True)
class RDrop:
    """`base` in two passes for each task with a weight, and in one for the others."""

    base: Objective
    weights: Mapping[str, float]

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        """The losses (B,) of each task's examples."""
        losses = self.base(forward)
        names = [name for name in forward.batch.tasks if self.weights.get(name)]
        if not names:
            return losses
        other = self.another(forward.only(names))
        again = self.base(other)
        for name in names:
            apart = divergence(forward.model.tasks[name], forward.outputs[name], other.outputs[name])
            losses[name] = (losses[name] + again[name] + self.weights[name] * apart) / 2
        return losses

    def another(self, forward: Forward) -> Forward:
        """A second pass over the same batch, with dropout of its own."""
        return forward.again()
