"""Where each process of a run stands, in a small file of its own: `logs/rank-K.json`.

metrics.jsonl has the numbers of whole steps, every few of them. Who watches from elsewhere wants more: how fast it
goes, and, if it does not go on, which process waits for which. A thread writes the file every few seconds. It looks at
the process from outside, so that it can tell where the code is even while that waits; if the whole process stands
still, the age of the file says so.
"""

import os
import resource
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from pydantic import TypeAdapter, ValidationError

from minbert.data.files import to_json
from minbert.data.reading import parse_json, read_small

EVERY = 5.0  # seconds between two looks
SILENT = 30.0  # seconds without one, after which the process itself seems to stand still
HANGS = 300.0  # seconds without a step, of which at least so many times a step's own time,
SLOW = 20.0  # after which something seems wrong

# What a process does, by the outermost of our modules that says it.
ACTIVITIES = {
    "minbert.trainer.evaluation": "evaluating",
    "minbert.trainer.checkpoint": "saving",
    "minbert.trainer.run.saving": "saving",
    "minbert.trainer.step": "training",
    "minbert.trainer.engine": "training",
}

# Where a process may wait for others: gradients are reduced in the backward pass, out of Python's sight.
COLLECTIVE = ("torch.distributed", "torch.autograd")
WAIT_FOR_GRADIENTS = ("minbert.trainer.engine.one_backward", "_wait")


@dataclass
class Standing:
    """Of one process, at the moment `written`; moments are seconds since the epoch by its own clock."""

    rank: int
    processes: int
    host: str
    pid: int
    began: float  # when this start of the run had everything in memory,
    first_step: int  # at this step
    total_steps: int
    step: int = 0  # done
    moved: float = 0.0  # when that was done
    activity: str = ""
    place: str = ""  # in the code
    waits: bool = False  # for other processes
    memory: int = 0  # bytes: on a GPU the most that was reserved there, else of the process
    peak: float = 0.0  # matrix products of this process: FLOP a second
    written: float = 0.0
    ended: bool = False
    age: float = 0.0  # seconds since it was written, by the clock of the reader and of the file system

    def seconds_left(self, total: int, since: float = 0.0) -> float | None:
        """Until `total` steps are done, evaluations and saves on the way included, `since` seconds after it was
        written; None before the first steps."""
        done = self.step - self.first_step
        if done < 1 or self.moved <= self.began:
            return None
        each = (self.moved - self.began) / done
        return max(0.0, (total - self.step) * each - (self.written - self.moved) - since)

    @property
    def still(self) -> float:
        """Seconds without a step."""
        return self.written - max(self.moved, self.began) + self.age

    def hangs(self, patience: float = HANGS) -> bool:
        """Whether there was no step for longer than anything that a run does should take."""
        each = (self.moved - self.began) / max(1, self.step - self.first_step)
        return not self.ended and self.still > max(patience, SLOW * each)


class Heartbeat:
    """Writes the standing of this process into `folder` as long as the block lasts."""

    def __init__(self, folder: Path, standing: Standing):
        self.folder, self.standing = folder, standing
        self.thread = threading.get_ident()
        self._end = threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="standing", daemon=True)

    def __enter__(self) -> "Heartbeat":
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("rank-*.json") if self.standing.rank == 0 else ():
                if int(path.stem.removeprefix("rank-")) >= self.standing.processes:  # of an earlier start with more
                    path.unlink()
        self._writer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._writer.join()
        self.standing.ended, self.standing.place, self.standing.waits = True, "", False
        self._write()

    def moved(self, step: int) -> None:
        self.standing.step, self.standing.moved = step, time.time()

    def _write_on(self) -> None:
        self._write()
        while not self._end.wait(EVERY):
            frame = sys._current_frames().get(self.thread)
            if frame is not None:
                standing = self.standing
                standing.activity, standing.place, waits = describe(frame)
                standing.waits = waits and standing.processes > 1
            self._write()

    def _write(self) -> None:
        self.standing.memory, self.standing.written = memory(), time.time()
        path = self.folder / f"rank-{self.standing.rank}.json"
        unfinished = path.with_suffix(".json-tmp")
        with suppress(OSError):  # a full disk: nobody needs this file to go on
            unfinished.write_text(to_json(asdict(self.standing)) + "\n")
            unfinished.replace(path)  # whole or not at all; it need not survive a power cut


def describe(frame: FrameType) -> tuple[str, str, bool]:
    """What the code at `frame` is doing, where that is, and whether it may be waiting for other processes."""
    activity, place, collective = "", "", ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(COLLECTIVE):
            collective = collective or frame.f_code.co_name.replace("_engine_run_backward", "backward")
        if module.startswith("minbert."):
            if not place:
                file = "/".join(Path(frame.f_code.co_filename).parts[-module.count(".") :])
                place = f"{file}:{frame.f_lineno}, {collective or frame.f_code.co_name}"
                name = frame.f_code.co_name
                if module == "minbert.trainer.processes.messages" or (module, name) == WAIT_FOR_GRADIENTS:
                    collective = name
            activity = next((word for known, word in ACTIVITIES.items() if module.startswith(known)), activity)
        frame = frame.f_back  # type: ignore[assignment]
    return activity, place, bool(collective)


def memory() -> int:
    """Bytes that this process has taken: the most on its GPU, or in main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def here(rank: int, processes: int, step: int, total_steps: int) -> Standing:
    """Of this process, which begins now."""
    now = time.time()
    return Standing(rank, processes, socket.gethostname(), os.getpid(), now, step, total_steps, step=step, moved=now)


_ADAPTER = TypeAdapter(Standing)


def read_standing(path: Path) -> Standing | None:
    """None if there is no such file, or something else in it."""
    try:
        found = _ADAPTER.validate_python(parse_json(read_small(path, 1 << 16)))
        found.age = max(0.0, time.time() - path.stat().st_mtime)
    except (OSError, ValueError, ValidationError):
        return None
    return found


def read_standings(logs: Path) -> list[Standing]:
    """Of all processes of the run whose logs lie in the folder, by rank."""
    found = [read_standing(path) for path in logs.glob("rank-*.json")]
    return sorted((standing for standing in found if standing), key=lambda standing: standing.rank)
