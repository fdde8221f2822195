"""Ray, as a search needs it: a cluster of its own on this machine or allocation, or one that exists.

A cluster of its own belongs to nobody else: a token that only its processes know, free ports, a short temporary folder
named by user and search, no dashboard, no usage statistics. Its processes have sessions of their own: signals that a
terminal or a job manager sends to this process's group are this process's business. It dies with the process that
started it, however that ends. Ray reads its settings from the environment when it is imported, so nothing may import it
before they are there.
"""

import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from minbert.data.errors import UserError
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import stop_signals

# Ray replaces 127.0.0.1 by an address that other machines reach; another one of the loopback interface it leaves.
LOOPBACK = "127.0.0.2"
HEAD = ("gcs_server", "raylet")
POLL = 0.5  # seconds between two looks at the head
KNOCK_EVERY, KNOCKS, KNOCK_PATIENCE = 2.0, 3, 3.0  # seconds, times and seconds until a head elsewhere counts as lost
NODE_PATIENCE = 120.0  # seconds for a node to start a worker and import this program
OBJECT_STORE = 100 * 2**20  # bytes: what passes through it are a few numbers

# Reads the folder, and the sessions of Ray's processes, one a line. Its input ends when the cluster has ended, or the
# process that started it is gone: then it kills what is left of them, and removes the folder.
GUARD = """
import os, shutil, signal, sys, time

def members(sessions):
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if session in sessions and state != "Z":
            yield int(entry)

folder, *sessions = sys.stdin.read().splitlines()
deadline = time.monotonic() + 10
while (left := list(members(sessions))) and time.monotonic() < deadline:
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.05)
shutil.rmtree(folder, ignore_errors=True)
"""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Tune does not survive that Ray ends a worker for want of memory; when the system does so the trial goes on.
    "RAY_memory_monitor_refresh_ms": "0",
    # A worker is started for a trial, not one for every core in advance: Python with Ray takes each half a second.
    "RAY_prestart_worker_first_driver": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folder logs everything
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the search's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # heartbeats have no score
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the search tells them itself
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # Ray's own record of the search is not used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextmanager
def start_cluster(
    folder: Path,
    lost: Callable[[], NoReturn],
    cpus: int | None = None,
    node: str = LOOPBACK,
) -> Iterator[str]:
    """Start Ray for the search in `folder`, with this process as its driver; yields the address for further nodes.

    `lost` is called, in a thread, when Ray's head has died: nothing works then but to end this process and start anew.
    `node`: this node's IP address, as the others reach it. Raises UserError if Ray does not start.
    """
    os.environ.update(SETTINGS)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    _remove_leftovers(folder)
    temporary = temporary_folder(folder)
    make_private(temporary)
    if cpus is None and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        cpus = len(os.sched_getaffinity(0))
    # What Ray starts inherits the mask: a batch system warns all processes of a job, and only the search is to hear it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    with _guard(temporary) as watch:
        try:
            with _sessions_of_their_own(watch):
                _init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    object_store_memory=OBJECT_STORE,
                    _temp_dir=str(temporary / "ray"),
                    _node_ip_address=node,
                )
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"Ray did not start: {error}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        wanted = threading.Event()
        wanted.set()
        threading.Thread(target=_watch_head, args=(wanted, lost), daemon=True).start()
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            wanted.clear()
            ray.shutdown()


