"""What a process holds: shards of the gradient, and parts of the training state. Both are ranges of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

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
class Part:
    """Range [start, start + length) of a flattened parameter, and its tensors there: kind -> (length,) fp32, to be read
    or written in place. `replicated`: every process holds the same range."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    replicated: bool

    @property
    def length(self) -> int:
        return len(self.tensors["weight"])

    def slice(self, start: int, stop: int) -> "Part":
        """Coordinates [start, stop) of this part."""
        return Part(
            self.name,
            self.start + start,
            {kind: tensor[start:stop] for kind, tensor in self.tensors.items()},
            self.replicated,
        )
