"""A batch: what the model sees in one forward pass, of all tasks together, made whole on the host.

Rows of each task's split become sequences (`split`), all sequences one matrix of tokens with its layout (`layout`), and
beside that stand each task's labels and weights. What is random in them is drawn here as well (`draw`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minbert.data.batches.layout import Sentences
from minbert.data.batches.packing import Packed
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.ragged import Ragged
from minbert.data.sequences.split import Encoded, TokenisedSplit


@dataclass(frozen=True)
class Portion:
    """Of a task's global batch, of `global_size`, the examples at `places` (n,): the `rows` (n,) of its split.

    Several processes, and the parts of an accumulated step, have a portion each.
    """

    rows: np.ndarray
    places: np.ndarray
    global_size: int

    @staticmethod
    def whole(rows: np.ndarray) -> "Portion":
        return Portion(rows, np.arange(len(rows)), len(rows))


@dataclass(frozen=True)
class TaskBatch:
    """A task's part of a batch: B examples, each with a sequence for each of `sides` in each of `readings`.

    `weights` are 1 for an example, or as its split says, and 0 for a filler, which exists only so that a process
    without examples can take part in collective operations. `global_size` is their sum over all processes: losses are
    averaged by it. The task's sequences are numbered from `first` on: by side, then by reading, then by example.
    """

    labels: Tensor  # (B,) float32, multilabel (B, classes); of tokens (M,) int64
    weights: Tensor  # (B,) float32
    places: Tensor  # (B,) int64, of the examples in the task's global batch
    numbers: Tensor  # (B,) int64, of the examples in the task's split
    global_size: int
    sides: int
    readings: int
    first: int
    rows: Tensor | None = None  # (M,) int64, of the tokens that have labels, in the batch's matrix

    def __len__(self) -> int:
        """Examples, B."""
        return len(self.weights)

    @property
    def sequences(self) -> int:
        """How many of the batch's sequences are the task's."""
        return self.sides * self.readings * len(self)


@dataclass(frozen=True)
class Batch:
    """This process's part of a step: every task's sequences as one matrix of tokens, and what belongs to each task."""

    sentences: Sentences
    tasks: dict[str, TaskBatch]

    @property
    def tokens(self) -> int:
        return len(self.sentences.input_ids)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, by one copy."""
        return self if device.type == "cpu" else Packed.of(self, device).to(device)

    def fit_for(self, device: torch.device) -> "Batch":
        """The batch with what attention on `device` needs; it stays where it is."""
        layout = self.sentences.layout.fit_for(device)
        return replace(self, sentences=replace(self.sentences, layout=layout))

    def only(self, names: Collection[str]) -> "Batch":
        """The batch of some of its tasks, whose tokens are those of this one in the same order. Of a batch on a device
        it is made there, without a look at it."""
        layout, tasks, first, dropped = self.sentences.layout, dict[str, TaskBatch](), 0, 0
        chosen = [number for number, name in enumerate(self.tasks) if name in names]
        for number, (name, part) in enumerate(self.tasks.items()):
            if number not in chosen:
                dropped += layout.tokens[number]
                continue
            rows = None if part.rows is None else part.rows - dropped
            tasks[name], first = replace(part, first=first, rows=rows), first + part.sequences
        ids, types = (
            torch.cat([of.split(layout.tokens)[number] for number in chosen])
            for of in (self.sentences.input_ids, self.sentences.token_type_ids)
        )
        own = layout.only(chosen, [part.sequences for part in self.tasks.values()])
        return Batch(Sentences(ids, types, own), tasks)


def make_batch(
    splits: Mapping[str, TokenisedSplit], portions: Mapping[str, Portion], draw: tuple[int, int] | None = None
) -> Batch:
    """The batch of the tasks' portions, in their order, on the CPU. A portion without rows becomes one filler.

    In training `draw` is (seed, step), and each split's `encode` gets a `Draw` for its examples: random numbers that
    are a pure function of (seed, task, step, place in the global batch). Whatever is random in an example is made of
    them there, on the host: the order of a pair, or which tokens are masked. The batch holds the outcome (input ids
    already replaced, labels of single tokens with their `rows` in the matrix), so that it is the same at every number
    of processes and parts. Prediction draws nothing.
    """
    encoded: dict[str, Encoded] = {}
    for name, portion in portions.items():
        rows, places = (portion.rows, portion.places) if len(portion.rows) else (np.zeros(1, np.int64),) * 2
        encoded[name] = splits[name].encode(rows, Draw(draw[0], name, draw[1], places) if draw else None)
    sequences = Ragged.concatenate([part.sequences for part in encoded.values()])
    types = np.concatenate([part.types for part in encoded.values()])
    sentences = Sentences.lay(sequences, types, [len(part.sequences) for part in encoded.values()])
    tasks: dict[str, TaskBatch] = {}
    first = 0
    for name, part in encoded.items():
        tasks[name] = _task_batch(part, portions[name], sentences, sequences.offsets, first)
        first += len(part.sequences)
    return Batch(sentences, tasks)


def _task_batch(part: Encoded, portion: Portion, sentences: Sentences, offsets: np.ndarray, first: int) -> TaskBatch:
    weights = torch.ones(len(portion.rows)) if part.weights is None else torch.from_numpy(part.weights)
    if not len(portion.rows):
        weights = torch.zeros(1)
    labels = torch.zeros(len(weights)) if part.labels is None else torch.from_numpy(part.labels)
    rows = None
    if part.tokens is not None:
        token = offsets[first] + part.tokens  # counted through all sequences
        sequence = np.searchsorted(offsets, token, side="right") - 1
        rows = sentences.layout.starts[torch.from_numpy(sequence)] + torch.from_numpy(token - offsets[sequence])
    nothing = torch.zeros(1, dtype=torch.int64)
    places, numbers = (torch.from_numpy(of) if len(portion.rows) else nothing for of in (portion.places, portion.rows))
    return TaskBatch(labels, weights, places, numbers, portion.global_size, part.sides, part.readings, first, rows)
