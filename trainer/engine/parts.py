"""What a process holds: shards of the gradient, and parts of the training state. Both are ranges of parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

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
