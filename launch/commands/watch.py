"""`minbert watch FOLDER`: what a run, a search or all runs of a folder do just now, wherever they are trained."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from minbert.data.errors import UserError
from minbert.launch.options import parse
from minbert.launch.watching import ASK, ManyRuns, WatchedRun, is_under_way, show, table
from minbert.slurm.status import Report, inspect_runs
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.display import as_json, line, panel


@dataclass(frozen=True)
class WatchOptions:
    """Show the progress of a run, of a search or ablation, or of all runs in a folder, until they have ended. It only
    reads their files, so they may run anywhere; Ctrl-C ends the watching, not them. Of a single run the exit code tells
    how it ended, as that of `minbert jobs RUN`."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Folder of a run, a search, an ablation, or several of them."""
    interval: Annotated[float, Field(gt=0)] = 1.0
    """Seconds between two looks."""
    json: bool = False
    """Print a line of JSON whenever something has changed."""
    once: bool = False
    """Look once, and end."""


def main(arguments: list[str]) -> int:
    options = parse(WatchOptions, arguments, "watch")
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is no folder; name the folder of a run, a search, or several")
    try:
        return _watch(options)
    except KeyboardInterrupt:
        if not options.json:
            again = f"minbert watch {shlex.quote(str(options.folder))}"
            print(f"Not watched any more; what runs goes on. Watch again: {again}")
        return ExitCode.LEFT_AT_ONCE


def _watch(options: WatchOptions) -> int:
    how = {"interval": options.interval, "json": options.json, "once": options.once}
    if not (options.folder / "config.yaml").exists():
        runs = ManyRuns(options.folder)
        if not runs.look().reports and not runs.under_way:
            raise UserError(f"there are no runs in {options.folder}; name the folder of a run, a search, or several")
        show(
            look=lambda: runs.look().under_way,
            draw=lambda width, height, ascii_only: table(runs, width, height, ascii_only),
            say=runs.line,
            describe=runs.as_json,
            **how,
        )
        return ExitCode.FINISHED
    watched, asking = WatchedRun(options.folder), Asking(options.folder)

    def look() -> bool:
        watched.look(asking())
        return is_under_way(asking.report)

    show(
        look=look,
        draw=lambda width, height, ascii_only: panel(watched.view, width, ascii_only),
        say=lambda: " ".join(filter(None, [line(watched.view), watched.view.state])),
        describe=lambda: as_json(watched.view),
        **how,
    )
    report = asking.report
    if not options.json and not options.once:
        print(f"{options.folder}: {report.summary}")
    return report.exit_code


class Asking:
    """How a run stands; SLURM is not asked at every look."""

    def __init__(self, run: Path):
        self.run, self.when = run, 0.0
        self.report: Report

    def __call__(self) -> Report:
        patience = ASK if self.when and self.report.job_id else 0.0
        if not self.when or time.monotonic() - self.when > patience:
            (self.report,), self.when = inspect_runs([self.run]), time.monotonic()
        return self.report
