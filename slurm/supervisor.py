"""What the batch script runs before and after the processes: `python -m minbert.slurm.supervisor begin RUNS` and
`... end RUNS STATUS`.

`begin` checks the allocation and opens the record of this life; `end` finds out why the processes ended, closes the
record, and lets the job go on where it should. RUNS is a file with a run folder per line, one for each array element.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

from minbert.data.errors import UserError
from minbert.slurm import controller
from minbert.slurm.allocation import Allocation
from minbert.slurm.check import check_allocation
from minbert.slurm.records import EXIT_CODES, UNANNOUNCED, Ending, Life, Records
from minbert.slurm.submission import submit_anew
from minbert.slurm.verdict import USER_MISTAKE, Error, Evidence, Next, Verdict, judge

# srun about a task that ended by a signal: "srun: error: n2: task 3: Killed"
KILLED = re.compile(r"^srun: error: (\S+): tasks? (\S+): (?!Exited)(.*)$", re.MULTILINE)
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
    moment, runs_file, *status = arguments
    runs = Path(runs_file).read_text().splitlines()
    allocation = Allocation.current()
    run = Path(runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))])
    if moment == "begin":
        return begin(run, allocation)
    return end(run, allocation, int(status[0]))


def begin(run: Path, allocation: Allocation) -> int:
    """Returns: 0 if the processes may start."""
    records = Records(run)
    submission = records.submission()
    for life in records.lives():
        if life.ended is None:
            close_lost(records, life)
    for error in (run / "logs").glob("rank-*.error"):
        error.unlink()
    life = records.begin(allocation.job_id, allocation.restart, os.environ.get("SLURM_JOB_NODELIST", ""))
    say(f"job {allocation.job_id} on {life.nodes}, start {allocation.restart + 1}, from step {life.first_step}")
    try:
        check_allocation(run, Path(submission.code), allocation, submission.job_settings())
    except UserError as error:
        say(str(error))
        records.end(life, Ending.FAILED, str(error), USER_MISTAKE)
        return USER_MISTAKE
    return 0


def end(run: Path, allocation: Allocation, status: int) -> int:
    """Returns: the batch script's exit code."""
    records = Records(run)
    life = records.life(allocation.job_id, allocation.restart)
    submission = records.submission()
    settings = submission.job_settings()
    try:
        job = controller.show(allocation.job_id)
    except UserError:
        job = None
    errors = read_errors(run)
    verdict = judge(
        Evidence(
            status=status,
            job=job,
            restart=allocation.restart,
            code=life.code,
            signal=life.signal,
            cancelled=submission.cancelled,
            errors=errors,
            killed=_killed(Path(submission.folder), life),
            down=controller.down_nodes(life.nodes),
            signal_before=settings.signal_before,
        )
    )
    report(verdict, errors, allocation)
    return go_on(run, records, life, bounded(verdict, records, life, settings.max_requeues))


def bounded(verdict: Verdict, records: Records, life: Life, most: int) -> Verdict:
    """The verdict, unless the job has gone on often enough, or is lost again and again before it saves anything."""
    if verdict.next not in (Next.GO_ON, Next.SUBMIT_ANEW):
        return verdict
    lives = [other for other in records.lives()[records.submission().earlier_lives :] if other.ended is not None]
    if len(lives) >= most:
        detail = f"{verdict.detail + '; ' if verdict.detail else ''}max_requeues={most} are used up"
        return Verdict(verdict.ending, Next.NOTHING, detail)
    barren = bool(lives) and lives[-1].ending in UNANNOUNCED and lives[-1].last_step == lives[-1].first_step
    if verdict.ending in UNANNOUNCED and barren and records.newest_step() == life.first_step:
        return Verdict(verdict.ending, Next.NOTHING, f"{verdict.detail}; for the second time before any checkpoint")
    return verdict


def go_on(run: Path, records: Records, life: Life, verdict: Verdict) -> int:
    """Close the record and do what the verdict says; in this order, as requeueing ends this script too."""
    exit_code = EXIT_CODES[verdict.ending] if verdict.exit_code is None else verdict.exit_code
    then = {Next.LEFT_TO_SLURM: "requeued", Next.GO_ON: "requeued"}.get(verdict.next, "")
    records.end(life, verdict.ending, verdict.detail, exit_code, then)
    if verdict.next is Next.GO_ON and not records.submission().cancelled:
        try:
            say("requeueing the job")
            controller.requeue(life.job_id)
            return exit_code
        except UserError as error:
            say(f"cannot be requeued: {error}")
    if verdict.next in (Next.GO_ON, Next.SUBMIT_ANEW):
        try:
            new = submit_anew(run, life.job_id)
            say(f"submitted anew as job {new}")
            records.end(life, verdict.ending, verdict.detail, exit_code, f"job {new}")
        except UserError as error:
            say(f"cannot be submitted from here: {error}\nTo go on, on the login node: minbert submit --run {run}")
            records.end(life, verdict.ending, verdict.detail, exit_code)
    return exit_code


def report(verdict: Verdict, errors: list[Error], allocation: Allocation) -> None:
    """The first failure in full: rank 0 has left it to us."""
    if verdict.ending is Ending.FAILED and errors:
        first = next((error for error in errors if not error.lost_peer), errors[0])
        where = f"rank {first.rank} of {allocation.tasks} on {allocation.host_of(first.rank)}"
        say(f"{where} failed first:\n{first.text.rstrip()}" if first.code != USER_MISTAKE else first.text.rstrip())
    else:
        say(f"{verdict.ending}{f' ({verdict.detail})' if verdict.detail else ''}")


def read_errors(run: Path) -> list[Error]:
    """What the ranks left, the earliest first."""
    paths = sorted((run / "logs").glob("rank-*.error"), key=lambda path: path.stat().st_mtime)
    return [error for path in paths if (error := Error.read(path))]


def close_lost(records: Records, life: Life) -> None:
    """End the record of a life that could not do so itself."""
    told = controller.accounts([life.job_id]).get(life.job_id, [])
    ending = ACCOUNTED.get(told[life.restart].state) if life.restart < len(told) else None
    down = controller.down_nodes(life.nodes)
    if ending is None or (ending is Ending.REQUEUED and down):
        ending = Ending.NODE_FAILURE if down else Ending.LOST
    records.end(life, ending, ", ".join(down), then="requeued")


def _killed(folder: Path, life: Life) -> str:
    """What srun says in this life of the first task that a signal ended."""
    path = folder / f"{life.job_id}_0_log.out"
    if not path.exists():
        return ""
    text = path.read_bytes()[-65536:].decode(errors="replace")
    this_life = text.rpartition(f"start {life.restart + 1}, from step")[2]
    found = KILLED.search(this_life)
    return f"{found[1]}: task {found[2]}: {found[3]}" if found else ""


def say(text: str) -> None:
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
