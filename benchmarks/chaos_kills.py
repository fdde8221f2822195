"""The ways in which the chaos benchmark kills or disturbs a run, and how it sees from outside where the run stands.

A life is one start of a run. What its processes do is told from what any user could see: the process table, the
signals they catch, the folders that come and go, and the files that are opened.
"""

import ctypes
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from minbert.data.files import lock
from minbert.trainer.checkpoint.format import newest_step as newest_in
from minbert.trainer.checkpoint.format import published
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import LOCK, RunFolder

IN_OPEN, NAME_MAX, EVENT = 0x20, 256, struct.Struct("iIII")  # inotify(7): an event is followed by a name


class Ended(Exception):
    """The run ended before the moment of its kill came."""


@dataclass(frozen=True)
class Course:
    """How an undisturbed life goes: seconds until its first step, of all steps, and after the last one."""

    steps: int
    starting: float
    training: float
    ending: float


class Life:
    """One start of a run: the launcher, and its processes."""

    def __init__(self, run: RunFolder, process: subprocess.Popen, processes: int, course: Course):
        self.run, self.process, self.processes, self.course = run, process, processes, course
        self.resumed_from = newest_step(run)
        self.started = time.monotonic()
        self.struck: float | None = None  # seconds after the start
        self.all_caught = False  # whether all processes caught signals when they were struck
        self._family: list[psutil.Process] = []
        self._leftovers = set(self._unfinished())
        self._logged = self._log_time()

    def trained(self) -> bool:
        """Whether it got as far as the log, at least to take up its thread."""
        return self._log_time() != self._logged

    def step(self) -> int:
        """The last step that it logged."""
        return max((record["step"] for record in self.run.read_metrics()), default=0) if self.trained() else 0

    def wait(self, rng: random.Random) -> None:
        """Sleep until a random moment, any one of this life being as likely as any other; not at all if it is past.
        Raises Ended.

        While it trains, time is told by its steps, as others may be using the machine.
        """
        course, before = self.course, self.resumed_from
        pace = course.training / course.steps
        moment = rng.uniform(0, course.starting + pace * (course.steps - before) + course.ending)
        if moment < course.starting:
            self.sleep(self.started + moment - time.monotonic())
            return
        steps, rest = divmod(moment - course.starting, pace)
        goal = min(course.steps, before + int(steps))
        while self.step() < max(goal, 1):
            self.must_be_here()
            time.sleep(0.02)
        self.sleep(rest + pace * (before + int(steps) - goal))

    def sleep(self, seconds: float) -> None:
        """Raises Ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.must_be_here()
            time.sleep(min(left, 0.05))

    def must_be_here(self) -> None:
        if self.process.poll() is not None:
            raise Ended

    def ranks(self) -> list[psutil.Process]:
        """The processes that train; waits until all have started."""
        if self.processes == 1:
            return [psutil.Process(self.process.pid)]
        while True:
            self.must_be_here()
            found = [child for child in self._children() if _is_worker(child)]
            if len(found) == self.processes:
                return found
            if self._family and found:
                return found  # some have ended already
            self._family = found or self._family
            time.sleep(0.02)

    def strike(self, number: int, *targets: psutil.Process) -> None:
        """Send a signal to some processes; without any, to all of them, the launcher first."""
        self.must_be_here()
        launcher, children = psutil.Process(self.process.pid), self._children()
        ranks = [child for child in children if _is_worker(child)] if self.processes > 1 else [launcher]
        self.all_caught = len(ranks) == self.processes and all(map(_catches_sigterm, [launcher, *ranks]))
        self._family, self.struck = children, round(time.monotonic() - self.started, 3)
        for target in targets or [launcher, *children]:
            try:
                os.kill(target.pid, number)
            except ProcessLookupError:
                continue

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Its processes stand still inside, so that as much of it is left afterwards as was before. The launcher, which
        owns the folder, is the first to stop. Raises Ended."""
        self.must_be_here()
        launcher = psutil.Process(self.process.pid)  # at worst a zombie: nobody else takes note of its end
        stopped = [launcher]
        try:
            os.kill(launcher.pid, signal.SIGSTOP)
            while launcher.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(0.001)
            for child in self._children():
                with suppress(psutil.NoSuchProcess):
                    child.suspend()
                    stopped.append(child)
            yield
        finally:
            for process in reversed(stopped):
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def new_unfinished(self) -> Path | None:
        """The checkpoint that is being written."""
        return next((path for path in self._unfinished() if path not in self._leftovers), None)

    def wait_for_end(self, seconds: float) -> int:
        """The launcher's exit code. Raises TimeoutError if it, or one of its processes after it, does not end."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.strike(signal.SIGKILL)
            self.process.wait()
            raise TimeoutError(f"the launcher did not end within {seconds:.0f} s") from None
        _, alive = psutil.wait_procs(self._family, timeout=10)
        for process in alive:
            process.kill()
        if alive:
            raise TimeoutError(f"{len(alive)} processes outlived the launcher by 10 s")
        return code

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            raise Ended from None

    def _unfinished(self) -> list[Path]:
        return list(self.run.checkpoints.glob("*.unfinished"))

    def _log_time(self) -> int:
        return self.run.metrics_file.stat().st_mtime_ns if self.run.metrics_file.exists() else 0


def kill_one_rank(life: Life, rng: random.Random) -> None:
    life.wait(rng)
    life.strike(signal.SIGKILL, rng.choice(life.ranks()))


def kill_all(life: Life, rng: random.Random) -> None:
    life.wait(rng)
    life.strike(signal.SIGKILL)


def ask_to_stop(life: Life, rng: random.Random) -> None:
    life.wait(rng)
    life.strike(signal.SIGTERM, psutil.Process(life.process.pid))


def ask_twice(life: Life, rng: random.Random) -> None:
    ask_to_stop(life, rng)
    time.sleep(rng.uniform(0, 0.3))
    if life.process.poll() is None:
        life.process.send_signal(signal.SIGTERM)


def kill_while_saving(life: Life, rng: random.Random) -> None:
    """As the n-th name appears in a checkpoint's unfinished folder, or as that gets its own name."""
    life.wait(rng)
    names, last = rng.randint(0, life.processes + 2), None
    while True:
        unfinished = life.new_unfinished()
        if last is not None and unfinished != last:
            break
        if unfinished is not None and len(_names(unfinished)) >= names:
            break
        last = unfinished
        life.must_be_here()
        time.sleep(0.0005)
    life.strike(signal.SIGKILL, *([rng.choice(life.ranks())] if rng.random() < 0.5 else []))


