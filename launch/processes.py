"""One run as several processes on this machine: starts a worker per rank, watches them, and says how they ended.

The launcher trains nothing. It hosts the store at which the workers meet, forwards signals, tells which rank failed
first and why, and leaves no process behind, however it ends itself. A worker wraps its main in `record_errors`.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minbert.data.errors import OutOfMemory, UserError, machine_trouble
from minbert.slurm.verdict import TOLD, Error
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import leave_terminal, stop_signals

if TYPE_CHECKING:
    from torch.distributed import Store

ERROR_FILE = "MINBERT_ERROR_FILE"
POLL = 0.05  # seconds between two looks at the workers
GRACE = 4.0  # seconds that workers have to end by themselves after a failure
SAVING = 30.0  # seconds that they have if a checkpoint is being written that can still become whole
UNSEEN = 0.5  # seconds by which a death may be noticed late
TAIL = 20  # lines of the log shown for a worker that left no traceback

# Reads process groups from the launcher, one a line. Its input ends when the launcher is gone: then it kills them.
GUARD = 'while read -r group; do set -- "$@" "-$group"; done; kill -KILL "$@" 2>/dev/null'


@contextmanager
def record_errors() -> Iterator[None]:
    """Wraps a worker's main, as `with record_errors():` or as a decorator, and turns exceptions into exit codes.

    A `UserError` becomes its message and exit code 2 (88 where memory ran out), Ctrl-C becomes 130, any other exception
    its traceback and 1.
    Under `launch` the text is also left, whole or not at all, where the launcher finds it; rank 0 leaves its
    traceback to the launcher, which shares its terminal.

    Raises: SystemExit, in place of the exception.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.LEFT_AT_ONCE) from None
    except Exception as error:
        mistake = error if isinstance(error, UserError) else machine_trouble(error)
        if mistake is not None:
            code = ExitCode.OUT_OF_MEMORY if isinstance(mistake, OutOfMemory) else ExitCode.USER_MISTAKE
            _leave_error(code, str(mistake))
            with suppress(OSError):  # the log lies on the same disk
                _say(f"minbert: {mistake}")
            raise SystemExit(code) from None
        text = traceback.format_exc()
        if not _leave_error(ExitCode.FAILED, text) or os.environ.get("RANK") != "0":
            with suppress(OSError):
                _say(text.rstrip())
        raise SystemExit(ExitCode.FAILED) from error


def _leave_error(code: ExitCode, text: str) -> bool:
    """Writes the launcher's error file, stamped with this moment; returns False if no launcher asked for one or none
    can be written.

    It holds the exit code, as the process may yet hang or abort on its way out: communication libraries do.
    """
    if ERROR_FILE not in os.environ:
        return False
    now, path = time.time(), Path(os.environ[ERROR_FILE])
    unfinished = path.with_suffix(".error-tmp")
    try:
        unfinished.write_text(f"{code:d}\n{text}")
        os.utime(unfinished, (now, now))  # a file server's clock may differ from ours
        unfinished.replace(path)
    except OSError:  # a full disk, which may be the very error
        return False
    return True


@dataclass
class Worker:
    """One rank's process. It leads its own session: a terminal's Ctrl-C reaches it through the launcher only."""

    rank: int
    process: subprocess.Popen
    log: Path | None  # None: rank 0 writes to the launcher's terminal
    log_start: int  # where this run begins in the log
    error: Path
    status: int | None = None  # exit code, or minus the signal; None while it runs
    ended: float = 0.0
    stopped: bool = False  # by the launcher, because of another rank

    def running(self) -> bool:
        """Looks whether the process has ended, and then kills what it left of its process group."""
        if self.status is None and os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet: the number can't be anybody else's
            self.status, self.ended = self.process.wait(), time.time()
        return self.status is None

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)  # Popen's send_signal would reap it behind our back

    def in_trouble(self) -> bool:
        """Failed, or about to: a worker may hang on its way out after it wrote its error."""
        return self.status not in (None, ExitCode.FINISHED, ExitCode.INTERRUPTED) or self.error.exists()

    def guilt(self) -> tuple[int, float]:
        """Smallest for the one that failed first. Who tells of a lost connection was not, whatever the clocks say: its
        peer died. An abort without a word is how the communication libraries end a process whose peer is gone.
        """
        told = Error.read(self.error)
        consequence = told.lost_peer if told else self.status == -signal.SIGABRT
        return (2 if told else 1) * consequence, self.moment()

    def moment(self) -> float:
        """When it failed. A rank that dies breaks the others' connections: their exceptions may be on file before its
        death is noticed. So a death without an exception counts as earlier.
        """
        return self.error.stat().st_mtime if self.error.exists() else self.ended - UNSEEN

    def last_words(self) -> str:
        """Its error, or else the end of its log."""
        if self.error.exists():
            return self.error.read_text().partition("\n")[2].rstrip()
        if self.log is None:
            return "(no traceback; its output is above)"
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL:]) or "(no output)"


