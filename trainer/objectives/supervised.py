"""The supervised objective: each task's own loss of its head's outputs, and what those outputs predict."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.data.task import Task
from minbert.trainer.model.multitask import Forward
from minbert.trainer.objectives.coupled import coupled_losses


@dataclass(frozen=True)
class Supervised:
    """The losses (B,) of each task's examples; `smoothing` is a task's share of each label that goes to all classes
    alike (Szegedy et al. 2016, section 7)."""

    smoothing: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        losses = {}
        for name, part in forward.batch.tasks.items():
            task, outputs = forward.model.tasks[name], forward.outputs[name]
            if task.couples_batch:
                scores = outputs[:, 0] if task.is_cosine else scaled(task, outputs)
                losses[name] = coupled_losses(str(task.loss), scores, part)
            else:
                losses[name] = example_losses(task, outputs, part.labels, self.smoothing.get(name, 0.0))
        return losses


supervised = Supervised()


def example_losses(task: Task, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) losses of the raw outputs (B, outputs): cross entropy (of hidden tokens the mean), binary cross entropy (of
    several labels their mean), the squared earth mover's distance of ordered classes, or the error of the predicted
    similarity.

    A loss that couples the examples of a batch says nothing of one: the squared error stands for it.
    """
    if task.loss == "squared_emd":
        return squared_emd(outputs, labels)
    if task.kind == "classification":
        return F.cross_entropy(outputs, labels.long(), reduction="none", label_smoothing=smoothing)
    if task.kind in ("binary", "multilabel"):
        labels = labels.view(len(outputs), -1) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)
    if task.kind == "masked_lm":
        return outputs[:, 0] / outputs[:, 1].clamp(min=1)
    error = F.l1_loss if task.loss == "absolute_error" else F.mse_loss
    return error(scaled(task, outputs), labels, reduction="none")


def squared_emd(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) squared earth mover's distances between the predicted distributions over K ordered classes and the labels:
    the sum over the classes of the squared difference of the cumulative distributions (Hou et al. 2016, "Squared Earth
    Mover's Distance-based Loss for Training Deep Neural Networks"). A class far from the label costs more
    than the one beside it."""
    below = logits.softmax(-1).cumsum(-1)[:, :-1]  # the last are both 1
    labelled = (labels[:, None] <= torch.arange(below.shape[1], device=logits.device)).to(below.dtype)
    return (below - labelled).square().sum(-1)


def predictions(task: Task, outputs: Tensor) -> Tensor:
    """(B,) predicted class, 0 or 1, or similarity; of several labels (B, classes) 0 or 1; of hidden tokens what a
    perplexity is made of (B, 2)."""
    if task.kind == "classification":
        return outputs.argmax(-1).float()
    if task.kind == "binary":
        return (outputs[:, 0] > 0).float()
    if task.kind == "multilabel":
        return (outputs > 0).float()
    if task.kind == "masked_lm":
        return outputs
    return scaled(task, outputs).clamp(*task.label_range)


def scaled(task: Task, outputs: Tensor) -> Tensor:
    """(B,) similarities of a regression's raw outputs (B, 1): the sigmoid stretched over the labels' range (the paper,
    section on the three tasks), or the cosine, 0 being the lowest label: a negative one lies below the range."""
    low, high = task.label_range
    return low + (high - low) * (outputs[:, 0] if task.is_cosine else torch.sigmoid(outputs[:, 0]))
