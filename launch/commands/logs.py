"""`minbert logs RUN`: what the run printed, over all its jobs, and what it prints now."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.options import parse
from minbert.slurm.records import Records
from minbert.slurm.status import is_active
from minbert.trainer.processes.exit_codes import ExitCode

POLL = 0.5  # seconds between two looks at the files
PATIENCE = 5.0  # seconds between two looks at the job


@dataclass(frozen=True)
class LogsOptions:
    """Print what a run or a job of a search has printed: rank 0 and the batch script, or the log of another rank."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    rank: int = 0
    """Rank of the process."""
    follow: bool = False
    """Go on until the run has ended, across requeues."""


def main(arguments: list[str]) -> int:
    options = parse(LogsOptions, arguments, "logs")
    if not (options.run / "config.yaml").exists() and Records(options.run).submission() is None:
        raise UserError(f"{options.run} is neither a run folder nor a search with a job")
    shown = show(options.run, options.rank, {})
    if not options.follow and not shown:
        raise UserError(f"{options.run} has printed nothing as rank {options.rank} yet")
    if options.follow:
        follow(options.run, options.rank, shown)
    return ExitCode.FINISHED


def follow(run: Path, rank: int, shown: dict[Path, int]) -> None:
    """Print what comes until the run's job neither waits nor runs."""
    asked = 0.0
    while True:
        active = True
        if time.monotonic() - asked > PATIENCE:
            active, asked = is_active(run), time.monotonic()
        shown = show(run, rank, shown)
        if not active:
            return
        time.sleep(POLL)


def show(run: Path, rank: int, shown: dict[Path, int]) -> dict[Path, int]:
    """Print what the files hold beyond `shown`: file -> bytes printed; returns what is printed then."""
    now = dict(shown)
    for path in files(run, rank):
        with path.open("rb") as file:
            file.seek(now.get(path, 0))
            text = file.read()
        if text:
            sys.stdout.write(text.decode(errors="replace"))
            now[path] = now.get(path, 0) + len(text)
    sys.stdout.flush()
    return now


def files(run: Path, rank: int) -> list[Path]:
    """Rank 0's output is a file for each job; the other ranks have one log."""
    if rank:
        return [path for path in [run / "logs" / f"rank-{rank}.log"] if path.exists()]
    records = Records(run)
    submission = records.submission()
    if submission is None or records.is_copy(submission):
        return [path for path in [run / "logs" / "rank-0.log"] if path.exists()]
    jobs = dict.fromkeys([*(attempt.job_id for attempt in records.attempts()), submission.job_id])
    paths = [Path(submission.folder) / f"{job}_0_log.out" for job in jobs if job]
    return [path for path in paths if path.exists()]
