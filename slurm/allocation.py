"""The nodes that a job was given, seen from inside: who is the head, who are the workers, which ports are free.

It works in the batch script and in every task. A training run needs it to meet; so does anything else that spans the
nodes, such as a Ray cluster, whose head and workers are started on `head` and `workers`.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from minbert.data.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """A job's nodes and tasks, and this process's place among them (the batch script counts as the first task)."""

    job_id: str  # an array's element as ARRAY_INDEX
    restart: int  # how often the job was requeued
    hosts: tuple[str, ...]  # SLURM's names, the head first
    tasks_per_host: tuple[int, ...]
    host_index: int
    rank: int
    local_rank: int

    @classmethod
    def current(cls) -> "Allocation":
        """The one this process runs in. Raises UserError if it runs in none."""
        environment = os.environ
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            return cls._of_this_machine(
                "LOCAL_JOB_ID", int(environment["SUBMITIT_LOCAL_NTASKS"]), int(environment["SUBMITIT_LOCAL_GLOBALID"])
            )
        if "SUBMITIT_DEBUG_JOB_ID" in environment:
            return cls._of_this_machine("DEBUG_JOB_ID", 1, 0)
        if "SLURM_JOB_ID" not in environment:
            raise UserError("this is no SLURM job: SLURM_JOB_ID is not set")
        from submitit.slurm.slurm import SlurmJobEnvironment

        return cls(
            job_id=job_id(environment),
            restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
            hosts=tuple(SlurmJobEnvironment().hostnames),
            tasks_per_host=expand_counts(environment.get("SLURM_TASKS_PER_NODE", "1")),
            host_index=int(environment.get("SLURM_NODEID", 0)),
            rank=int(environment.get("SLURM_PROCID", 0)),
            local_rank=int(environment.get("SLURM_LOCALID", 0)),
        )

    @classmethod
    def _of_this_machine(cls, variable: str, tasks: int, rank: int) -> "Allocation":
        """What submitit's executors without a cluster amount to."""
        return cls(os.environ[f"SUBMITIT_{variable}"], 0, (socket.gethostname(),), (tasks,), 0, rank, rank)

    @property
    def head(self) -> str:
        return self.hosts[0]

    @property
    def workers(self) -> tuple[str, ...]:
        """All hosts but the head."""
        return self.hosts[1:]

    @property
    def host(self) -> str:
        return self.hosts[self.host_index]

    @property
    def tasks(self) -> int:
        return sum(self.tasks_per_host)

    def host_of(self, rank: int) -> str:
        """The host of a task, as SLURM deals them out by default: block by block."""
        for host, count in zip(self.hosts, self.tasks_per_host):
            if rank < count:
                return host
            rank -= count
        raise IndexError(rank)


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """This job's id, of an array's element as ARRAY_INDEX."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def expand_counts(text: str) -> tuple[int, ...]:
    """SLURM's `2(x3),1` as (2, 2, 2, 1)."""
    counts: list[int] = []
    for part in text.split(","):
        number, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(number)] * int(times or 1)
    return tuple(counts)


def address(host: str) -> str:
    """The IP address at which the other nodes reach `host`: its name's, or else what SLURM itself uses.

    Raises UserError if neither is known.
    """
    try:
        return socket.gethostbyname(host)
    except OSError:
        pass
    shown = subprocess.run(["scontrol", "-o", "show", "node", host], capture_output=True, text=True, timeout=60)
    if found := re.search(r"NodeAddr=(\S+)", shown.stdout):
        try:
            return socket.gethostbyname(found[1])
        except OSError:
            pass
    raise UserError(
        f"{socket.gethostname()} does not know the address of node {host}; name an interface by --interface"
    )


def interface_towards(target: str) -> str | None:
    """The network interface from which this machine reaches the address `target`, if there is one."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    return None


def interface_address(name: str) -> str:
    """The IPv4 address of an interface of this machine. Raises UserError if it has none, naming those that have."""
    import psutil

    found = {
        interface: entry.address
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    if name not in found:
        raise UserError(f"{socket.gethostname()} has no interface {name!r}; there are {', '.join(sorted(found))}")
    return found[name]