def launch(
    command: Sequence[str],
    processes: int,
    log_dir: Path,
    grace: float = GRACE,
) -> int:
    """Runs `command` in `processes` processes with the environment torch.distributed's `env://` expects.

    Rank 0 writes to this terminal, rank K to `log_dir/rank-K.log` (appended). The signals that ask to stop are
    forwarded once each, and the workers may take as long as they like to save; a third SIGINT or SIGTERM kills
    them. After a failure the other workers have `grace` seconds to end by themselves, and more only to finish a
    checkpoint of which the lost ones have written their part. Call it from the main thread.

    Args:
        command: program and arguments, the same for every rank.
        processes: number of workers on this machine, which are all there are.
        log_dir: folder for logs and errors; made if missing.
        grace: seconds from one worker's failure to the end of the others.

    Returns: an `ExitCode` the workers agree on, or the code (128 + signal) of the worker that failed first.
    Raises: UserError if `processes` is less than one.
    """
    if processes < 1:
        raise UserError(f"cannot start {processes} processes: ask for at least one")
    log_dir.mkdir(parents=True, exist_ok=True)
    store = _host_store()
    environment = _environment(processes, store.port)
    requests: list[int] = []

    def note(number: int, frame: object) -> None:
        leave_terminal(number)
        requests.append(number)

    handlers = {number: signal.signal(number, note) for number in stop_signals()}
    guard = subprocess.Popen(["/bin/sh", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True)
    workers: list[Worker] = []
    try:
        for rank in range(processes):
            workers.append(_start(command, rank, log_dir, environment))
            os.write(guard.stdin.fileno(), b"%d\n" % workers[-1].process.pid)
        forwarded = _watch(workers, requests, grace, store)
    finally:
        for worker in workers:
            if worker.running():
                os.killpg(worker.process.pid, signal.SIGKILL)
                worker.process.wait()
        guard.kill()
        guard.communicate()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return _outcome(workers, forwarded)


def _host_store():
    """A store on a free port that is ours from the start, so that runs on one machine cannot collide.

    Workers join it as clients because of TORCHELASTIC_USE_AGENT_STORE. It listens on the loopback interface only.
    """
    from torch.distributed import TCPStore  # takes seconds: not for those who only want `record_errors`

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _environment(processes: int, port: int) -> dict[str, str]:
    """What all workers share: defaults that the user's environment overrides, and the meeting point, which it can't."""
    import torch

    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "PYTHONFAULTHANDLER": "1",
        # The host's name may resolve to an address that is not reachable. gloo is there beside NCCL, too.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if processes > cores and not torch.cuda.is_available():
        _say(f"note: {processes} processes share {cores} cores")
    fixed = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(os.environ) | fixed


def _start(command: Sequence[str], rank: int, log_dir: Path, environment: Mapping[str, str]) -> Worker:
    error = log_dir / f"rank-{rank}.error"
    error.unlink(missing_ok=True)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(error.absolute())}
    log = log_dir / f"rank-{rank}.log" if rank else None
    output = log.open("ab") if log else None
    start = output.tell() if output else 0
    launcher, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_launcher() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it died before the call
            os._exit(ExitCode.FAILED)

    process = subprocess.Popen(
        command,
        env={**environment, **ranks},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_launcher,  # the store's thread runs no Python
    )
    if output:
        output.close()
    return Worker(rank, process, log, start, error)


def _watch(workers: Sequence[Worker], requests: list[int], grace: float, store: "Store") -> list[int]:
    """Returns when every worker has ended; the result is the signals forwarded on the user's request."""
    from minbert.trainer.processes.messages import completes_checkpoint

    forwarded: list[int] = []
    deadline = latest = None
    while alive := [worker for worker in workers if worker.running()]:
        time.sleep(POLL)
        while requests:
            forwarded.append(requests.pop(0))
            if sum(number in (signal.SIGINT, signal.SIGTERM) for number in forwarded) > 2:
                forwarded.append(signal.SIGKILL)
            for worker in alive:
                worker.send(forwarded[-1])
        now = time.monotonic()
        if deadline is None and any(worker.in_trouble() for worker in workers):
            deadline, latest = now + grace, now + SAVING
        elif deadline is not None and now < latest:
            lost = [worker.rank for worker in workers if worker not in alive or worker.error.exists()]
            if completes_checkpoint(store, lost):
                deadline = now + grace
        if deadline is not None and now > deadline:
            for worker in alive:
                worker.stopped = True
                worker.send(signal.SIGKILL)  # blocked in a collective operation, it would not hear another one
    return forwarded


def _outcome(workers: Sequence[Worker], forwarded: Sequence[int]) -> int:
    """The run's exit code; says what failed, if something did."""
    codes = {worker.rank: _code(worker, forwarded) for worker in workers}
    harmless = (ExitCode.FINISHED, ExitCode.INTERRUPTED)
    suspects = (worker for worker in workers if worker.error.exists() or not worker.stopped)
    failed = [worker for worker in suspects if codes[worker.rank] not in harmless]
    if not failed:
        return max(codes.values())
    first = min(failed, key=Worker.guilt)
    code = codes[first.rank]
    if code in TOLD and codes[0] != code:  # rank 0 would have told the user itself
        _say(f"minbert: (rank {first.rank}) {first.last_words()}")
    elif code not in (*TOLD, ExitCode.LEFT_AT_ONCE):
        _report(first, code, [worker for worker in workers if worker is not first], codes)
    return code if code >= 0 else 128 - code


def _code(worker: Worker, forwarded: Sequence[int]) -> int:
    """Its status, unless its error says more; a death by a signal the user sent, at whatever moment, is leaving."""
    if worker.error.exists():
        return int(worker.error.read_text().partition("\n")[0])
    return ExitCode.LEFT_AT_ONCE if -worker.status in forwarded else worker.status


def _report(first: Worker, code: int, others: Sequence[Worker], codes: Mapping[int, int]) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a killed progress bar leaves it hidden
    _say(f"{show_cursor}\nrank {first.rank} of {len(codes)} failed{' first' if others else ''}: {_ending(code)}")
    for line in first.last_words().splitlines():
        _say(f"  {line}")
    if first.log:
        _say(f"log: {first.log}")
    for worker in others:
        _say(f"then rank {worker.rank}: {'stopped' if worker.stopped else _ending(codes[worker.rank])}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (often the system ran out of memory: use fewer processes or smaller batches)"
    return f"killed by {name}" + (hint if -code == signal.SIGKILL else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
