"""A batch in one piece of memory, so that it goes to a device in one copy: its tensors there are views of that.

A batch has a dozen small tensors. Each copy from the host costs a GPU more than what it carries, and one from memory
that is not pinned makes the host wait.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minbert.data.batches.batch import Batch


@dataclass(frozen=True)
class Packed:
    """A batch, of whose tensors `buffer` (bytes,) uint8 holds the values, the wider types first: so each is aligned."""

    batch: "Batch"
    buffer: Tensor

    @staticmethod
    def of(batch: "Batch", device: torch.device) -> "Packed":
        """Pack a batch on the host as `device` will want it; in pinned memory if it is a GPU."""
        batch = batch.fit_for(device)
        tensors = _by_width(batch)
        # Pinned memory is kept by PyTorch's own allocator and used again once the copy from it is through.
        size = sum(tensor.nbytes for tensor in tensors)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for view, tensor in zip(_views(buffer, tensors), tensors, strict=True):
            view.copy_(tensor)
        return Packed(batch, buffer)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`. On a GPU the copy is behind the work that waits there, and the host goes on."""
        tensors = _by_width(self.batch)
        views = _views(self.buffer.to(device, non_blocking=True), tensors)
        moved = dict(zip(map(id, tensors), views, strict=True))
        return _mapped(self.batch, lambda tensor: moved[id(tensor)])


def _by_width(batch: "Batch") -> list[Tensor]:
    """The batch's tensors, those of one type side by side."""
    found: dict[int, Tensor] = {}
    _mapped(batch, lambda tensor: found.setdefault(id(tensor), tensor))
    return sorted(found.values(), key=lambda tensor: (-tensor.itemsize, str(tensor.dtype)))


def _views(buffer: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Pieces of `buffer` of the types and shapes of the tensors `like`: few operations, of which none computes."""
    start, kinds = 0, dict.fromkeys(tensor.dtype for tensor in like)
    for kind in kinds:
        own = [tensor for tensor in like if tensor.dtype == kind]
        sizes = [tensor.numel() for tensor in own]
        stop = start + sum(sizes) * kind.itemsize
        for piece, tensor in zip(buffer[start:stop].view(kind).split(sizes), own, strict=True):
            yield piece if tensor.ndim == 1 else piece.view(tensor.shape)
        start = stop


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with `change` made to every tensor in it, in a fixed order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value
