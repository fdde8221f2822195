"""What a run's best model answers on its dev splits, example by example, and what the answers amount to.

A classifier's answer is a probability for each class; its largest is the confidence. The numbers here are the page's:
the confusion matrix, how well confidence and accuracy agree, and which examples the model gets most wrong.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minbert.data.sources.examples import Examples
from minbert.data.task import Split, Task
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.scoring import beside, outputs, score
from minbert.trainer.objectives.supervised import example_losses, predictions
from minbert.trainer.processes.world import World, pick_device
from minbert.trainer.run.data import load_examples_of, tokenise_as
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import load_model

BINS = 15


@dataclass(frozen=True)
class Answers:
    """Of one task, n examples: `predicted` (n,) classes or similarities, of several labels (n, C) 0 or 1; `losses` (n,)
    as in training; and `probabilities` (n, C) of a classifier's classes or of each label, None of a regression."""

    task: Task
    examples: Examples
    predicted: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray | None

    @property
    def labels(self) -> np.ndarray:
        return self.examples.labels

    @property
    def confidence(self) -> np.ndarray:
        """(n,) probability of the predicted class."""
        return self.probabilities.max(1)

    @property
    def correct(self) -> np.ndarray:
        right = self.predicted == self.labels
        return right if right.ndim == 1 else right.all(1)

    @property
    def score(self) -> float:
        return score(self.task, torch.from_numpy(self.predicted), self.labels)

    @property
    def metric(self) -> str:
        """The score with its name, in words."""
        words = {"accuracy": "Accuracy", "f1": "F1", "matthews": "Matthews correlation"}
        name = words.get(self.task.metric, self.task.metric.capitalize() + " correlation")
        more = beside(self.task, torch.from_numpy(self.predicted), self.labels)
        return ", ".join([f"{name} {self.score:.3f}", *(f"{key.replace('_', ' ')} {more[key]:.3f}" for key in more)])

    def worst(self, most: int) -> np.ndarray:
        """Row numbers of the mistakes with the highest loss, the worst first; of a regression, the largest errors."""
        order = np.argsort(-self.losses, kind="stable")
        return order[:most] if self.probabilities is None else order[~self.correct[order]][:most]


def answers(run: RunFolder, config: RunConfig, split: Split = "dev") -> list[Answers]:
    """Every task's answers on the split that `config` describes, from one process; but a masked language model answers
    nothing.

    Raises UserError if there is no model yet, or no data where the configuration says.
    """
    world = World(0, 1, pick_device(config.parallel))
    model, tokenizer, _ = load_model(run, world.device)
    found = []
    for task in config.corpus.tasks:
        if task.kind == "masked_lm":
            continue
        examples = load_examples_of(config, task.name, split)
        tokenised = tokenise_as(config, examples, tokenizer)
        raw = outputs(model, task, tokenised, world)
        losses = example_losses(task, raw, torch.from_numpy(tokenised.labels)).numpy()
        found.append(Answers(task, examples, predictions(task, raw).numpy(), losses, probabilities(task, raw)))
    return found


@dataclass(frozen=True)
class Calibration:
    """Answers in bins of equal width by confidence: each bin's `counts`, mean `confidence` and `accuracy` (NaN where it
    is empty), and the expected calibration error."""

    edges: np.ndarray  # (bins + 1,)
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Reliability of the top answer (Guo et al. 2017, equations 2 and 3): bin m holds the confidences in
    ((m - 1) / bins, m / bins]; the error is the mean over bins, weighted by count, of |accuracy - confidence|."""
    place = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(place, confidence, minlength=bins) / counts
        accuracy = np.bincount(place, correct, minlength=bins) / counts
    filled = counts > 0
    error = float((counts[filled] * np.abs(accuracy - means)[filled]).sum() / counts.sum())
    return Calibration(np.linspace(0, 1, bins + 1), counts, means, accuracy, error)


def probabilities(task: Task, raw: torch.Tensor) -> np.ndarray | None:
    if task.kind == "regression":
        return None
    if task.kind == "binary":
        positive = torch.sigmoid(raw[:, 0])
        return torch.stack([1 - positive, positive], 1).numpy()
    if task.kind == "multilabel":
        return torch.sigmoid(raw).numpy()
    return torch.softmax(raw, -1).numpy()
