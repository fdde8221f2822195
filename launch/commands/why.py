"""`minbert why RUN`: why a run waits, has ended, or does not go on."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from minbert.data.errors import UserError
from minbert.launch.commands.logs import files
from minbert.launch.options import parse
from minbert.slurm.endings import TROUBLE, State
from minbert.slurm.records import Records
from minbert.slurm.status import inspect_runs
from minbert.slurm.timeline import first_failure, suspects, tail, timeline, where_they_stand
from minbert.slurm.waiting import explain
from minbert.trainer.run.standing import HANGS, read_standings


@dataclass(frozen=True)
class WhyOptions:
    """Say why a run waits (SLURM's reason in words, its place in the queue, what would make it start sooner), why it
    has ended (all its attempts, the rank that failed first and its last words), or where its processes stand if it does
    not go on. The exit code is that of `minbert jobs RUN`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or of a search with a job."""
    patience: Annotated[float, Field(gt=0)] = HANGS
    """Seconds without a step after which a run seems to hang, if that is twenty times what a step takes."""


def main(arguments: list[str]) -> int:
    options = parse(WhyOptions, arguments, "why")
    run = options.run
    if not (run / "config.yaml").exists() and Records(run).submission() is None:
        raise UserError(f"{run} is neither a run folder nor a search with a job")
    (report,) = inspect_runs([run])
    print(f"{run}: {report.summary}")
    if report.state == State.PENDING and report.job_id:
        for line in explain(run, report.job_id):
            print(line)
    if report.state == State.RUNNING:
        _progress(run, options.patience)
    if events := timeline(run):
        print("\nWhat happened:")
        for event in events:
            print(f"  {event}")
    if not report.finished and report.state not in (State.PENDING, State.RUNNING):
        _failure(run, report.state)
    return report.exit_code


def _progress(run: Path, patience: float) -> None:
    """Whether it goes on, and if not, who is waited for."""
    standings = read_standings(run / "logs")
    if not standings or standings[0].rank:
        print("Its processes have not told where they stand: they may still be loading.")
        return
    main = standings[0]
    if not main.hangs(patience):
        ago = f"the last step was {main.still:.0f} s ago" if main.step > main.first_step else "no step is done yet"
        print(f"It goes on: step {main.step} of {main.total_steps}, {ago}.")
    else:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - main.still))
        print(f"It seems to hang: no step for {main.still / 60:.0f} min, since {since}.")
        ranks, reason = suspects(standings)
        if ranks:
            print(f"Look at rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}, which {reason}.")
            print(f"Its log: {run / 'logs' / f'rank-{ranks[0]}.log'}")
        elif len(standings) > 1:
            print("All processes wait for each other, or none does: the network or the disk may be slow.")
    for line in where_they_stand(standings):
        print(f"  {line}")


def _failure(run: Path, state: str) -> None:
    error = first_failure(run)
    if error is not None:
        host = next((each.host for each in read_standings(run / "logs") if each.rank == error.rank), "")
        print(f"\nrank {error.rank}{f' on {host}' if host else ''} failed first:")
        for line in error.text.rstrip().splitlines():
            print(f"  {line}")
    rank = error.rank if error else 0
    log = (files(run, rank) or [run / "logs" / f"rank-{rank}.log"])[-1]
    if lines := tail(log):
        print(f"\nThe end of {log}:")
        for line in lines:
            print(f"  {line}")
    elif state in TROUBLE and error is None:
        print("\nIt left neither an error nor a log.")
