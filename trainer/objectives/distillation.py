"""Distillation: the outputs of teachers on the training rows, beside the labels (Hinton et al. 2015, "Distilling the
Knowledge in a Neural Network"), with teacher annealing (Clark et al. 2019, "BAM! Born-Again Multi-Task Networks for
Natural Language Understanding"): at first the teachers have most of the say, at last the labels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.data.task import Task
from minbert.trainer.model.multitask import Forward, Objective
from minbert.trainer.objectives.supervised import scaled

TEACHERS = "teachers"  # whose outputs these are among a forward pass's targets


@dataclass(frozen=True)
class Distilled:
    """The losses of `base` and the distance from the teachers, which have the first `share` at the first of `total`
    steps, the second at the last, and in between go from one to the other in a line (BAM: 1 to 0). The labels have the
    rest. A task of which no teacher knows has the losses of `base`."""

    base: Objective
    total: int
    share: tuple[float, float] = (1.0, 0.0)
    temperature: float = 1.0

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        """The losses (B,) of each task's examples."""
        losses, share = self.base(forward), self.share_at(forward.step)
        for name, said in forward.targets.get(TEACHERS, {}).items():
            if name in losses:
                apart = distance(forward.model.tasks[name], forward.outputs[name], said, self.temperature)
                losses[name] = (1 - share) * losses[name] + share * apart
        return losses

    def share_at(self, step: int) -> float:
        first, last = self.share
        return first + (last - first) * min(1.0, step / max(1, self.total - 1))


def distance(task: Task, outputs: Tensor, said: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) distances of raw outputs (B, outputs) from what teachers say (B, outputs), in the scale of predictions.

    The Kullback-Leibler divergence from the teachers' distribution, of several labels the mean, of logits that are
    divided by the temperature; times its square, by which the gradient keeps its size (Hinton et al., section 2). Of a
    regression the squared error of the similarity.
    """
    if task.kind == "regression":
        return (scaled(task, outputs) - said[:, 0]).square()
    logits = outputs / temperature
    if task.kind == "classification":
        apart = (torch.xlogy(said, said) - said * logits.log_softmax(-1)).sum(-1)
    else:
        yes = torch.xlogy(said, said) - said * F.logsigmoid(logits)
        apart = (yes + torch.xlogy(1 - said, 1 - said) - (1 - said) * F.logsigmoid(-logits)).mean(-1)
    return temperature**2 * apart
