"""Sequences without padding: what the encoder sees in one pass, and where each of them lies.

Padding is wasted arithmetic: a batch of the three tasks padded to its longest sentence is more than half padding. Here
a batch of S sequences is one matrix of N real tokens, in the order in which the encoder's layers work on them. All that
must be known of that order is worked out here, on the host, when the batch is made; the forward pass only looks it up.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minbert.data.sequences.ragged import Ragged


@dataclass(frozen=True)
class Layout:
    """Where S sequences, which keep their numbers 0 to S - 1, lie in a matrix of N tokens, the shortest first.

    On a CPU those of equal length share one call of attention without a mask: no padding at all, and small calls are
    cheap there. On a GPU few large calls win: attention alone is padded to the longest sequence, with a mask, and
    `cells` and `mask` are there.
    """

    groups: list[tuple[int, int]]  # (number of sequences, their length), from the first token to the last
    starts: Tensor  # (S,) int64, the row of each sequence's first token: its [CLS]
    lengths: Tensor  # (S,) int64
    sequence: Tensor  # (N,) int64, the number of each token's sequence
    position: Tensor  # (N,) int64, its place therein
    cells: Tensor | None = None  # (N,) int64, its cell in the (S, L) rectangle
    mask: Tensor | None = None  # (S, 1, 1, L) bool, where that rectangle has a token

    @staticmethod
    def of(lengths: np.ndarray) -> "Layout":
        """The layout of sequences of these lengths, by number. Raises ValueError if there are none."""
        if not len(lengths):
            raise ValueError("a batch needs at least one sequence")
        by_length = np.argsort(lengths, kind="stable")
        ordered = lengths[by_length]
        first = np.cumsum(ordered) - ordered
        starts = np.empty_like(first)
        starts[by_length] = first
        position = np.arange(ordered.sum()) - np.repeat(first, ordered)
        sizes, counts = np.unique(ordered, return_counts=True)
        arrays = starts, np.asarray(lengths, np.int64), np.repeat(by_length, ordered), position
        return Layout(list(zip(counts.tolist(), sizes.tolist())), *map(torch.from_numpy, arrays))

    def __len__(self) -> int:
        return sum(count for count, _ in self.groups)

    def padded(self) -> "Layout":
        """The same with attention padded to the longest sequence."""
        longest = self.groups[-1][1]
        mask = (torch.arange(longest) < self.lengths[:, None])[:, None, None, :]
        return replace(self, cells=self.sequence * longest + self.position, mask=mask)

    def padded_for(self, device: torch.device) -> "Layout":
        """The layout as attention on `device` wants it; it stays where it is."""
        return self if device.type == "cpu" or self.cells is not None else self.padded()

    def to(self, device: torch.device) -> "Layout":
        """`padded_for` the device, and there."""
        if device.type == "cpu":
            return self
        padded = self.padded_for(device)
        names = ("starts", "lengths", "sequence", "position", "cells", "mask")
        return replace(padded, **{name: getattr(padded, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class Sentences:
    """S sequences as N tokens: `input_ids` and `token_type_ids` are (N,) int64, row by row as `layout` has them."""

    input_ids: Tensor
    token_type_ids: Tensor
    layout: Layout

    @staticmethod
    def lay(tokens: Ragged, types: np.ndarray) -> "Sentences":
        """Lay out sequences that stand end to end, with the types (N,) of their tokens."""
        layout = Layout.of(tokens.lengths)
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
