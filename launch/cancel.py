"""`minbert cancel RUN ...`: end the jobs of runs for good; what runs saves first, and can be submitted again."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.errors import UserError
from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import parse
from minbert.slurm import controller
from minbert.slurm.records import Records
from minbert.slurm.status import find_runs, look
from minbert.slurm.submission import mark_cancelled


@dataclass(frozen=True)
class CancelOptions:
    """Cancel the jobs of runs, or of all runs in a folder."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run folders, or folders that hold some."""


def main(arguments: list[str]) -> int:
    options = parse(CancelOptions, arguments, "cancel")
    reports = [report for report in look(find_runs(options.folders)) if report.active]
    if not reports:
        raise UserError(f"no run in {', '.join(map(str, options.folders))} has a job that waits or runs")
    jobs = []
    for report in reports:
        mark_cancelled(report.run)  # first: the job may be about to requeue itself
        if Records(report.run).submission().job_settings().executor == "slurm":
            jobs.append(report.job_id)
        else:
            os.kill(int(report.job_id), signal.SIGTERM)
        print(f"Cancelled: {report.run}   job {report.job_id}")
    if jobs:
        controller.cancel(jobs)
    return ExitCode.FINISHED
