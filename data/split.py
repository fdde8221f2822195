"""A tokenised split, and how its examples become the sequences that the encoder sees."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minbert.data.draw import Draw
from minbert.data.ragged import Ragged


@dataclass(frozen=True)
class Encoded:
    """B examples of a task as sequences, end to end: for each of `sides`, one after the other, those of all examples.

    `labels` are what the task's loss compares with, and None where there are none. They stand for the examples, (B,) or
    (B, classes); or for single tokens, if `tokens` (M,) says for which, counted through the sequences.
    """

    sequences: Ragged
    types: np.ndarray  # (N,) token types
    labels: np.ndarray | None  # float32; of tokens in the type that the loss takes
    sides: int = 1
    tokens: np.ndarray | None = None
    weights: np.ndarray | None = None  # (B,) float32, of the examples' losses in the batch's; None: all 1


@dataclass(frozen=True)
class TokenisedSplit:
    """One split of one task, ready for batching. `columns` has one `Ragged` per sentence column of the task."""

    ids: Sequence[str]
    columns: tuple[Ragged, ...]
    labels: np.ndarray | None  # (n,) float32, multilabel (n, classes); None where the split is unlabelled

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens that the encoder sees of each example."""
        return np.sum([column.lengths for column in self.columns], axis=0)

    def encode(self, rows: np.ndarray, draw: Draw | None = None) -> Encoded:
        """The examples of `rows` (B,) as the encoder is to see them. In training `draw` has random numbers for each of
        them; prediction has none."""
        sequences = Ragged.concatenate([column.take(rows) for column in self.columns])
        labels = None if self.labels is None else self.labels[rows]
        return Encoded(sequences, np.zeros_like(sequences.ids), labels, sides=len(self.columns))

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
