"""What the batch script runs before and after the processes: `python -m minbert.slurm.supervisor begin RUNS` and
`... end RUNS STATUS`, or `... setup RUNS STATUS COMMAND` if a line of the user's setup has failed.

`begin` checks the allocation and opens the record of this attempt; `end` finds out why the processes ended, closes the
record, and lets the job go on where it should. RUNS is a file with a run folder per line, one for each array element;
its name holds the token of the submission. A job that is not the run's latest submission does nothing.
"""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from minbert.data.errors import UserError
from minbert.slurm import controller
from minbert.slurm.allocation import Allocation
from minbert.slurm.batch_script import token_of
from minbert.slurm.check import check_allocation
from minbert.slurm.endings import UNANNOUNCED, Ending
from minbert.slurm.records import Attempt, Records, Submission
from minbert.slurm.submission import kept_task, submit_anew
from minbert.slurm.verdict import BEFORE_TRAINING, SCRIPT_KILLED, Error, Evidence, Next, Verdict, judge
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

# srun about a task that ended by a signal: "srun: error: n2: task 3: Killed"
KILLED = re.compile(r"^srun: error: (\S+): tasks? (\S+): (?!Exited)(.*)$", re.MULTILINE)
# srun about its own arguments or its step, or that a program is not there
COMPLAINT = re.compile(
    r"^(?:srun: (?!(?:error: )?(?:\S+: tasks? |Job step aborted|forcing|got SIG|Terminating|launch/))(?:error: )?(.+)"
    r"|slurmstepd\S*: error: (execve.+))$",
    re.MULTILINE,
)
PREEMPTED = re.compile(r"^slurmstepd\S*: error: \*\*\* JOB .* DUE TO PREEMPTION", re.MULTILINE)
LOCK_PATIENCE = 60.0  # seconds in which a process that is on its way out may hold the run
ACCOUNTED = {
    "NODE_FAIL": Ending.NODE_FAILURE,
    "PREEMPTED": Ending.PREEMPTED,
    "TIMEOUT": Ending.TIME_LIMIT,
    "CANCELLED": Ending.CANCELLED,
    "REQUEUED": Ending.REQUEUED,
    "OUT_OF_MEMORY": Ending.KILLED,
    "BOOT_FAIL": Ending.NODE_FAILURE,
    "FAILED": Ending.FAILED,
}


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes with what is to be recorded; SIGKILL ends us in time
    moment, runs_file, *rest = arguments
    runs = Path(runs_file).read_text().split("\n")
    allocation = Allocation.current()
    run = Path(runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))])
    try:
        if moment == "end":
            return end(run, allocation, int(rest[0]))
        if not accept(run, allocation, token_of(Path(runs_file))):
            return Ending.CANCELLED.exit_code
        if moment == "setup":
            return setup_failed(run, allocation, int(rest[0]), rest[1])
        return begin(run, allocation)
    except UserError as error:
        say(str(error))
        return ExitCode.USER_MISTAKE


def accept(run: Path, allocation: Allocation, token: str) -> bool:
    """Whether this job is the one that the run waits for; then its record has the job's id, and the job its task."""
    records = Records(run)
    submission = records.submission()
    if submission is None or submission.token != token:
        say(f"{run} was submitted anew after this job, which has nothing to do any more")
        return False
    if submission.job_id != allocation.job_id:  # sbatch may not have answered
        records.change(token, job_id=allocation.job_id)
    provide_task(submission, allocation.job_id)
    if submission.cancelled:
        attempt = records.begin(allocation.job_id, allocation.restart, os.environ.get("SLURM_JOB_NODELIST", ""))
        records.end(attempt, Ending.CANCELLED)
        say("cancelled before it started")
        return False
    return True


def provide_task(submission: Submission, job_id: str) -> None:
    """Put the task where submitit's processes look for it, if submitit could not: it never learned the job's id."""
    from submitit.core.utils import JobPaths

    task = JobPaths(submission.folder, job_id).submitted_pickle
    if not task.exists():
        with suppress(FileNotFoundError):  # submitit has just done it
            kept_task(submission).replace(task)


