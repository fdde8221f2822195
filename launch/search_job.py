"""What every task of a search's job executes: the first runs Ray's head and the search, the others add their node.

`SearchJob` is what is pickled. It holds the search's folder and nothing else; a job that starts again takes everything
from there, and so does the search.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.launch.job import run_task
from minbert.slurm.allocation import Allocation, address
from minbert.slurm.records import Records
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest

POLL = 0.5  # seconds
PATIENCE = 300.0  # seconds for a node to join, or for the head to be there
LOCK_PATIENCE = 120.0  # seconds in which an earlier attempt, or the command that has submitted this one, lets go


class SearchJob:
    """One task of the job that runs the search in `folder`; there is one on each node. Returns 0 (finished) or 75
    (stopped, saved); anything else ends the process with its exit code."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> int:
        return run_task(self.folder, self._work)

    def _work(self, allocation: Allocation, stop: StopRequest) -> int:
        place = self.folder / "slurm" / f"ray-{allocation.job_id}-{allocation.restart}.json"
        if allocation.rank:
            return _join(place, allocation, self.folder / "logs" / f"ray-{allocation.rank}.log")
        return self._lead(place, allocation, stop)

    def _lead(self, place: Path, allocation: Allocation, stop: StopRequest) -> int:
        from minbert.launch.many_runs import leave_without_ray, only_driver
        from minbert.launch.searching import run_search
        from minbert.tuning.search import Search

        def lost() -> NoReturn:
            code = ExitCode.INTERRUPTED  # the job is requeued
            Records(self.folder).note_return(allocation.job_id, allocation.restart, code, stop.signal)
            leave_without_ray(f"minbert tune --slurm --search {self.folder}")

        with only_driver(self.folder, LOCK_PATIENCE):
            cluster = partial(_cluster, self.folder, place, allocation, lost)
            return run_search(self.folder, Search.read(self.folder), stop, cluster)


@contextmanager
def _cluster(folder: Path, place: Path, allocation: Allocation, lost: Callable[[], NoReturn]) -> Iterator[None]:
    """Ray on all nodes of the allocation, with this process as its driver."""
    from minbert.tuning.cluster import LOOPBACK, start_cluster, temporary_folder

    node = address(allocation.head) if allocation.workers else LOOPBACK
    with start_cluster(folder, lost, cpus=_cpus(), node=node) as meeting:
        with replacing(place) as temporary:
            temporary.touch(mode=0o600)  # who knows the token commands the cluster
            content = {"address": meeting, "token": os.environ["RAY_AUTH_TOKEN"]}
            temporary.write_text(json.dumps(content | {"temporary": str(temporary_folder(folder))}))
        try:
            _await_nodes(allocation)
            yield
        finally:
            place.unlink(missing_ok=True)  # the others leave


def _await_nodes(allocation: Allocation) -> None:
    """Raises UserError naming how many did not come."""
    import ray

    deadline = time.monotonic() + PATIENCE
    while True:
        there = sum(node["Alive"] for node in ray.nodes())
        if there >= len(allocation.hosts):
            cores = ray.cluster_resources().get("CPU", 0)
            print(f"Ray runs on {', '.join(allocation.hosts)}: {cores:.0f} cores.", flush=True)
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(allocation.hosts) - there} of {len(allocation.hosts)} nodes did not join Ray in "
                f"{PATIENCE:.0f} s; the files logs/ray-K.log of the search tell why"
            )
        time.sleep(POLL)


def _join(place: Path, allocation: Allocation, log: Path) -> int:
    """Add this node to the head's Ray, and stay as long as the head does. Raises UserError if there is no head."""
    from minbert.tuning.cluster import make_private

    deadline = time.monotonic() + PATIENCE
    while not _exists(place):
        if time.monotonic() > deadline:
            raise UserError(
                f"{allocation.host} waited {PATIENCE:.0f} s for Ray on {allocation.head}, "
                f"which leaves its place in {place}"
            )
        time.sleep(POLL)
    head = json.loads(place.read_text())
    private = Path(head["temporary"])  # Ray uses the same path on all nodes
    for left in private.parent.glob(f"{private.name.rpartition('-')[0]}-*"):  # by an earlier attempt that was killed
        if left != private:
            shutil.rmtree(left, ignore_errors=True)
    if not private.exists():  # nodes of a test may be one machine
        make_private(private)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    options = {"address": head["address"], "num-cpus": _cpus(), "node-ip-address": address(allocation.host)}
    options |= {"object-store-memory": 100 * 2**20, "min-worker-port": 0, "max-worker-port": 0}
    environment = dict(os.environ) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head["token"]}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    while process.poll() is None and _exists(place):
        time.sleep(POLL)
    if process.poll() is not None and _exists(place):
        raise UserError(f"Ray ended on {allocation.host} with exit code {process.returncode}; {log} tells why")
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    shutil.rmtree(private, ignore_errors=True)
    return ExitCode.FINISHED


def _exists(place: Path) -> bool:
    os.listdir(place.parent)  # makes a network file system look again
    return place.exists()


def _cpus() -> int:
    """Cores of this node that are the job's."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
