"""The supervised objective: each task's own loss of its head's outputs, and what those outputs predict."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.data.task import Task
from minbert.trainer.model.multitask import Forward


def supervised(forward: Forward) -> dict[str, Tensor]:
    """The losses (B,) of each task's examples."""
    tasks = forward.model.tasks
    return {
        name: example_losses(tasks[name], forward.outputs[name], part.labels)
        for name, part in forward.batch.tasks.items()
    }


def example_losses(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """(B,) losses of the raw outputs (B, outputs): cross entropy (of hidden tokens the mean), binary cross entropy (of
    several labels their mean), or the error of the sigmoid, stretched over the labels' range (the paper, section on the
    three tasks)."""
    if task.kind == "classification":
        return F.cross_entropy(outputs, labels.long(), reduction="none")
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")
    if task.kind == "masked_lm":
        return outputs[:, 0] / outputs[:, 1].clamp(min=1)
    if task.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)
    error = F.mse_loss if task.loss == "squared_error" else F.l1_loss
    return error(scaled(task, outputs), labels, reduction="none")


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
    return scaled(task, outputs)


def scaled(task: Task, outputs: Tensor) -> Tensor:
    """(B,) similarities of a regression's raw outputs (B, 1)."""
    low, high = task.label_range
    return low + (high - low) * torch.sigmoid(outputs[:, 0])