def kill_while_loading(life: Life, rng: random.Random) -> None:
    """As the n-th file of the newest checkpoint is opened, or as the run takes up its log."""
    # Each rank reads the manifest twice, its share of the files to verify them, all shards, and the aggregator.
    opens = rng.randint(1, 4 * life.processes + life.processes**2 + 1)
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_CLOEXEC)
    try:
        folder = published(life.run.checkpoints)[-1]
        if libc.inotify_add_watch(events, os.fsencode(folder), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")
        while opens > 0 and not life.trained():
            life.must_be_here()
            if select.select([events], [], [], 0.01)[0]:
                content = os.read(events, EVENT.size + NAME_MAX)
                while content:
                    length = EVENT.unpack_from(content)[-1]
                    content = content[EVENT.size + length :]
                    opens -= 1
    finally:
        os.close(events)
    life.strike(signal.SIGKILL, *([rng.choice(life.ranks())] if rng.random() < 0.5 else []))


OTHER = ("--lr", "0.5", "--train-limit", "30", "--force")  # what would change the run's rates and vocabulary
PREPARED = ("config.yaml", "environment.json", "code.diff", "encoder/config.json", "encoder/vocab.txt")


def start_again(life: Life, rng: random.Random, *command: str) -> list[str]:
    """Start the run once more while it trains: that must be refused, and change nothing. Returns what is wrong."""
    life.wait(rng)
    while not life.trained():  # from then on the folder is its own
        life.must_be_here()
        time.sleep(0.01)
    before = [(life.run.path / name).read_bytes() for name in PREPARED]
    words = [*(command or ("train",)), "--run", str(life.run.path), *OTHER]
    with life.frozen():
        if not _is_locked(life.run.path / LOCK):
            raise Ended
        again = subprocess.run([sys.executable, "-m", "minbert.launch.main", *words], capture_output=True, text=True)
    wrong = []
    if again.returncode != ExitCode.USER_MISTAKE or "is being trained by another process" not in again.stderr:
        wrong.append(f"`{words[0]}` was not refused: exit code {again.returncode}: {again.stderr}")
    changed = [name for name, old in zip(PREPARED, before) if (life.run.path / name).read_bytes() != old]
    return wrong + [f"`{words[0]}` changed {name}" for name in changed]


def _is_locked(path: Path) -> bool:
    try:
        os.close(lock(path))
    except BlockingIOError:
        return True
    return False


def submit_again(life: Life, rng: random.Random) -> list[str]:
    return start_again(life, rng, "submit", "--executor", "local")


LOADING = "while loading"  # makes sense where there is something to load
# After the last two the life goes on, and may be killed as well.
KINDS: dict[str, Callable[[Life, random.Random], list[str] | None]] = {
    "SIGKILL, one rank": kill_one_rank,
    "SIGKILL, all": kill_all,
    "SIGTERM": ask_to_stop,
    "SIGTERM twice": ask_twice,
    "while saving": kill_while_saving,
    LOADING: kill_while_loading,
    "second start": start_again,
    "second submit": submit_again,
}


def newest_step(run: RunFolder) -> int:
    """Of its checkpoints; 0 without any."""
    return newest_in(run.checkpoints)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "minbert.launch.worker" in process.cmdline()
    except psutil.Error:
        return False


def _catches_sigterm(process: psutil.Process) -> bool:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)
