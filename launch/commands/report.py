"""`minbert report`: a page and a csv of what a run, a search or an ablation found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from minbert.data.errors import UserError, disk_trouble
from minbert.data.task import Split
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.launch.outputs import require_place
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.ablation import ABLATION_FILE
from minbert.tuning.search import SEARCH_FILE


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html, a page that needs nothing but a browser, and report.csv, its numbers, into the folder."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_SEARCH_OR_ABLATION")]
    """Folder of a run, a search or an ablation, over or not."""
    out: Annotated[Path | None, open_option("FILE.html")] = None
    """Page to write; the csv goes beside it. The default is report.html in the folder."""
    split: Split = "dev"
    """Of a run: the split that its best model answers; it must be labelled."""
    data: Annotated[str | None, open_option("STR")] = None
    """Of a run: other data than its own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    mistakes: Annotated[int, Field(ge=0)] = 10
    """Of a run: how many of the worst mistakes are shown for each task."""


def main(arguments: list[str]) -> int:
    options = parse(ReportOptions, arguments, "report")
    folder = options.folder
    out = options.out or folder / "report.html"
    if out.suffix != ".html":
        raise UserError(f"{out}: the page is a .html file")
    if folder.is_dir():
        require_place(out)
    if (folder / SEARCH_FILE).exists():
        from minbert.tuning.report.search import search_report

        report = search_report(folder)
    elif (folder / ABLATION_FILE).exists():
        from minbert.tuning.report.ablation import ablation_report

        report = ablation_report(folder)
    elif (folder / "config.yaml").exists():
        from minbert.launch.results import whole_splits
        from minbert.tuning.report.run import run_report

        run = RunFolder(folder)
        config = whole_splits(run.read_config(), options.data)
        report = run_report(run, config, options.split, options.mistakes)
    else:
        raise UserError(
            f"{folder} is no run, search or ablation: it has no config.yaml, {SEARCH_FILE} or {ABLATION_FILE}"
        )
    from minbert.tuning.report.page import write

    try:
        write(report, out, out.with_suffix(".csv"))
    except OSError as error:
        raise disk_trouble(error) or UserError(f"{out} cannot be written: {error.strerror}") from None
    print(f"Page: {out}   Numbers: {out.with_suffix('.csv')}")
    return ExitCode.FINISHED
