"""`minbert jobs [FOLDER ...]`: every run in a table: state, node, step, score, time left, requeues."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minbert.data.clock import clock
from minbert.data.errors import UserError
from minbert.data.files import to_json
from minbert.launch.options import parse
from minbert.launch.ownership import lock_runs
from minbert.slurm.endings import Ending, State
from minbert.slurm.records import Records, Submission
from minbert.slurm.status import Report, find_runs, inspect_runs
from minbert.trainer.processes.exit_codes import ExitCode

STYLES = {
    Ending.FINISHED: "green",
    Ending.FAILED: "bold red",
    Ending.KILLED: "red",
    Ending.OUT_OF_MEMORY: "red",
    State.RUNNING: "cyan",
    State.PENDING: "yellow",
    State.UNKNOWN: "bold yellow",
    State.DAMAGED: "bold red",
}


@dataclass(frozen=True)
class JobsOptions:
    """Show how runs stand. With a single RUN, the exit code tells too: 0 finished, 75 not ended, 87 unknown as SLURM is
    silent, else how it ended."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER")] = (Path("runs"),)
    """Run folders, or folders that hold some."""
    resubmit: bool = False
    """Submit again what has ended without being finished."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str]) -> int:
    options = parse(JobsOptions, arguments, "jobs")
    runs = find_runs(options.folders)
    reports = inspect_runs(runs)
    if options.resubmit:
        resubmit(reports)
        reports = inspect_runs(runs)
    if options.json:
        print(to_json([asdict(report) | {"run": str(report.run)} for report in reports], indent=2))
    elif runs:
        Console().print(table(reports))
        if len(reports) == 1 and not reports[0].finished and reports[0].state != State.RUNNING:
            print(f"More: minbert why {shlex.quote(str(reports[0].run))}")
    else:
        print(f"There are no runs in {', '.join(map(str, options.folders))}.")
    alone = len(options.folders) == 1 and runs[:1] == list(options.folders)
    return reports[0].exit_code if alone else ExitCode.FINISHED


def table(reports: Sequence[Report]) -> Table:
    """A line for every run; those of one folder stand under it."""
    shown = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("run", "state", "node", "step", "score", "left", "requeues", "job"):
        right = heading in ("step", "score", "left", "requeues")
        folds = heading in ("run", "state")
        width = 12 if heading == "state" else None
        shown.add_column(
            heading, justify="right" if right else "left", no_wrap=not folds, overflow="fold", min_width=width
        )
    for report in reports:
        state = f"{report.state}: {report.detail}" if report.detail else report.state
        steps = "" if report.step is None else f"{report.step}/{report.total or '?'}"
        shown.add_row(
            escape(shortened(report.run)),
            f"[{STYLES.get(report.state, 'magenta')}]{escape(state)}[/]",
            report.nodes,
            steps,
            "" if report.score is None else f"{report.score:.3f}",
            "" if report.seconds_left is None else clock(report.seconds_left),
            str(report.requeues or ""),
            report.job_id,
        )
    return shown


def shortened(run: Path) -> str:
    """The path as seen from here, if it lies below."""
    run, here = run.absolute(), Path.cwd()
    return str(run.relative_to(here)) if run.is_relative_to(here) and run != here else str(run)


def resubmit(reports: Sequence[Report]) -> None:
    """Submit again every run that ended without being finished; those submitted together go together."""
    from minbert.launch.submitting import run_task, submit_tasks

    groups: dict[str, list[tuple[Path, Submission]]] = {}
    for report in reports:
        if report.active or report.finished:
            continue
        records = Records(report.run)
        submission = records.submission()
        is_run = (report.run / "config.yaml").exists()  # a search goes on by `minbert tune --slurm`
        if submission and is_run:
            if records.is_copy(submission):  # the files of its job are its own
                submission = replace(submission, folder=str(records.folder.absolute()))
            key = json.dumps([submission.folder, submission.settings], sort_keys=True)
            groups.setdefault(key, []).append((report.run, submission))
    if not groups:
        raise UserError("there is nothing to submit again: every run is finished, waits or runs")
    for members in groups.values():
        (_, submission), *_ = members
        with lock_runs([run for run, _ in members]):
            tasks = [run_task(run, its.total_steps) for run, its in members]
            submit_tasks(tasks, submission.job_settings(), Path(submission.folder).parent)
