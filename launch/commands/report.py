"""`minbert report`: a page and a csv of what a run, a search or an ablation found."""

from dataclasses import dataclass, replace
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
from minbert.tuning.report.links import PAGE, owner, to_owner
from minbert.tuning.report.page import Report, write
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
    out = options.out or folder / PAGE
    if out.suffix != ".html":
        raise UserError(f"{out}: the page is a .html file")
    if folder.is_dir():
        require_place(out)
    if (report := _of_many(folder, out.parent)) is not None:
        _write(report, out)
        return ExitCode.FINISHED
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} is no run, search or ablation: it has no config.yaml, {SEARCH_FILE} or {ABLATION_FILE}"
        )
    report = _below(_of_run(folder, options), folder, out)
    _write(report, out)
    above = owner(folder)
    if above is not None and out.absolute() == (folder / PAGE).absolute():
        try:  # so that it leads here, and this page there
            _write(_of_many(above, above), above / PAGE)
        except UserError as problem:
            print(f"The page of {above} is not written: {problem}")
        else:
            if not report.page.above:  # it had no page to lead to
                _write(_below(report, folder, out), out, say=False)
    return ExitCode.FINISHED


def _of_many(folder: Path, place: Path) -> Report | None:
    """The report of a search or an ablation, for the folder `place`; None if `folder` is neither."""
    if (folder / SEARCH_FILE).exists():
        from minbert.tuning.report.search import search_report

        return search_report(folder, place)
    if (folder / ABLATION_FILE).exists():
        from minbert.tuning.report.ablation import ablation_report

        return ablation_report(folder, place)
    return None


def _of_run(folder: Path, options: ReportOptions) -> Report:
    from minbert.launch.results import whole_splits
    from minbert.tuning.report.run import run_report

    run = RunFolder(folder)
    return run_report(run, whole_splits(run.read_config(), options.data), options.split, options.mistakes)


def _below(report: Report, run: Path, out: Path) -> Report:
    """The report with a link to the page of what the run is a part of, if there is one."""
    return replace(report, page=replace(report.page, above=to_owner(run, out.parent)))


def _write(report: Report, out: Path, say: bool = True) -> None:
    try:
        write(report, out, out.with_suffix(".csv"))
    except OSError as error:
        raise disk_trouble(error) or UserError(f"{out} cannot be written: {error.strerror}") from None
    if say:
        print(f"Page: {out}   Numbers: {out.with_suffix('.csv')}")
