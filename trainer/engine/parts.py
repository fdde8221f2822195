"""What a process holds: shards of the gradient, and parts of the training state. Both are ranges of parameters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

# One entry per shard. None where a parameter had no part in the backward pass; counts as zero.
Gradient = list[Tensor | None]


@dataclass(frozen=True)
class Shard:
    """The coordinates that this process holds of a parameter: [start, start + length) of it, flattened."""

    name: str
    start: int
    length: int
    part: str  # of the model
    is_shared: bool  # whether that is the encoder's, which the tasks share


@dataclass(frozen=True)
class Block:
    """Gradients of the encoder's part `part`, of all T tasks, or of a head, of its own: `rows` is (T, n) or (1, n) fp32
    and has the coordinates of the shards number `first` to `last` - 1 one after the other, then zeros."""

    part: str
    rows: Tensor
    first: int
    last: int
    is_shared: bool

    def width(self, shards: Sequence[Shard]) -> int:
        """How many coordinates there are, without the zeros."""
        return sum(shard.length for shard in shards[self.first : self.last])

    def pieces(self, shards: Sequence[Shard], row: Tensor) -> list[Tensor]:
        """A vector like one of the rows, cut into those of the shards."""
        return list(row[: self.width(shards)].split([shard.length for shard in shards[self.first : self.last]]))


CHUNK = 1 << 14  # coordinates whose products are summed in fp32; blocks are a multiple of it wide


def padded(width: int) -> int:
    return -(-width // CHUNK) * CHUNK


def blocks_of(shards: Sequence[Shard], gradients: Sequence[Gradient], heads: Sequence[str]) -> list[Block]:
    """The blocks of T tasks' gradients; `heads` are the parts that are each task's own."""
    blocks, last = list[Block](), 0
    for part, own in groupby(shards, key=lambda shard: shard.part):
        first, last = last, last + len(list(own))
        wanted = (
            list(gradients) if shards[first].is_shared else [g for g, head in zip(gradients, heads) if head == part]
        )
        if not wanted or all(piece is None for gradient in wanted for piece in gradient[first:last]):
            continue
        width = sum(shard.length for shard in shards[first:last])
        device = next(piece.device for gradient in wanted for piece in gradient[first:last] if piece is not None)
        rows = torch.zeros(len(wanted), padded(width), device=device)
        blocks.append(Block(part, rows, first, last, shards[first].is_shared))
        for row, gradient in zip(rows, wanted):
            for target, piece in zip(blocks[-1].pieces(shards, row), gradient[first:last]):
                if piece is not None:
                    target.copy_(piece.flatten())
    return blocks


@dataclass(frozen=True)
class Part:
    """Range [start, start + length) of a flattened parameter, and its tensors there: kind -> (length,) fp32, to be read
    or written in place. Kinds are `weight`, AdamW's moments, and the names of the copies of the weights. `replicated`:
    every process holds the same range."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    replicated: bool

    @property
    def length(self) -> int:
        return len(next(iter(self.tensors.values())))

    def without(self, kinds: Iterable[str]) -> "Part":
        tensors = {kind: tensor for kind, tensor in self.tensors.items() if kind not in kinds}
        return replace(self, tensors=tensors)

    def slice(self, start: int, stop: int) -> "Part":
        """Coordinates [start, stop) of this part."""
        cut = {kind: tensor[start:stop] for kind, tensor in self.tensors.items()}
        return replace(self, start=self.start + start, tensors=cut)
