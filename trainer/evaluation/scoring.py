"""Scores and losses: every example predicted once, over all processes, the paper's metrics of the predictions, and the
tasks' own losses of the same outputs.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.errors import memory_trouble
from minbert.data.machine import free_memory
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.task import CORRELATIONS, Task
from minbert.trainer.feed import Feed
from minbert.trainer.objectives.coupled import pearson
from minbert.trainer.objectives.supervised import example_losses, predictions, scaled
from minbert.trainer.processes.world import World

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192
ASKED_EVERY = 32  # batches
LARGEST = sys.float_info.max
ROUNDING = 1e-6  # relative: a few units in the last place of fp32


@dataclass(frozen=True)
class Evaluation:
    """Of each task the score, and `overall`; and the `mean_loss` of each that has one."""

    scores: dict[str, float]
    losses: dict[str, float]


def predict(
    model, task: Task, split: TokenisedSplit, world: World, stop: Callable[[], bool] = lambda: False
) -> Tensor | None:
    """Predictions (n,) for a whole split, in its order, on every process; None if `stop` said so."""
    found = outputs(model, task, split, world, stop)
    return None if found is None else predictions(task, found)


def outputs(
    model, task: Task, split: TokenisedSplit, world: World, stop: Callable[[], bool] = lambda: False
) -> Tensor | None:
    """Raw outputs (n, outputs) for a whole split, in its order, on every process; `model` is anything called like the
    model.

    None if `stop` said so. It is asked before each batch; where processes must ask together and a batch is short, on
    GPUs, before each of `ASKED_EVERY` that they have.

    The split is ordered by length and cut into batches of similar token counts, which the processes share out and make
    ahead, as in training. Each writes its outputs into its rows of a matrix of zeros, and the sum over processes is the
    result: no padding of the split, no duplicates, one exchange. All processes run equally many batches, as sharded
    parameters demand. A process by itself whose memory does not suffice goes on with batches of half the tokens.
    """
    tokens = TOKENS_PER_BATCH
    while True:
        try:
            return _outputs(model, task, split, world, stop, tokens)
        except (MemoryError, RuntimeError) as error:
            if world.size > 1 or tokens <= max(split.lengths, default=0) or not memory_trouble(error):
                raise
        free_memory()  # of which the error held some
        tokens //= 2
        log.info("%s is scored in batches of %d tokens, as those of twice as many did not fit", task.name, tokens)


@torch.no_grad()
def _outputs(
    model, task: Task, split: TokenisedSplit, world: World, stop: Callable[[], bool], tokens: int
) -> Tensor | None:
    result = torch.zeros(len(split), task.outputs, device=world.device)
    chunks = _chunks(split, tokens)
    turns = -(-len(chunks) // world.size)
    chunks += [np.zeros(0, np.int64)] * (turns * world.size - len(chunks))

    def make(turn: int) -> Batch:
        rows = chunks[turn * world.size + world.rank]
        return make_batch({task.name: split}, {task.name: Portion(rows, rows, len(rows))})

    asked_every = ASKED_EVERY if world.size > 1 and world.device.type != "cpu" else 1
    with closing(Feed(make, world.device)) as feed:
        for turn in range(turns):
            if turn % asked_every == 0 and stop():
                return None
            batch, count = feed(turn, range(turn + 1, turns)), len(chunks[turn * world.size + world.rank])
            found = model(batch)[task.name]
            result.index_copy_(0, batch.tasks[task.name].places[:count], found[:count])
    return world.sum(result).cpu()


def evaluate(
    model,
    tasks: Iterable[Task],
    splits: Mapping[str, TokenisedSplit],
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """What a model, in evaluation mode, is worth on labelled splits; None if `stop` said so."""
    scores, losses = {}, {}
    for task in tasks:
        raw = outputs(model, task, splits[task.name], world, stop)
        if raw is None:
            return None
        labels = splits[task.name].labels
        assert labels is not None, task.name  # only test splits may lack them
        scores[task.name] = score(task, predictions(task, raw), labels)
        if (loss := mean_loss(task, raw, labels)) is not None:
            losses[task.name] = loss
    return Evaluation(scores | {"overall": overall(tasks, scores)}, losses)


def mean_loss(task: Task, raw: Tensor, labels: np.ndarray) -> float | None:
    """The task's own loss of a split's raw outputs (n, outputs), the mean over its examples: what training minimises,
    but without smoothed labels, auxiliary terms and, as the model is in evaluation mode, dropout.

    1 - r of the Pearson loss is that of all n at once, where training has the mean of many batches'. CoSENT has none:
    as a sum over pairs of examples it is larger of a split than of a batch, whatever the model. Without examples there
    is none either.
    """
    if not len(labels) or task.loss == "cosent":
        return None
    outputs, truth = raw.double(), torch.from_numpy(labels).double()
    if task.loss == "pearson":
        return float(pearson(scaled(task, outputs), truth))
    return float(example_losses(task, outputs, truth).mean())


def score(task: Task, predicted: Tensor, labels: np.ndarray) -> float:
    """The task's metric of its predictions, always a number.

    F1 is of the positive class of a binary task, and else the mean over the classes or the labels (macro); the accuracy
    of several labels counts examples of which all are right. What is constant, but for rounding, correlates with
    nothing, and neither does what is not finite: 0. So does a score without examples. Perplexity is exp of the mean
    over all hidden tokens, and what is not finite as high as a number can be.
    """
    truth = torch.from_numpy(labels).double()
    if not len(truth):
        return 0.0
    if task.metric == "perplexity":
        likelihood, count = predicted.double().sum(0)
        value = float((likelihood / count.clamp(min=1)).exp())
        return value if value < LARGEST else LARGEST  # also in the place of NaN
    if task.metric == "accuracy":
        right = predicted == truth
        return float((right if right.ndim == 1 else right.all(1)).double().mean())
    if task.metric in ("f1", "matthews"):
        from sklearn import metrics  # takes a second to import

        if task.metric == "matthews":
            return float(metrics.matthews_corrcoef(truth.numpy(), predicted.numpy()))
        if truth.shape[1:] == (1,):  # of a matrix scikit-learn would take the mean over its 0s and its 1s
            truth, predicted = truth[:, 0], predicted[:, 0]
        average = "macro" if task.kind == "classification" or truth.ndim == 2 else "binary"
        return float(metrics.f1_score(truth.numpy(), predicted.numpy(), average=average, zero_division=0))
    pair = torch.stack([predicted.double(), truth])
    spread = pair.amax(1) - pair.amin(1)
    if not pair.isfinite().all() or (spread <= ROUNDING * pair.abs().amax(1)).any():
        return 0.0
    if task.metric == "spearman":
        from scipy.stats import rankdata

        pair = torch.from_numpy(rankdata(pair.numpy(), axis=1))
    return float(torch.corrcoef(pair)[0, 1])


def beside(task: Task, predicted: Tensor, labels: np.ndarray) -> dict[str, float]:
    """What else there is to say of the predictions of ordered classes: the mean absolute error in classes, and the
    agreement beyond chance in which an error counts by its square (Cohen 1968, weighted kappa; 0 where all predictions
    and labels are one class)."""
    if not task.ordered or not len(labels):
        return {}
    truth, guess = torch.from_numpy(labels).double(), predicted.double()
    observed = (truth - guess).square().mean()
    # Of independent guesses with the same marginals: E (t - g)^2 = E t^2 - 2 E t E g + E g^2.
    expected = truth.square().mean() - 2 * truth.mean() * guess.mean() + guess.square().mean()
    kappa = 1 - observed / expected if expected > 0 else torch.zeros(())
    return {"mean_absolute_error": float((truth - guess).abs().mean()), "quadratic_kappa": float(kappa)}


def overall(tasks: Iterable[Task], scores: Mapping[str, float]) -> float:
    """The paper's overall score: the mean over the tasks that have a score, weighted by the tasks' weights, a
    correlation r counting as (r + 1) / 2 and a perplexity p as 1 / p. It is 0 if none of them has a weight."""
    parts = [(task.weight, share_of_best(task, scores[task.name])) for task in tasks if task.name in scores]
    total = sum(weight for weight, _ in parts)
    return sum(weight * score for weight, score in parts) / total if total else 0.0


def share_of_best(task: Task, score: float) -> float:
    """A task's score as a number from 0 to 1, the higher the better."""
    if task.metric == "perplexity":
        return 1 / score
    return (score + 1) / 2 if task.metric in CORRELATIONS else score


def count_batches(split: TokenisedSplit) -> int:
    """How often `outputs` asks for a stop in one process."""
    return len(_chunks(split, TOKENS_PER_BATCH))


def _chunks(split: TokenisedSplit, tokens: int) -> list[np.ndarray]:
    """Rows by descending length, cut where a batch reaches so many `tokens`: the largest batch comes first."""
    lengths = split.lengths
    order = np.argsort(-lengths, kind="stable")
    group = np.cumsum(lengths[order]) // tokens
    return np.split(order, np.flatnonzero(np.diff(group)) + 1)
