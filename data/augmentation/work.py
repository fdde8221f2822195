"""The missing translations, cut into units and shared out to this machine's devices.

A unit is translated by whoever claims it first, in this command or in another one beside it, and becomes one shard. The
units of the same texts are the same everywhere, so the elements of a job array take every n-th and need not talk.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from minbert.data.augmentation.recipe import Recipe
from minbert.data.augmentation.round_trip import Model, RoundTrip
from minbert.data.augmentation.store import Store
from minbert.data.errors import UserError

UNIT = 256  # texts: what a kill may cost
PATIENCE = 1.0  # seconds before somebody else's unit is looked at again

Progress = Callable[[int], None]  # gets the number of texts that were just translated


@dataclass(frozen=True)
class Unit:
    recipe: Recipe
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Workshop:
    """What a worker needs besides its device. `root`: of the stores."""

    root: Path
    model: Model
    batch_size: int = 32


def units(texts: Sequence[str], recipes: Sequence[Recipe]) -> list[Unit]:
    """All there is to do, whether it was done or not."""
    texts = list(dict.fromkeys(texts))
    return [
        Unit(recipe, tuple(texts[start : start + UNIT])) for recipe in recipes for start in range(0, len(texts), UNIT)
    ]


def missing(root: Path, work: Sequence[Unit]) -> list[tuple[Unit, int]]:
    """The units that are not done, with the number of texts that they lack."""
    stores = {recipe: Store(root, recipe) for recipe in {unit.recipe for unit in work}}
    counted = [(unit, len(stores[unit.recipe].missing(unit.texts))) for unit in work]
    return [(unit, count) for unit, count in counted if count]


def local_devices(model: Model, processes: int | None = None) -> list[str]:
    """A device for each process: all GPUs; without any, one process, and by rules one for each core."""
    if model.on_gpu:
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return [f"cuda:{index % count}" for index in range(processes or count)]
        return ["cpu"] * (processes or 1)
    return ["cpu"] * (processes or len(os.sched_getaffinity(0)))


def translate(workshop: Workshop, work: Sequence[Unit], devices: Sequence[str], progress: Progress) -> None:
    """Translate `work`, units that are `missing`, in this process or in one for each device. Raises UserError."""
    if not work:
        return
    if len(devices) == 1 or len(work) == 1:
        _translate_here(workshop, work, devices[0], progress)
    else:
        _translate_apart(workshop, work, devices[: len(work)], progress)


class Worker:
    """A model on a device, and what it finds in the stores."""

    def __init__(self, workshop: Workshop, device: str):
        self.root = workshop.root
        self.round_trip = RoundTrip(workshop.model, device, workshop.batch_size)
        self._stores: dict[Recipe, Store] = {}

    def __call__(self, unit: Unit) -> int | None:
        """Texts of the unit that were missing and are translated now; None if somebody else is at it."""
        if unit.recipe not in self._stores:
            self._stores[unit.recipe] = Store(self.root, unit.recipe)
        store = self._stores[unit.recipe]
        with store.claim(unit.name) as ours:
            if not ours:
                return None
            if texts := store.missing(unit.texts):
                store.add(self.round_trip(texts, unit.recipe))
            return len(texts)

    def close(self) -> None:
        self.round_trip.close()


def _translate_here(workshop: Workshop, work: Sequence[Unit], device: str, progress: Progress) -> None:
    worker = Worker(workshop, device)
    try:
        queue = deque(work)
        while queue:
            unit = queue.popleft()
            count = worker(unit)
            if count is None:
                queue.append(unit)
                time.sleep(PATIENCE)
            else:
                progress(count)
    finally:
        worker.close()


def _translate_apart(workshop: Workshop, work: Sequence[Unit], devices: Sequence[str], progress: Progress) -> None:
    """One process per device. Each gets its next unit with the answer to the last, and ends when we do."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and devices
    threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
    processes = []
    for device in devices:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, workshop, device, threads), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))
    try:
        _hand_out({connection: process for process, connection in processes}, deque(work), progress)
    finally:
        for process, connection in processes:
            connection.close()
            process.terminate()
        for process, _ in processes:
            process.join()


def _hand_out(workers: dict[Connection, Any], queue: deque[Unit], progress: Progress) -> None:
    held: dict[Connection, Unit] = {}
    busy = dict.fromkeys(workers, False)
    while queue or held:
        for connection in workers:
            if queue and connection not in held:
                held[connection] = queue.popleft()
                connection.send((held[connection], PATIENCE if busy[connection] else 0.0))
        for ready in wait(list(held)):
            connection = cast(Connection, ready)
            try:
                kind, answer = connection.recv()
            except EOFError:
                workers[connection].join()
                raise UserError(_how_it_ended(workers[connection].exitcode)) from None
            if kind == "mistake":
                raise UserError(answer)
            if kind == "error":
                raise RuntimeError(f"a process that translates failed:\n{answer}")
            unit, busy[connection] = held.pop(connection), answer is None
            if answer is None:
                queue.append(unit)
            else:
                progress(answer)


def _serve(connection: Connection, workshop: Workshop, device: str, threads: int) -> None:
    """What a process does: unit after unit, until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command, which ends us
    try:
        if workshop.model.on_gpu:
            import torch

            torch.set_num_threads(threads)
        worker = Worker(workshop, device)
        for unit, pause in _received(connection):
            time.sleep(pause)
            connection.send(("done", worker(unit)))
        worker.close()
    except UserError as error:
        connection.send(("mistake", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def _received(connection: Connection) -> Iterator[tuple[Unit, float]]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ": often the system ran out of memory; fewer --processes or a smaller --batch-size take less"
        return f"a process that translates was killed by signal {-code}{hint if code == -signal.SIGKILL else ''}. " + (
            "What it had translated is kept; the same command goes on."
        )
    return f"a process that translates ended with exit code {code}; the same command goes on"
