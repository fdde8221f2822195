"""Prediction from several models: the mean of what they say, in the scale of predictions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minbert.data.task import Task
from minbert.trainer.objectives.supervised import predictions, scaled


def mean_predictions(task: Task, outputs: Sequence[Tensor]) -> Tensor:
    """Predictions (n,), or of several labels (n, classes), from the raw outputs (n, outputs) of each model: the class
    of the largest mean probability, yes where its mean is above a half, or the mean similarity. One model's are its
    own.

    Probabilities are averaged, not logits: a model's logits have a scale of their own, and models with other losses
    (cosines, say) give other outputs. Of hidden tokens the negative log likelihoods are averaged.
    """
    if len(outputs) == 1:
        return predictions(task, outputs[0])
    mean = torch.stack([in_scale(task, each) for each in outputs]).mean(0)
    if task.kind == "classification":
        return mean.argmax(-1).float()
    if task.kind == "multilabel":
        return (mean > 0.5).float()
    if task.kind == "masked_lm":
        return mean
    return (mean[:, 0] > 0.5).float() if task.kind == "binary" else mean[:, 0]


def in_scale(task: Task, outputs: Tensor, temperature: float = 1.0) -> Tensor:
    """Raw outputs (n, outputs) in the scale of predictions, (n, outputs): probabilities of the classes, of yes, or of
    each label, of logits that are divided by a temperature; or similarities."""
    if task.kind == "classification":
        return (outputs / temperature).softmax(-1)
    if task.kind in ("binary", "multilabel"):
        return (outputs / temperature).sigmoid()
    if task.kind == "masked_lm":
        return outputs
    return scaled(task, outputs).clamp(*task.label_range)[:, None]
