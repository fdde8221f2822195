"""Bregman proximal point optimisation: the second half of SMART (Jiang et al. 2020, section 3.2).

A step should not move the outputs far from those of a teacher, the moving average of the weights so far ("momentum",
equation 6). It is a named copy of the weights (`minbert.trainer.engine.copies`), and what it says of a step's batch is
there before the step's first forward pass (`Forward.targets`).
"""

from dataclasses import dataclass

from torch import Tensor

from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.divergence import divergence

TEACHER = "teacher"  # the name of the copy, and of its outputs among a forward pass's targets


@dataclass(frozen=True)
class Proximal:
    """Adds `weight` (the paper's mu) times the divergence of the model's outputs from the teacher's to every loss but
    those of hidden tokens, which have no outputs to compare."""

    weight: float

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        tasks = forward.model.tasks
        return {
            name: self.weight * divergence(tasks[name], outputs, forward.targets[TEACHER][name])
            for name, outputs in forward.outputs.items()
            if tasks[name].kind != "masked_lm"
        }
