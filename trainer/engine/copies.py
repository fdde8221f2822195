"""Named copies of the weights: which ones a run keeps, and how far each follows the weights at a step.

An engine keeps them in the optimizer's state, beside the moments: sharded, saved and resumed like those. Like the
learning rate, the decay is a pure function of the step, so nothing about it needs saving.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minbert.trainer.config import RunConfig
from minbert.trainer.objectives.proximal import TEACHER  # whose outputs the proximal term keeps the model's near

AVERAGE = "average"  # the copy that is evaluated, saved as the best model and exported in place of the weights
CHUNK = 1 << 20  # values that are exchanged at a time

Decays = dict[str, Callable[[int], float]]  # name of a copy -> step -> its decay there


def copies_of(config: RunConfig, planned_steps: int) -> Decays:
    """The copies of a run. After each update a copy becomes decay * copy + (1 - decay) * weights."""
    copies: Decays = {}
    if (decay := config.optimizer.average_decay) is not None:
        copies[AVERAGE] = partial(warmed_up, decay)
    if config.objective.proximal_weight:
        first, later = config.objective.teacher_decays
        change = config.objective.teacher_change * planned_steps
        copies[TEACHER] = lambda step: first if step < change else later
    return copies


def warmed_up(decay: float, step: int) -> float:
    """min(decay, (1 + n) / (10 + n)) at step n, from 0: an average over at most the last tenth of the run or so, until
    `decay` allows more, so that the weights that training started from are soon forgotten (the rule of TensorFlow's
    `ExponentialMovingAverage(num_updates=n)`)."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def swap(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors of one shape in place, in pieces, so that no third one is needed."""
    for a, b in zip(one.view(-1).split(CHUNK), other.view(-1).split(CHUNK), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
