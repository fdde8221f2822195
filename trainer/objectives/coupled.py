"""Losses that are no sum over examples: CoSENT and the Pearson correlation compare the examples of a batch with each
other.

So that they do not depend on how a batch is shared out, each process sees the scores and labels of all of them: the
loss is that of the global batch, and its gradient with respect to the process's own scores is exact. The others' scores
are constants to it, as their processes take the gradient with respect to those.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minbert.data.batches.batch import TaskBatch
from minbert.trainer.processes.world import world_size

SCALE = 20.0  # of CoSENT's cosines, its author's lambda


def cosent(scores: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum over pairs of examples with y_i > y_j of exp(lambda (s_j - s_i))) of cosines and labels (G,), lambda
    being 20: smaller the more pairs are in the right order (Su 2022, "CoSENT: a more efficient sentence embedding
    scheme than Sentence-BERT")."""
    wrong = SCALE * (scores[None, :] - scores[:, None])
    terms = torch.where(labels[:, None] > labels[None, :], wrong, -torch.inf)
    return torch.cat([scores.new_zeros(1), terms.flatten()]).logsumexp(0)


def pearson(scores: Tensor, labels: Tensor) -> Tensor:
    """1 - r of scores and labels (G,): from 0 to 2, and 1 with no gradient where either are all the same."""
    x, y = scores - scores.mean(), labels - labels.mean()
    return 1.0 - (x @ y) * ((x @ x) * (y @ y) + 1e-24).rsqrt()


COUPLED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cosent": cosent, "pearson": pearson}


def coupled_losses(loss: str, scores: Tensor, part: TaskBatch) -> Tensor:
    """(B,) losses of this process's examples with these scores (B,), each being that of the whole global batch, so that
    their sum over all processes, divided by the global size, is that loss, and its gradient that of the loss.
    Collective."""
    size, own = part.global_size, (scores * part.weights).double()
    held, mine, labels = (
        own.new_zeros(size).index_add(0, part.places, values)
        for values in (part.weights.double(), own, (part.labels * part.weights).double())
    )
    everyones = torch.stack([mine.detach(), labels])
    if world_size() > 1:
        torch.distributed.all_reduce(everyones)
    value = COUPLED[loss](torch.where(held > 0, mine, everyones[0]), everyones[1])
    share = size / part.weights.sum().clamp(min=1)  # of the batch, this process has only some
    value = value.detach() + (value - value.detach()) * share
    return value.to(scores.dtype).expand(len(part))
