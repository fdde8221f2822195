"""How far two outputs for the same example lie apart, by the kind of task: what SMART keeps small."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.data.task import Task
from minbert.trainer.objectives.supervised import scaled


def divergence(task: Task, one: Tensor, other: Tensor) -> Tensor:
    """(B,) distances of raw outputs (B, outputs): symmetric, never negative, zero where both say the same.

    The symmetrised Kullback-Leibler divergence KL(p || q) + KL(q || p) of the predicted distributions, of several
    labels their mean; or the squared error of a regression, in the unit of its labels (Jiang et al. 2020, section 3.1).
    """
    if task.kind == "classification":
        return _symmetric_kl(one.log_softmax(-1), other.log_softmax(-1)).sum(-1)
    if task.kind in ("binary", "multilabel"):
        yes = _symmetric_kl(F.logsigmoid(one), F.logsigmoid(other))
        return (yes + _symmetric_kl(F.logsigmoid(-one), F.logsigmoid(-other))).mean(-1)
    return (scaled(task, one) - scaled(task, other)).square()


def _symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p - q) (log p - log q), the terms of which the symmetric divergence is the sum.

    Written with d = |log p - log q| as max(p, q) (1 - exp(-d)) d: not negative in any arithmetic, the same to the bit
    whichever comes first, and without the cancellation of p - q, as the two are close by design.
    """
    d = (log_p - log_q).abs()
    return -torch.maximum(log_p, log_q).exp() * torch.expm1(-d) * d
