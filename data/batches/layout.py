"""Sequences without padding: what the encoder sees in one pass, and where each of them lies.

Padding is wasted arithmetic: a batch of the three tasks padded to its longest sentence is more than half padding. Here
a batch of S sequences is one matrix of N real tokens, in the order in which the encoder's layers work on them. All that
must be known of that order is worked out here, on the host, when the batch is made; the forward pass only looks it up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minbert.data.sequences.ragged import Ragged


@dataclass(frozen=True)
class Layout:
    """Where S sequences, which keep their numbers 0 to S - 1, lie in a matrix of N tokens: task by task, and of each
    the shortest first.

    So the rows of a task are consecutive, and its share in the gradient of a matrix is one product of slices.

    On a CPU a task's sequences of equal length share one call of attention without a mask: no padding at all, and small
    calls are cheap there. On a GPU few large calls win: one for all sequences, which a kernel tells apart by their
    `offsets`, or, where there is no such kernel, over a rectangle padded to the longest, by `cells` and `mask`. All
    three are there then.
    """

    groups: list[tuple[int, int]]  # (number of sequences, their length), from the first token to the last
    starts: Tensor  # (S,) int64, the row of each sequence's first token: its [CLS]
    lengths: Tensor  # (S,) int64
    sequence: Tensor  # (N,) int64, the number of each token's sequence
    position: Tensor  # (N,) int64, its place therein
    tokens: tuple[int, ...]  # how many of the N are each task's, in their order
    ends: Tensor  # (tasks,) int32, the row behind each task's last
    offsets: Tensor | None = None  # (S + 1,) int32, the row of each sequence's first token, in their order, and N
    cells: Tensor | None = None  # (N,) int64, its cell in the (S, L) rectangle
    mask: Tensor | None = None  # (S, 1, 1, L) bool, where that rectangle has a token

    @staticmethod
    def of(lengths: np.ndarray, counts: Sequence[int] | None = None) -> "Layout":
        """The layout of sequences of these lengths, by number: the first `counts[0]` of them are those of the first
        task, and so on; all of one where that is not given. Raises ValueError if there are none."""
        if not len(lengths):
            raise ValueError("a batch needs at least one sequence")
        counts = [len(lengths)] if counts is None else list(counts)
        task = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((lengths, task))  # stable
        ordered = lengths[order]
        first = np.cumsum(ordered) - ordered
        starts = np.empty_like(first)
        starts[order] = first
        position = np.arange(ordered.sum()) - np.repeat(first, ordered)
        begins = np.flatnonzero(np.diff(ordered, prepend=0) | np.diff(task, prepend=-1))  # of the groups
        groups = list(zip(np.diff(begins, append=len(ordered)).tolist(), ordered[begins].tolist()))
        tokens = np.bincount(task, lengths, len(counts)).astype(np.int64)
        return Layout(
            groups,
            torch.from_numpy(starts),
            torch.from_numpy(np.asarray(lengths, np.int64)),
            torch.from_numpy(np.repeat(order, ordered)),
            torch.from_numpy(position),
            tuple(tokens.tolist()),
            torch.from_numpy(np.cumsum(tokens).astype(np.int32)),
        )

    def only(self, tasks: Sequence[int], counts: Sequence[int]) -> "Layout":
        """That of the sequences of the `tasks` with these numbers, in order, where the tasks have `counts` sequences.
        It is where this is, and made of what the host knows."""
        last, ends = np.cumsum(counts), np.cumsum([count for count, _ in self.groups])
        groups = [group for group, task in zip(self.groups, np.searchsorted(last, ends).tolist()) if task in tasks]
        tokens = tuple(self.tokens[task] for task in tasks)
        # How far a task's rows and numbers move up.
        rows, numbers = (
            {task: sum(of[:task]) - sum(of[other] for other in tasks if other < task) for task in tasks}
            for of in (self.tokens, list(counts))
        )

        def pieces(tensor: Tensor, sizes: Sequence[int], shifts: dict[int, int] | None = None) -> Tensor:
            parts = tensor.split(list(sizes))
            return torch.cat([parts[task] - shifts[task] if shifts else parts[task] for task in tasks])

        own = Layout(
            groups,
            pieces(self.starts, counts, rows),
            pieces(self.lengths, counts),
            pieces(self.sequence, self.tokens, numbers),
            pieces(self.position, self.tokens),
            tokens,
            pieces(self.ends, [1] * len(counts), rows),
        )
        if self.mask is None:
            return own
        assert self.offsets is not None
        offsets = torch.cat([pieces(self.offsets[:-1], counts, rows), own.ends[-1:]])
        mask = pieces(self.mask, counts)[..., : own.longest]
        return replace(own, offsets=offsets, cells=own.sequence * own.longest + own.position, mask=mask)

    def __len__(self) -> int:
        return sum(count for count, _ in self.groups)

    @cached_property
    def longest(self) -> int:
        return max(length for _, length in self.groups)

    def in_one(self) -> "Layout":
        """The same for attention over all sequences in one call."""
        lengths = np.repeat([length for _, length in self.groups], [count for count, _ in self.groups])
        offsets = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
        mask = (torch.arange(self.longest) < self.lengths[:, None])[:, None, None, :]
        return replace(self, offsets=offsets, cells=self.sequence * self.longest + self.position, mask=mask)

    def fit_for(self, device: torch.device) -> "Layout":
        """The layout as attention on `device` wants it; it stays where it is."""
        return self if device.type == "cpu" or self.cells is not None else self.in_one()

    def to(self, device: torch.device) -> "Layout":
        """`fit_for` the device, and there."""
        if device.type == "cpu":
            return self
        fit = self.fit_for(device)
        names = ("starts", "lengths", "sequence", "position", "ends", "offsets", "cells", "mask")
        return replace(fit, **{name: getattr(fit, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class Sentences:
    """S sequences as N tokens: `input_ids` and `token_type_ids` are (N,) int64, row by row as `layout` has them."""

    input_ids: Tensor
    token_type_ids: Tensor
    layout: Layout

    @staticmethod
    def lay(tokens: Ragged, types: np.ndarray, counts: Sequence[int] | None = None) -> "Sentences":
        """Lay out sequences that stand end to end, so many of each task, with the types (N,) of their tokens."""
        layout = Layout.of(tokens.lengths, counts)
        order = tokens.offsets[layout.sequence.numpy()] + layout.position.numpy()
        columns = [torch.from_numpy(array[order].astype(np.int64)) for array in (tokens.ids, types)]
        return Sentences(columns[0], columns[1], layout)

    @staticmethod
    def from_padded(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> "Sentences":
        """Drop the padding of (S, L) inputs. The mask must be 1 for a sentence's first tokens and 0 after them."""
        layout = Layout.of(attention_mask.sum(1).cpu().numpy()).to(input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        where = layout.sequence, layout.position
        return Sentences(input_ids[where], token_type_ids[where], layout)
