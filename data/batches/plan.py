"""The batch plan: which examples of which task make up step s.

The plan is a pure function of (seed, step, task). The global batch of a step does not depend on the number of
processes, each rank takes its slice of it, and a position in the data is one number, the step: resuming needs no
more than that, at any number of processes.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

Schedule = Literal["all", "round_robin", "proportional", "square_root", "annealed"]

_BLOCK = 1024  # steps whose tasks are drawn together


@dataclass(frozen=True)
class BatchPlan:
    """The order of the training data.

    `sizes`: training examples per task. `batch_size`: examples per task and optimizer step, over all processes; with a
    `power` that is their mean, and a task's own is ~ size ** power. `schedule` says which tasks a step trains:

    - `all`: every task in each step, which gradient surgery needs;
    - `round_robin`: one task a step, in turn;
    - `proportional`, `square_root`: one task a step, drawn with probability ~ size ** 1 or size ** 0.5;
    - `annealed`: drawn with probability ~ size ** a, a falling from 1 to 0.2 over `anneal_steps` (Stickland and
      Murray 2019, "BERT and PALs", section 4.1), so that the tasks end up trained almost equally.
    """

    sizes: Mapping[str, int]
    batch_size: int
    schedule: Schedule = "all"
    seed: int = 0
    anneal_steps: int = 1
    power: float = 0.0

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @cached_property
    def batch_sizes(self) -> dict[str, int]:
        """Examples of each task in a step that trains it: at least one, and `batch_size` in the mean over the tasks.
        What rounding leaves goes to those that it took most from."""
        total = self.batch_size * len(self.sizes)
        weights = np.asarray(list(self.sizes.values()), dtype=np.float64) ** self.power
        wanted = total * weights / weights.sum()
        counts = np.maximum(1, np.floor(wanted)).astype(np.int64)
        while counts.sum() != total:
            if counts.sum() < total:
                counts[np.argmax(wanted - counts)] += 1
            else:
                counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
        return dict(zip(self.names, counts.tolist()))

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which as many examples were seen as there are, all tasks together."""
        per_step = self.batch_size * (len(self.sizes) if self.schedule == "all" else 1)
        return -(-sum(self.sizes.values()) // per_step)

    def tasks(self, step: int) -> tuple[str, ...]:
        """The tasks that step `step` (from 0) trains."""
        if self.schedule == "all":
            return self.names
        if self.schedule == "round_robin":
            return (self.names[step % len(self.names)],)
        return (self.names[self._draws(step // _BLOCK)[step % _BLOCK]],)

    def position(self, task: str, step: int) -> int:
        """Examples of `task` that steps 0 to `step` - 1 consume."""
        index = self.names.index(task)
        if self.schedule == "all":
            visits = step
        elif self.schedule == "round_robin":
            visits = (step + len(self.names) - 1 - index) // len(self.names)
        else:
            block, rest = divmod(step, _BLOCK)
            visits = self._visits_before(block)[index] + int((self._draws(block)[:rest] == index).sum())
        return visits * self.batch_sizes[task]

    def rows(self, task: str, step: int) -> np.ndarray:
        """The global batch of a task that the step trains: (batch size,) row numbers of its training split.

        Rows run through one random permutation after another, so a batch may close one epoch of the task and open the
        next. Every batch is full, each epoch has every row once, and no batch has a row twice unless the task has fewer
        rows than the batch.
        """
        size, position, batch_size = self.sizes[task], self.position(task, step), self.batch_sizes[task]
        parts, wanted = [], batch_size
        while wanted:
            epoch, offset = divmod(position, size)
            part = _order(self.seed, task, epoch, size, batch_size)[offset : offset + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return np.concatenate(parts)

    def _draws(self, block: int) -> np.ndarray:
        """(1024,) index of the task of each step of a block."""
        return _draw_block(self.seed, block, tuple(self.sizes.values()), self.schedule, self.anneal_steps)

    def _visits_before(self, block: int) -> tuple[int, ...]:
        counts = np.zeros(len(self.names), dtype=np.int64)
        for earlier in range(block):
            counts += np.bincount(self._draws(earlier), minlength=len(self.names))
        return tuple(int(count) for count in counts)


def share(rows: np.ndarray, part: int, parts: int) -> np.ndarray:
    """The `part`-th of `parts` contiguous slices whose sizes differ by at most one; empty if there are too few rows."""
    return np.array_split(rows, parts)[part]


@lru_cache(maxsize=16)
def _order(seed: int, task: str, epoch: int, size: int, batch_size: int) -> np.ndarray:
    """The rows of an epoch of a task: a random permutation, in whose first batch those rows come last that close the
    epoch before in the same batch.

    Where two batches fill an epoch, its end is that of the permutation. In smaller ones the end may depend on the
    beginning, and that on the epoch before, back to one that begins with a batch.
    """
    first = epoch if size < batch_size else epoch - 1
    while batch_size <= size < 2 * batch_size and first > 0 and first * size % batch_size:
        first -= 1
    order = np.empty(0, np.int64)
    for number in range(max(first, 0), epoch + 1):
        filled = number * size % batch_size  # of the batch that the epoch begins in
        before, order = order, _generator(seed, zlib.crc32(task.encode()), number).permutation(size)
        if filled and len(before):
            head = order[:batch_size]
            used = np.isin(head, before[-filled:])
            order[:batch_size] = np.concatenate([head[~used], head[used]])
    return order


@lru_cache(maxsize=4096)
def _draw_block(seed: int, block: int, sizes: tuple[int, ...], schedule: Schedule, anneal_steps: int) -> np.ndarray:
    uniform = _generator(seed, zlib.crc32(b"tasks"), block).random(_BLOCK)
    if schedule == "annealed":
        progress = np.minimum((block * _BLOCK + np.arange(_BLOCK)) / max(1, anneal_steps), 1.0)
        exponent = 1.0 - 0.8 * progress
    else:
        exponent = np.full(_BLOCK, 1.0 if schedule == "proportional" else 0.5)
    share_of = np.asarray(sizes, dtype=np.float64)[None, :] ** exponent[:, None]
    upper = np.cumsum(share_of / share_of.sum(1, keepdims=True), axis=1)
    return np.minimum((uniform[:, None] >= upper).sum(1), len(sizes) - 1)


def _generator(*key: int) -> np.random.Generator:
    # Philox is counter-based: the stream is a function of the key alone, the same on every platform.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
