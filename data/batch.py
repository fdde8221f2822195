"""Sentences laid end to end without padding, and the batches made of them.

Padding is wasted arithmetic: a batch of the three tasks padded to its longest sentence is more than half padding.
Here a batch of S sentences is one row of N tokens and the S lengths; the encoder works on real tokens only.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Sentences:
    """S sentences as N tokens end to end: `input_ids` and `token_type_ids` are (N,) int64, `lengths` has S numbers.

    The lengths stay Python integers, because they decide shapes and must be known without asking a device.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> "Sentences":
        return Sentences(
            self.input_ids.to(device, non_blocking=True),
            self.token_type_ids.to(device, non_blocking=True),
            self.lengths,
        )

    @staticmethod
    def from_padded(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> "Sentences":
        """Drop the padding of (S, L) inputs. The mask must be 1 for a sentence's first tokens and 0 after them."""
        mask = attention_mask.bool()
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return Sentences(input_ids[mask], token_type_ids[mask], mask.sum(1).tolist())

    @staticmethod
    def concatenate(parts: "list[Sentences]") -> "Sentences":
        return Sentences(
            torch.cat([part.input_ids for part in parts]),
            torch.cat([part.token_type_ids for part in parts]),
            [length for part in parts for length in part.lengths],
        )


@dataclass
class Ragged:
    """A tokenised column: `ids[offsets[i]:offsets[i + 1]]` are the tokens of sentence i."""

    ids: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (n + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Sentences:
        """The sentences of `rows`, in that order."""
        starts, lengths = self.offsets[rows], self.lengths[rows]
        ends = np.cumsum(lengths)
        # Position of each token in `ids`: its sentence's start plus its place within the sentence.
        where = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        input_ids = torch.from_numpy(self.ids[where].astype(np.int64))
        return Sentences(input_ids, torch.zeros_like(input_ids), lengths.tolist())


@dataclass
class TokenisedSplit:
    """One split of one task, ready for batching. `columns` has one `Ragged` per sentence column of the task."""

    ids: list[str]
    columns: tuple[Ragged, ...]
    labels: np.ndarray | None  # (n,) float32, multilabel (n, classes); None where the split is unlabelled

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Number of examples, and a digest of all that training sees of them: tokens and labels."""
        digest = hashlib.sha256()
        for column in self.columns:
            digest.update(np.ascontiguousarray(column.ids))  # type: ignore[arg-type]  # an array is a buffer
            digest.update(np.ascontiguousarray(column.offsets))  # type: ignore[arg-type]  # an array is a buffer
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels))  # type: ignore[arg-type]  # an array is a buffer
        return f"{len(self):,} examples, SHA-256 {digest.hexdigest()[:16]}"


@dataclass
class Batch:
    """This process's part of a task's batch.

    `sentences` holds what the encoder sees of an example side by side: the B first sides, then the B second ones, if
    there are two. `weights` (B,) are 1 for
    an example and 0 for a filler, which exists only so that a process without examples can take part in collective
    operations. `global_size` counts the real examples over all processes: losses are averaged by it.
    """

    sentences: Sentences
    labels: Tensor  # (B,) float32, multilabel (B, classes)
    weights: Tensor  # (B,) float32
    global_size: int

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def sides(self) -> int:
        """How many sequences of an example the encoder sees: two of a pair that is encoded sentence by sentence."""
        return len(self.sentences.lengths) // len(self)

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.sentences.to(device), self.labels.to(device), self.weights.to(device), self.global_size)


def make_batch(split: TokenisedSplit, rows: np.ndarray, global_size: int) -> Batch:
    """The examples `rows` of a split. No rows at all gives one filler of weight 0."""
    weights = torch.ones(len(rows)) if len(rows) else torch.zeros(1)
    if not len(rows):
        rows = np.zeros(1, dtype=np.int64)
    labels = np.zeros(len(rows), np.float32) if split.labels is None else split.labels[rows]
    sentences = Sentences.concatenate([column.take(rows) for column in split.columns])
    return Batch(sentences, torch.from_numpy(labels), weights, global_size)
