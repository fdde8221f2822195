"""Batches made ahead: a thread makes those that the loop will ask for next while a device works on the present ones.

What a batch holds is a pure function of what it is asked for by (a step, tasks, a part), so it may be made at any time:
nothing is consumed by making it, a run that is resumed asks for the same, and one that nobody asks for is forgotten.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import torch

from minbert.data.batches.batch import Batch
from minbert.data.batches.packing import Packed

AHEAD = 2  # batches: one for the next call, and one for a call that comes while that is made

Key = TypeVar("Key", bound=Hashable)


class Feed(Generic[Key]):
    """Gives the batches that `make` makes of keys, on `device`; on a CPU as they are, elsewhere by one copy each.

    An error in the making is raised where the batch is asked for. The thread ends on `close`, or when nobody holds the
    feed any more.
    """

    def __init__(self, make: Callable[[Key], Batch], device: torch.device, ahead: int = AHEAD):
        self.make, self.device, self.ahead = make, device, ahead
        self._made: dict[Key, Future[Batch | Packed]] = {}
        # Each thread has a current GPU of its own, in whose name it pins memory.
        setting = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "batches", *setting)

    def __call__(self, key: Key, following: Iterable[Key] = ()) -> Batch:
        """The batch of `key`; those of the keys `following` are begun."""
        own = self._made.pop(key, None)
        wanted = list(islice(following, self.ahead))
        for other in self._made.keys() - set(wanted):
            self._made.pop(other).cancel()
        for other in wanted:
            if other not in self._made:
                self._made[other] = self._thread.submit(_prepared, self.make, other, self.device)
        made = own.result() if own else _prepared(self.make, key, self.device)  # a signal's handler runs meanwhile
        return made.to(self.device) if isinstance(made, Packed) else made

    def each(self, keys: Iterable[Key]) -> Iterator[Batch]:
        """The batches of all `keys`, in order."""
        keys = list(keys)
        for number, key in enumerate(keys):
            yield self(key, keys[number + 1 :])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._made.clear()


def _prepared(make: Callable[[Key], Batch], key: Key, device: torch.device) -> Batch | Packed:
    batch = make(key)
    return batch if device.type == "cpu" else Packed.of(batch, device)
