"""The tensors of a checkpoint: what a process writes of the training state, and how any process reads it back.

An engine lists the parts of the state that its process holds, each a range of a parameter with the weights, moments
and copies there. Writing takes every coordinate once, over all processes; reading fills each part from whatever files
hold pieces of its range. Files are in the safetensors format.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minbert.trainer.checkpoint.format import Damaged
from minbert.trainer.engine.parts import Part

CHUNK = 1 << 22  # bytes that are written in turn
_KEY = re.compile(r"(\w+)/(.+)\[(\d+):(\d+)\]")


def owned(parts: Iterable[Part], rank: int, size: int) -> list[Part]:
    """What `rank` writes: its own ranges, and an equal share of those that all processes hold."""
    parts = list(parts)
    total = sum(part.length for part in parts if part.replicated)
    first, last = total * rank // size, total * (rank + 1) // size
    chosen, position = [], 0
    for part in parts:
        start, stop = 0, part.length
        if part.replicated:
            start, stop = (min(max(edge - position, 0), part.length) for edge in (first, last))
            position += part.length
        if stop > start:
            chosen.append(part.slice(start, stop))
    return chosen


class Snapshot:
    """A copy of some parts and of small byte strings in memory, which the training goes on without.

    The memory is taken once and used again for every copy.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._tensors: dict[str, int] = {}  # key -> number of values, in the order of the memory
        self._bytes: dict[str, Tensor] = {}

    def take(self, parts: Sequence[Part], small: Mapping[str, Tensor]) -> None:
        """Copy; `small` are (n,) uint8 on the CPU."""
        sources = {
            f"{kind}/{part.name}[{part.start}:{part.start + part.length}]": tensor
            for part in parts
            for kind, tensor in part.tensors.items()
        }
        total = sum(map(len, sources.values()))
        on_gpu = any(tensor.is_cuda for tensor in sources.values())
        if len(self._memory) != total:
            self._memory = torch.empty(total, dtype=torch.float32, pin_memory=on_gpu)
        position = 0
        for tensor in sources.values():
            self._memory[position : position + len(tensor)].copy_(tensor, non_blocking=True)
            position += len(tensor)
        self._tensors = {key: len(tensor) for key, tensor in sources.items()}
        self._bytes = {key: tensor.clone() for key, tensor in small.items()}
        if on_gpu:
            torch.cuda.synchronize()

    def content(self) -> Iterator[memoryview]:
        """The copy as a safetensors file, chunk by chunk."""
        header, position = {}, 0
        for key, length in self._tensors.items():
            header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [position, position + 4 * length]}
            position += 4 * length
        for key, tensor in self._bytes.items():
            header[key] = {"dtype": "U8", "shape": [len(tensor)], "data_offsets": [position, position + len(tensor)]}
            position += len(tensor)
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        yield memoryview(len(described).to_bytes(8, "little") + described)
        for tensor in (self._memory, *self._bytes.values()):
            array: Any = tensor.numpy()  # a buffer, which its stubs do not say
            content = memoryview(array).cast("B") if len(tensor) else memoryview(b"")
            for start in range(0, len(content), CHUNK):
                yield content[start : start + CHUNK]


class ShardReader:
    """The tensors of all files of a checkpoint, as if they lay in one. A context manager."""

    def __init__(self, paths: Iterable[Path]):
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, str]]] = defaultdict(list)
        self._small: dict[str, int] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118
                if match := _KEY.fullmatch(key):
                    kind, name, start, stop = match.groups()
                    self._pieces[kind, name].append((int(start), int(stop), number, key))
                else:
                    self._small[key] = number

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()

    def fill(self, part: Part) -> None:
        """Read a part's tensors into it. Raises Damaged if the files do not hold all of its range."""
        for kind, tensor in part.tensors.items():
            stop, filled = part.start + part.length, 0
            for piece_start, piece_stop, number, key in self._pieces[kind, part.name]:
                first, last = max(part.start, piece_start), min(stop, piece_stop)
                if first < last:
                    values = self._files[number].get_slice(key)[first - piece_start : last - piece_start]
                    tensor[first - part.start : last - part.start].copy_(values)
                    filled += last - first
            if filled != part.length:
                raise Damaged(f"{kind} of {part.name} holds {filled} of the values {part.start} to {stop}")

    def holds(self, kind: str, name: str) -> bool:
        """Whether the files hold any of this kind of a parameter."""
        return (kind, name) in self._pieces

    def small(self, key: str) -> Tensor | None:
        """The byte string `key`, or None."""
        return self._files[self._small[key]].get_tensor(key) if key in self._small else None


def open_shards(paths: Iterable[Path]) -> ShardReader:
    """Raises Damaged where a file is no safetensors file."""
    try:
        return ShardReader(paths)
    except (OSError, SafetensorError) as error:
        raise Damaged(str(error)) from None
