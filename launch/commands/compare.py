"""`minbert compare A B C`: in what runs differ, and what that brought."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minbert.data.errors import UserError, disk_trouble
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.launch.outputs import require_place
from minbert.slurm.status import find_runs
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.tuning.report.compared import compared_report, metrics_of, shown
from minbert.tuning.runs_compared import Compared, compare_runs


@dataclass(frozen=True)
class CompareOptions:
    """Compare runs with the first of them: the options in which they differ, their best scores, and the differences
    with 95% intervals, paired by seed or, for single runs, by dev example. Runs that differ in their seed only are one
    column."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run folders, or folders that hold some."""
    out: Annotated[Path | None, open_option("FILE.html")] = None
    """Write a page with the curves over each other, and a csv beside it."""


def main(arguments: list[str]) -> int:
    options = parse(CompareOptions, arguments, "compare")
    out = options.out
    if out is not None:
        if out.suffix != ".html":
            raise UserError(f"{out}: the page is a .html file")
        require_place(out)
    runs = [run for run in find_runs(options.runs) if (run / "config.yaml").exists()]
    runs = list(dict.fromkeys(runs))
    if len(runs) < 2:
        where = ", ".join(map(str, options.runs))
        raise UserError(f"there is nothing to compare: {len(runs)} run in {where}; name two, or folders that hold some")
    found = compare_runs(runs)
    console = Console()
    for table in tables(found):
        console.print(table, soft_wrap=not console.is_terminal)
    for name, how in found.pairing.items():
        console.print(f"{name}: {how}", style="dim", highlight=False, markup=False)
    if out is not None:
        from minbert.tuning.report.page import write

        try:
            write(compared_report(found, out.parent), out, out.with_suffix(".csv"))
        except OSError as error:
            raise disk_trouble(error) or UserError(f"{out} cannot be written: {error.strerror}") from None
        print(f"Page: {out}   Numbers: {out.with_suffix('.csv')}")
    return ExitCode.FINISHED


def tables(found: Compared) -> Sequence[Table]:
    """In what they differ, and the scores: a column for each group while they are few."""
    metrics = metrics_of(found.groups)
    differs = Table(box=None, header_style="dim", pad_edge=False, title="In what they differ", title_justify="left")
    differs.add_column("option")
    for group in found.groups:
        differs.add_column(escape(group.name), overflow="fold")
    for name, values in found.options.items():
        differs.add_row(name, *(escape(shown(value)) for value in values))
    if not found.options:
        differs.add_row("nothing", *("" for _ in found.groups))
    scores = Table(box=None, header_style="dim", pad_edge=False, title="\nBest scores on dev", title_justify="left")
    scores.add_column("score")
    for group in found.groups:
        scores.add_column(escape(group.name), justify="right", overflow="fold")
    for metric in metrics:
        cells = []
        for group in found.groups:
            spreads = group.spreads()
            difference = found.differences.get(group.name, {}).get(metric)
            shown_difference = escape(difference.interval) if difference else ""
            cells.append(f"{spreads[metric]}\n{shown_difference}".rstrip() if metric in spreads else "–")
        scores.add_row(metric, *cells)
    return differs, scores
