"""Small messages between the processes of a run, with waits that are bounded and say who is missing.

They travel through the store at which the processes met, not through the collective operations: a background thread
can send them while the training step communicates, and a wait that fails knows whose message it lacks.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store

FAREWELL = 60.0  # seconds
_CHECKPOINT = "minbert/checkpoint"  # the topic of the one being written, or nothing


class LostProcess(RuntimeError):
    """Another process of the run did not answer in time."""


class Messages:
    """What one process sends and receives. Every topic is used once; values are anything that JSON holds.

    One object serves one thread: `clone` gives another thread a connection of its own. `timeout`: seconds that rank 0
    waits for the others; they wait longer for it, so that it can tell them whom it missed.
    """

    def __init__(self, store: Store | None, rank: int, size: int, timeout: float):
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        if store is not None and size > 1:
            store.set(f"minbert/host/{rank}", socket.gethostname())

    def clone(self) -> "Messages":
        copy = object.__new__(Messages)
        shared: Any = self.store  # its `clone` is in no stubs
        copy.store = shared.clone() if shared is not None and self.size > 1 else None
        copy.rank, copy.size, copy.timeout = self.rank, self.size, self.timeout
        return copy

    def gather(self, topic: str, value: Any) -> list[Any] | None:
        """Every process's value in the order of ranks, on rank 0; None elsewhere. Raises LostProcess on rank 0."""
        if self.size == 1:
            return [value]
        if self.rank:
            self._shared.set(f"minbert/{topic}/{self.rank}", json.dumps(value))
            return None
        deadline = time.monotonic() + self.timeout
        others = {rank: self._receive(f"{topic}/{rank}", deadline) for rank in range(1, self.size)}
        if missing := [rank for rank, other in others.items() if other is None]:
            names = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in missing)
            error = f"waited {self.timeout:g} s for {names} ({topic})"
            self._shared.set(f"minbert/{topic}/shared", json.dumps({"lost": error}))  # the others wait for this
            raise LostProcess(error)
        return [value, *(json.loads(other) for other in others.values() if other is not None)]

    def share(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value, on every process. Raises LostProcess if rank 0 sends nothing, or missed somebody before."""
        if self.size == 1:
            return value
        if self.rank == 0:
            self._shared.set(f"minbert/{topic}/shared", json.dumps({"value": value}))
            return value
        # Longer than rank 0 waits for the others, so that it can say whom it missed.
        received = self._receive(f"{topic}/shared", time.monotonic() + 1.2 * self.timeout + 10)
        message = {"lost": f"no word from rank 0 ({topic})"} if received is None else json.loads(received)
        if "lost" in message:
            raise LostProcess(message["lost"])
        return message["value"]

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Every process's value in the order of ranks, on every process."""
        return self.share(topic, self.gather(topic, value))

    def announce_checkpoint(self, topic: str) -> None:
        """Tell who watches the processes that rank 0 waits for them to report under `topic`, or, if that is empty, that
        it does so no more."""
        if self.size > 1 and self.rank == 0:
            self._shared.set(_CHECKPOINT, topic)

    def farewell(self) -> None:
        """The last word of a process that ends well. Rank 0, which may host the store, stays until it has heard all."""
        if self.size > 1:
            self.timeout = min(self.timeout, FAREWELL)
            with contextlib.suppress(LostProcess, DistStoreError):
                self.gather("farewell", None)

    @property
    def _shared(self) -> Store:
        assert self.store is not None  # several processes have met at one
        return self.store

    def _receive(self, key: str, deadline: float) -> bytes | None:
        """The message under `key`, or None if it does not come before the deadline."""
        left = deadline - time.monotonic()
        try:
            if left > 0:
                self._shared.wait([f"minbert/{key}"], timedelta(seconds=left))
            return self._shared.get(f"minbert/{key}") if self._shared.check([f"minbert/{key}"]) else None
        except DistStoreError:
            return None

    def _host(self, rank: int) -> str:
        key = f"minbert/host/{rank}"
        return self._shared.get(key).decode() if self._shared.check([key]) else "an unknown host"


def completes_checkpoint(store: Store, lost: Iterable[int]) -> bool:
    """Whether a checkpoint is being written of which the `lost` processes, which use `store`, have done their part."""
    topic = store.get(_CHECKPOINT).decode() if store.check([_CHECKPOINT]) else ""
    return bool(topic) and all(rank and store.check([f"minbert/{topic}/{rank}"]) for rank in lost)