def setup_failed(run: Path, allocation: Allocation, status: int, line: str) -> int:
    """A line of the user's setup failed with `status`, or a signal that the job got ended it."""
    records = Records(run)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    attempt = records.begin(allocation.job_id, allocation.restart, nodes)
    if status in BEFORE_TRAINING:
        return end(run, allocation, status)
    detail = f"setup: `{line}` failed with exit code {status}"
    say(f"{detail}. A line that may fail ends with `|| true`.")
    records.end(attempt, Ending.FAILED, detail, ExitCode.USER_MISTAKE)
    return ExitCode.USER_MISTAKE


def begin(run: Path, allocation: Allocation) -> int:
    """Returns: 0 if the processes may start."""
    records = Records(run)
    submission = records.submission()
    for attempt in records.attempts():
        if attempt.ended is None:
            close_lost(records, attempt)
    for error in (run / "logs").glob("rank-*.error"):
        error.unlink()
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    attempt = records.begin(allocation.job_id, allocation.restart, nodes, script=os.getppid())
    say(f"job {allocation.job_id} on {attempt.nodes}, start {allocation.restart + 1}, from step {attempt.first_step}")
    try:
        check_allocation(run, Path(submission.code), allocation, submission.job_settings())
    except UserError as error:
        say(str(error))
        records.end(attempt, Ending.FAILED, str(error), ExitCode.USER_MISTAKE)
        return ExitCode.USER_MISTAKE
    return ExitCode.FINISHED


def end(run: Path, allocation: Allocation, status: int, script_killed: bool = False) -> int:
    """Returns: the batch script's exit code. Rank 0 calls it if the batch script was killed."""
    records = Records(run)
    attempt = records.attempt(allocation.job_id, allocation.restart)
    submission = records.submission()
    settings = submission.job_settings()
    try:
        job = controller.show(allocation.job_id)
    except UserError:
        job = None
    errors = read_errors(run)
    said = output(Path(submission.folder), attempt)
    verdict = judge(
        Evidence(
            status=status,
            job=job,
            restart=allocation.restart,
            code=attempt.code,
            signal=attempt.signal,
            cancelled=submission.cancelled,
            errors=errors,
            killed=killed_task(said),
            complaint=complaint(said),
            preempted=PREEMPTED.search(said) is not None,
            script_killed=script_killed,
            down=controller.down_nodes(attempt.nodes),
            signal_before=settings.signal_before,
        )
    )
    report(verdict, errors, allocation)
    verdict = bounded(verdict, records, attempt, settings.max_requeues)
    if verdict.ending is Ending.OUT_OF_MEMORY and verdict.next is Next.GO_ON:
        verdict = in_smaller_parts(run, verdict, allocation.tasks)
        say(verdict.detail)
    return go_on(run, records, attempt, verdict)


def hand_over(run: Path, allocation: Allocation, code: int, signal_number: int | None) -> None:
    """To be called by rank 0 at its end, with what it returns and the signal that it got: the batch script goes on from
    there; if that was killed meanwhile, rank 0 stands in for it."""
    records = Records(run)
    records.note_return(allocation.job_id, allocation.restart, code, signal_number)
    attempt = records.attempt(allocation.job_id, allocation.restart)
    if attempt and attempt.ended is None and attempt.script and not Path(f"/proc/{attempt.script}").exists():
        end(run, allocation, 128 + signal.SIGKILL, script_killed=True)


def bounded(verdict: Verdict, records: Records, attempt: Attempt, most: int) -> Verdict:
    """The verdict, unless the job has gone on often enough, or is lost again and again before it saves anything."""
    if verdict.next not in (Next.GO_ON, Next.SUBMIT_ANEW):
        return verdict
    attempts = [
        other for other in records.attempts()[records.submission().earlier_attempts :] if other.ended is not None
    ]
    if len(attempts) >= most:
        detail = f"{verdict.detail + '; ' if verdict.detail else ''}max_requeues={most} are used up"
        return Verdict(verdict.ending, Next.NOTHING, detail)
    barren = bool(attempts) and attempts[-1].ending in UNANNOUNCED and attempts[-1].last_step == attempts[-1].first_step
    if verdict.ending in UNANNOUNCED and barren and records.newest_step() == attempt.first_step:
        return Verdict(verdict.ending, Next.NOTHING, f"{verdict.detail}; for the second time before any checkpoint")
    return verdict


