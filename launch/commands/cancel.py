"""`minbert cancel RUN ...`: end the jobs of runs for good; what runs saves first, and can be submitted again."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.options import parse
from minbert.slurm import controller
from minbert.slurm.records import Records
from minbert.slurm.status import Report, find_runs, inspect_runs
from minbert.slurm.submission import mark_cancelled
from minbert.trainer.processes.exit_codes import ExitCode


@dataclass(frozen=True)
class CancelOptions:
    """Cancel the jobs of runs, or of all runs in a folder."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run folders, or folders that hold some."""


def main(arguments: list[str]) -> int:
    options = parse(CancelOptions, arguments, "cancel")
    reports = [report for report in inspect_runs(find_runs(options.folders)) if report.active]
    if not reports:
        raise UserError(f"no run in {', '.join(map(str, options.folders))} has a job that waits or runs")
    jobs: dict[str, Report] = {}
    problems = []
    for report in reports:
        try:
            mark_cancelled(report.run)  # first: the job may be about to requeue itself
            slurm = Records(report.run).submission().job_settings().executor == "slurm"
        except UserError as error:
            problems.append(str(error))
            continue
        if not slurm:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(int(report.job_id), signal.SIGTERM)
        elif report.job_id:
            jobs[report.job_id] = report
            continue
        else:
            problems.append(f"{report.run}: {report.detail}")
            continue
        print(f"Cancelled: {report.run}   job {report.job_id}")
    try:
        if jobs:
            controller.cancel(jobs)
        for report in jobs.values():
            print(f"Cancelled: {report.run}   job {report.job_id}")
    except UserError as error:
        problems.append(f"{', '.join(str(report.run) for report in jobs.values())}: {error}")
    if problems:
        raise UserError(
            "\n".join(problems)
            + "\nThese jobs may still wait or run. Where the run's record could be read, the run is "
            "marked as cancelled, and its job does not go on by itself; repeat this when SLURM answers."
        )
    return ExitCode.FINISHED
