"""The processes of a cluster: told from all others, and ended, without ever going by a name.

A daemon is known by its number and the moment it started. What the daemons started is known by its environment:
every process of a job carries SLURM_CONF and SLURMD_NODENAME, and so does every daemon of ours.
"""

import os
import select
import signal
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minbert.data.errors import UserError

CONTROLLER = "controller"  # the SLURMD_NODENAME of daemons that belong to no node
DEATH = 30.0  # seconds within which a process must be gone after SIGKILL


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started: int  # in clock ticks since the machine's

    @classmethod
    def find(cls, pid: int) -> "Process | None":
        """The process that has this number now, unless it is dead and only waits for its parent."""
        found = _stat(pid)
        return None if found is None else cls(pid, found[1])

    @classmethod
    def read(cls, file: Path) -> "Process":
        return cls(*map(int, file.read_text().split()))

    def write(self, file: Path) -> None:
        file.write_text(f"{self.pid} {self.started}\n")

    def alive(self) -> bool:
        return Process.find(self.pid) == self

    def send(self, number: signal.Signals) -> int | None:
        """Sends a signal; returns a file descriptor that becomes readable when the process is gone, to be closed."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive():  # from here on the handle means this process, whoever gets its number
            os.close(handle)
            return None
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        return handle


def members(slurm_conf: Path, node: str | None = None) -> set[Process]:
    """All processes of the cluster with this configuration, or of one of its nodes, and what descends from them.

    This process is not among them, even if it runs in a job.
    """
    children, found = defaultdict(list), []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        stat = _stat(pid)
        if stat is None or pid == os.getpid():
            continue
        process = Process(pid, stat[1])
        children[stat[0]].append(process)
        if _belongs(pid, slurm_conf, node):
            found.append(process)
    result: set[Process] = set()
    while found:
        process = found.pop()
        if process not in result:
            result.add(process)
            found += children[process.pid]
    return result


def hold(slurm_conf: Path, node: str) -> None:
    """Stops all processes of a node, so that none of them sees another die."""
    held: set[Process] = set()
    while new := members(slurm_conf, node) - held:
        for process in new:
            if (handle := process.send(signal.SIGSTOP)) is not None:
                os.close(handle)
        held |= new


def end(processes: set[Process]) -> None:
    """Kills them, and returns when they are gone.

    Raises: UserError if one does not die.
    """
    handles = {process: handle for process in processes if (handle := process.send(signal.SIGKILL)) is not None}
    try:
        for process, handle in handles.items():
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            if not waiting.poll(DEATH * 1000):
                raise UserError(f"process {process.pid} survives SIGKILL: something holds it in the kernel")
    finally:
        for handle in handles.values():
            os.close(handle)


def _belongs(pid: int, slurm_conf: Path, node: str | None) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read().split(b"\0")
    except OSError:  # gone, or another user's
        return False
    if f"SLURM_CONF={slurm_conf}".encode() not in environment:
        return False
    if node is None:
        return any(entry.startswith(b"SLURMD_NODENAME=") for entry in environment)
    return f"SLURMD_NODENAME={node}".encode() in environment


def _stat(pid: int) -> tuple[int, int] | None:
    """Its parent, and when it started; None if there is no such process, or a dead one."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))
