"""What every process of a submitted job executes: meet the others, train, and tell the record how it ended. Jobs that
do something else have their frame here (`run_task`).

`RunJob` is what is pickled. It holds the run folder's path, and whether --force was given for what that says, so that a
job that starts again, perhaps days later, takes everything from the folder. This module imports little: a signal may
come at any moment.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minbert.data.errors import UserError
from minbert.launch.processes import ERROR_FILE, record_errors
from minbert.slurm.allocation import Allocation
from minbert.slurm.endings import Ending
from minbert.slurm.records import Records
from minbert.slurm.supervisor import hand_over, in_smaller_parts
from minbert.slurm.verdict import TOLD, Error, Next, Verdict
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest

LOCAL_REQUEUE = 144  # submitit's local executor starts the processes again if one ends with it,
LOCAL_STARTS = 6  # up to this often
LOCK_PATIENCE = 600.0  # seconds in which the processes of the job's last attempt may still save and leave


class RunJob:
    """One process of the job that trains the run in `run`.

    Its exit code is 0 if the run was finished or has stopped and saved, of which rank 0 tells the records: srun kills
    the other processes, which may still have to do something, when one has another code.
    """

    def __init__(self, run: Path, force: bool = False):
        self.run, self.force = run, force

    def __call__(self) -> int:
        with StopRequest(patient=not _debugging()) as stop:  # in place of submitit's handlers
            allocation = Allocation.current()
            if allocation.rank == 0 and os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
                return self._supervised(allocation, stop)
            code = self._train(allocation, stop)
            if allocation.rank == 0:
                hand_over(self.run, allocation, code, stop.signal)
            if code == ExitCode.INTERRUPTED:  # time is short, and the interpreter's farewell takes seconds
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            return code

    def _train(self, allocation: Allocation, stop: StopRequest) -> int:
        logs = self.run / "logs"
        logs.mkdir(exist_ok=True)
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if not _debugging():
            environment[ERROR_FILE] = str(logs / f"rank-{allocation.rank}.error")
        os.environ.update(environment)
        os.environ.setdefault("OMP_NUM_THREADS", str(_cores(allocation)))
        if allocation.rank:
            _write_to(logs / f"rank-{allocation.rank}.log")
        with record_errors(), ExitStack() as lock:
            from minbert.launch.worker import work
            from minbert.slurm.meeting import join
            from minbert.trainer.run.folder import RunFolder

            folder = RunFolder.existing(self.run)
            records = Records(self.run)
            seconds = 60 * folder.read_config().parallel.timeout  # for which the others wait for this one
            if allocation.rank == 0 and not _debugging():
                try:
                    lock.enter_context(folder.locked(min(LOCK_PATIENCE, seconds), stop))
                except UserError:
                    if stop.signal is None:
                        raise
                    return ExitCode.INTERRUPTED
            join(records.folder, allocation, records.submission().job_settings().interface, seconds)
            return work(folder, self.force, stop)

    def _supervised(self, allocation: Allocation, stop: StopRequest) -> int:
        """Without a batch script, rank 0 keeps the record itself; a local job goes on after its time limit."""
        records = Records(self.run)
        settings = records.submission().job_settings()
        before = [attempt for attempt in records.attempts() if attempt.job_id == allocation.job_id]
        attempt = records.begin(allocation.job_id, len(before), allocation.host)
        try:
            code = self._train(allocation, stop)
        except SystemExit as left:
            error = Error.read(self.run / "logs" / "rank-0.error")
            if error and error.code not in TOLD:  # which was printed
                print(error.text, file=sys.stderr)
            verdict = Verdict(Ending.FAILED, Next.NOTHING, error.summary if error else "")
            if error and error.code == ExitCode.OUT_OF_MEMORY:
                verdict = replace(verdict, ending=Ending.OUT_OF_MEMORY)
                if len(before) < LOCAL_STARTS - 1:
                    verdict = in_smaller_parts(self.run, verdict, allocation.tasks)
                    print(verdict.detail, flush=True)
            goes_on = verdict.next is Next.GO_ON
            records.end(attempt, verdict.ending, verdict.detail, left.code, Ending.REQUEUED if goes_on else "")
            if goes_on:
                sys.exit(LOCAL_REQUEUE)
            if _debugging():
                return left.code
            raise
        if code == ExitCode.FINISHED:
            ending = Ending.FINISHED
        elif records.submission().cancelled:
            ending = Ending.CANCELLED
        else:
            ending = Ending.TIME_LIMIT if stop.signal == signal.SIGUSR2 else Ending.STOPPED
        goes_on = ending is Ending.TIME_LIMIT and len(before) < min(settings.max_requeues, LOCAL_STARTS - 1)
        records.end(attempt, ending, then=Ending.REQUEUED if goes_on else "")
        if goes_on:
            sys.exit(LOCAL_REQUEUE)
        return code


def run_task(folder: Path, work: Callable[[Allocation, StopRequest], int]) -> int:
    """`work` as a process of a job that does not train one run: its errors end the process with their exit code and are
    left in the folder's logs, and what rank 0 returns, which is returned here, is in the folder's record."""
    with StopRequest(patient=True) as stop:  # in place of submitit's handlers
        allocation = Allocation.current()
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        os.environ[ERROR_FILE] = str(logs / f"rank-{allocation.rank}.error")
        with record_errors():
            code = work(allocation, stop)
        if allocation.rank == 0:
            hand_over(folder, allocation, code, stop.signal)
        return code


def _debugging() -> bool:
    """Whether this is the process of `minbert submit` itself."""
    return "SUBMITIT_DEBUG_JOB_ID" in os.environ


def _cores(allocation: Allocation) -> int:
    """This process's share of the cores."""
    if given := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(given)
    on_node = int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    return max(1, on_node // allocation.tasks_per_host[allocation.host_index])


def _write_to(path: Path) -> None:
    """Let all output of this process, also that of libraries in C, go to the end of `path`."""
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