def in_smaller_parts(run: Path, verdict: Verdict, processes: int) -> Verdict:
    """The verdict on a run whose steps did not fit into memory, once they are smaller; or that they cannot be."""
    from minbert.trainer.run.out_of_memory import cut_further

    folder = RunFolder(run)
    try:
        with folder.locked(LOCK_PATIENCE):
            parts = cut_further(folder, processes)
    except UserError as error:
        return replace(verdict, next=Next.NOTHING, detail=f"{verdict.detail}; {error}")
    return replace(verdict, next=Next.GO_ON, detail=f"{verdict.detail}; going on with accumulation={parts}")


def go_on(run: Path, records: Records, attempt: Attempt, verdict: Verdict) -> int:
    """Close the record and do what the verdict says; in this order, as requeueing ends this script too."""
    exit_code = verdict.ending.exit_code if verdict.exit_code is None else verdict.exit_code
    then = Ending.REQUEUED if verdict.next in (Next.LEFT_TO_SLURM, Next.GO_ON) else ""
    if verdict.next is not Next.LEFT_TO_SLURM and records.submission().cancelled:  # since the verdict
        records.end(attempt, Ending.CANCELLED)
        return Ending.CANCELLED.exit_code
    records.end(attempt, verdict.ending, verdict.detail, exit_code, then)
    if verdict.next is Next.GO_ON:
        try:
            say("requeueing the job")
            controller.requeue(attempt.job_id)
            return exit_code
        except UserError as error:
            say(f"cannot be requeued: {error}")
    if verdict.next in (Next.GO_ON, Next.SUBMIT_ANEW):
        try:
            new = submit_anew(run, attempt.job_id)
            say(f"submitted anew as job {new}")
            records.end(attempt, verdict.ending, verdict.detail, exit_code, f"job {new}")
        except UserError as error:
            say(f"cannot be submitted from here: {error}\nTo go on, on the login node: minbert submit --run {run}")
            records.end(attempt, verdict.ending, verdict.detail, exit_code)
    return exit_code


def report(verdict: Verdict, errors: list[Error], allocation: Allocation) -> None:
    """The first failure in full: rank 0 has left it to us."""
    if verdict.ending is Ending.FAILED and errors:
        first = next((error for error in errors if not error.lost_peer), errors[0])
        where = f"rank {first.rank} of {allocation.tasks} on {allocation.host_of(first.rank)}"
        say(("" if first.code == ExitCode.USER_MISTAKE else f"{where} failed first:\n") + first.text.rstrip())
    else:
        say(f"{verdict.ending}{f' ({verdict.detail})' if verdict.detail else ''}")


def read_errors(run: Path) -> list[Error]:
    """What the ranks left, the earliest first."""
    paths = sorted((run / "logs").glob("rank-*.error"), key=lambda path: path.stat().st_mtime)
    return [error for path in paths if (error := Error.read(path))]


def close_lost(records: Records, attempt: Attempt) -> None:
    """End the record of an attempt that could not do so itself."""
    told = controller.accounts([attempt.job_id]).get(attempt.job_id, [])
    ending = ACCOUNTED.get(told[attempt.restart].state) if attempt.restart < len(told) else None
    down = controller.down_nodes(attempt.nodes)
    submission = records.submission()
    if ending is Ending.REQUEUED and PREEMPTED.search(output(Path(submission.folder), attempt)):
        ending = Ending.PREEMPTED
    if ending is Ending.FAILED:  # the record would be closed if it were for another reason
        records.end(attempt, Ending.KILLED, SCRIPT_KILLED, then=Ending.REQUEUED)
        return
    if ending is None or (ending is Ending.REQUEUED and down):
        ending = Ending.NODE_FAILURE if down else Ending.LOST
    records.end(attempt, ending, ", ".join(down), then=Ending.REQUEUED)


def output(folder: Path, attempt: Attempt) -> str:
    """The end of what the batch script and rank 0 have printed in this attempt."""
    path = folder / f"{attempt.job_id}_0_log.out"
    if not path.is_file():
        return ""
    text = path.read_bytes()[-65536:].decode(errors="replace")
    return text.rpartition(f"start {attempt.restart + 1}, from step")[2]


def killed_task(said: str) -> str:
    """What srun says of the first task that a signal ended."""
    found = KILLED.search(said)
    return f"{found[1]}: task {found[2]}: {found[3]}" if found else ""


def complaint(said: str) -> str:
    """srun's last complaint that is not about how a task ended: the others lead to it."""
    found = COMPLAINT.findall(said)
    return next(filter(None, found[-1])) if found else ""


def say(text: str) -> None:
    with suppress(OSError):  # srun may be gone, which takes our output
        print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
