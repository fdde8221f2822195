"""A tokenised split, and how its examples become the sequences that the encoder sees."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minbert.data.sequences.draw import Draw
from minbert.data.sequences.pairs import JointPairs, cut, join
from minbert.data.sequences.ragged import Ragged


@dataclass(frozen=True)
class Encoded:
    """B examples of a task as sequences, end to end: for each of `sides`, and therein for each of `readings`, those of
    all examples.

    A side is what the head sees beside others: a pair that is encoded sentence by sentence has two. Readings are
    versions of the whole example, whose outputs are averaged: both orders of a pair.

    `labels` are what the task's loss compares with, and None where there are none. They stand for the examples, (B,) or
    (B, classes); or for single tokens, if `tokens` (M,) says for which, counted through the sequences.
    """

    sequences: Ragged
    types: np.ndarray  # (N,) token types
    labels: np.ndarray | None  # float32; of tokens in the type that the loss takes
    sides: int = 1
    readings: int = 1
    tokens: np.ndarray | None = None
    weights: np.ndarray | None = None  # (B,) float32, of the examples' losses in the batch's; None: all 1


@dataclass(frozen=True)
class TokenisedSplit:
    """One split of one task, ready for batching. `columns` has one `Ragged` per sentence column of the task.

    Sentences of an example are encoded each for itself, unless `joint` says that they are a pair in one sequence.
    """

    ids: Sequence[str]
    columns: tuple[Ragged, ...]
    labels: np.ndarray | None  # (n,) float32, multilabel (n, classes); None where the split is unlabelled
    joint: JointPairs | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens that the encoder sees of each example at prediction."""
        lengths = [column.lengths for column in self.columns]
        if self.joint is None:
            return np.sum(lengths, axis=0)
        kept = cut(lengths[0] - 2, lengths[1] - 2, self.joint.max_length - 3)
        return (kept[0] + kept[1] + 3) * (2 if self.joint.symmetric else 1)

    def encode(self, rows: np.ndarray, draw: Draw | None = None) -> Encoded:
        """The examples of `rows` (B,) as the encoder is to see them. In training `draw` has random numbers for each of
        them; prediction has none.

        A joint pair of a symmetric task comes in a drawn order, and at prediction in both. Any other comes as written.
        """
        sentences = Ragged.concatenate([column.take(rows) for column in self.columns])
        labels = None if self.labels is None else self.labels[rows]
        if self.joint is None:
            return Encoded(sentences, np.zeros_like(sentences.ids), labels, sides=len(self.columns))
        first = np.arange(len(rows))
        second, readings = first + len(rows), 1
        if self.joint.symmetric and draw is None:
            first, second, readings = np.concatenate([first, second]), np.concatenate([second, first]), 2
        elif self.joint.symmetric and draw is not None:
            swapped = draw.uniform("order of a pair", 1)[:, 0] < 0.5
            first, second = np.where(swapped, second, first), np.where(swapped, first, second)
        pairs, types = join(sentences, first, second, self.joint.max_length)
        return Encoded(pairs, types, labels, readings=readings)

    def total(self, rows: np.ndarray, draw: Draw) -> int:
        """The sum of the weights of a global batch, `rows` with the random numbers of all of them: the number of
        examples, unless the weights are others."""
        return len(rows)

    def fingerprint(self) -> str:
        """Number of examples, and a digest of all that training sees of them: tokens and labels."""
        digest = hashlib.sha256()
        for column in self.columns:
            digest.update(np.ascontiguousarray(column.ids))  # type: ignore[arg-type]  # an array is a buffer
            digest.update(np.ascontiguousarray(column.offsets))  # type: ignore[arg-type]  # an array is a buffer
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels))  # type: ignore[arg-type]  # an array is a buffer
        return f"{len(self):,} examples, SHA-256 {digest.hexdigest()[:16]}"