@contextmanager
def _guard(temporary: Path) -> Iterator[Callable[[int], None]]:
    """Sees to it that nothing is left of the cluster, in processes or in `temporary`, whatever becomes of this process.
    Yields what is to be told of each process that leads a session."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True, text=True
    )

    def tell(line: object) -> None:
        guard.stdin.write(f"{line}\n")
        guard.stdin.flush()

    try:
        tell(temporary)
        yield tell
    finally:
        guard.communicate()


@contextmanager
def _sessions_of_their_own(tell: Callable[[int], None]) -> Iterator[None]:
    """What Ray starts meanwhile leads sessions of its own; `tell` hears of each. Ray has no option for it."""
    from ray._private import services

    original = services.ConsolePopen

    class Apart(original):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options | {"start_new_session": True})
            tell(self.pid)

    services.ConsolePopen = Apart
    try:
        yield
    finally:
        services.ConsolePopen = original


@contextmanager
def existing_cluster(address: str, folder: Path, lost: Callable[[], NoReturn]) -> Iterator[str]:
    """Join a Ray cluster as a driver. `lost` is called, in a thread, when its head does not answer any more. Raises
    UserError if it does not from the start, or a node of it could not run the trials of the search in `folder`."""
    os.environ.update(SETTINGS)
    os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token() else "disabled")
    _knock(address)
    import ray

    try:
        _init(address=address, log_to_driver=False)
    except Exception as error:  # Ray raises whatever its layers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"there is no Ray cluster to join at {address}: {reason}\n"
            "Start one by `ray start --head`, or leave --address out. One with authentication needs RAY_AUTH_TOKEN."
        ) from None
    wanted = threading.Event()
    wanted.set()
    head = ray.get_runtime_context().gcs_address
    threading.Thread(target=_watch_address, args=(head, wanted, lost), daemon=True).start()
    try:
        _check_nodes(address, folder)
        yield head
    finally:
        wanted.clear()
        ray.shutdown()


def join_or_start(address: str | None, folder: Path, lost: Callable[[], NoReturn]) -> AbstractContextManager[str]:
    """The existing cluster at `address`, or without one a cluster of its own for the search in `folder`."""
    return existing_cluster(address, folder, lost) if address else start_cluster(folder, lost)


def _check_nodes(address: str, folder: Path) -> None:
    """Raises UserError naming the nodes that lack this program or the folder: there every trial would fail."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def check(folder: str) -> str:  # not a function of this module, which may be what is missing
        import sys
        from importlib import import_module
        from pathlib import Path

        try:
            import_module("minbert.tuning.trainable")
        except ImportError as error:
            return f"{sys.executable} cannot import minbert there ({error}): start Ray in the environment you use here"
        return "" if Path(folder).is_dir() else f"there is no {folder} there: name a folder that all nodes share"

    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    asked = {
        ray.remote(check)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(str(folder.absolute())): name
        for node, name in names.items()
    }
    back, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_PATIENCE)
    found = {name: f"no answer within {NODE_PATIENCE:.0f} s" for name in asked.values()}
    for answer in back:
        try:
            found[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError as error:
            found[asked[answer]] = str(error).strip().splitlines()[-1]
    if problems := [f"node {name}: {problem}" for name, problem in found.items() if problem]:
        raise UserError("\n  ".join([f"the Ray cluster at {address} cannot run these trials:", *problems]))


def _knock(address: str) -> None:
    """Raises UserError if nobody listens at host:port; Ray would try for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        raise UserError(f"--address takes host:port of a Ray head, or `auto`, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"nothing answers at {address} ({error}); `ray start --head` says where it listens") from None


def _init(**options: Any) -> None:
    """`ray.init`, which takes SIGTERM for itself: the handlers stay those that were there. What Ray and Tune would
    print of failures, in colours and with tracebacks, the search says in its own words."""
    import ray

    ray._private.worker._worker_logs_enabled = False  # what the nodes say of lost workers
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        ray.init(logging_level=logging.CRITICAL, **options)
    except SystemExit:  # Ray's own answer to SIGTERM
        raise SystemExit(ExitCode.INTERRUPTED) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch_head(wanted: threading.Event, lost: Callable[[], NoReturn]) -> None:
    """Ray itself would wait for a minute, and then end this process without a word from us."""
    head = [child for child in psutil.Process().children() if child.name() in HEAD]
    while wanted.is_set():
        time.sleep(POLL)
        dead = [process for process in head if _is_dead(process)]
        if dead and wanted.is_set():
            for process in set(head) - set(dead):
                process.kill()
            lost()


def _watch_address(address: str, wanted: threading.Event, lost: Callable[[], NoReturn]) -> None:
    """Of a head elsewhere, only whether it answers can be seen; Ray itself would wait for a minute."""
    host, _, port = address.rpartition(":")
    failures = 0
    while wanted.is_set():
        time.sleep(KNOCK_EVERY)
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK_PATIENCE).close()
            failures = 0
        except OSError:
            failures += 1
        if failures >= KNOCKS and wanted.is_set():
            lost()


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == "zombie"
    except psutil.NoSuchProcess:
        return True


def temporary_folder(folder: Path) -> Path:
    """Of this start of the search, on this machine; short, because Ray puts sockets below it."""
    return _base() / f"{_family(folder)}-{os.getpid()}"


def _base() -> Path:
    return Path(tempfile.gettempdir() if len(tempfile.gettempdir()) < 12 else "/tmp")


def _family(folder: Path) -> str:
    return f"mb-{os.getuid()}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:6]}"


def _remove_leftovers(folder: Path) -> None:
    """Of starts of the same search that were killed together with their guard."""
    for path in _base().glob(f"{_family(folder)}-*"):
        if not psutil.pid_exists(int(path.name.rpartition("-")[2])):
            shutil.rmtree(path, ignore_errors=True)


def make_private(temporary: Path) -> None:
    """An empty folder that only this user may enter; Ray would open its own to everybody. Raises UserError."""
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier start
    try:
        temporary.mkdir(mode=0o700, exist_ok=True)
        if temporary.stat().st_uid != os.getuid():
            raise FileExistsError(None, "it belongs to somebody else")
        temporary.chmod(0o700)
    except OSError as error:
        raise UserError(f"{temporary} cannot be used for Ray: {error.strerror}") from None


def _has_token() -> bool:
    return bool(
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").exists()
    )
