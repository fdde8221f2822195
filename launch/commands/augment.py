"""`minbert augment TASK ...`: new training rows by back translation, for `minbert train --augmented`."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from minbert.data.augmentation.filters import FILTERS, SIMILARITY
from minbert.data.augmentation.selection import REPEATED
from minbert.data.augmentation.work import local_devices, missing, translate
from minbert.launch.options import parse
from minbert.launch.translation import REPORT, TranslationProgress, Work, finish, require_output
from minbert.trainer.processes.exit_codes import ExitCode


@dataclass(frozen=True)
class AugmentOptions(Work):
    """Translate the sentences of tasks' training rows into another language and back, drop what is no paraphrase, and
    write new rows for `minbert train --augmented`. Translations are kept: the same command goes on after a kill."""

    tasks: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TASK|FILE ...")]
    """Tasks to augment: names, or YAML files with the declaration of one's own."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the translations, the new rows (TASK.tsv) and the report."""


def main(arguments: list[str]) -> int:
    work = parse(AugmentOptions, arguments, "augment")
    console = Console(stderr=True)
    work.examples, work.recipes  # noqa: B018  what is wrong with them shows before anything is written
    require_output(work.output, work.tasks)
    while left := missing(work.store, work.units):  # once more, if a shard was damaged meanwhile
        total = sum(count for _, count in left)
        console.print(f"{total:,} of {len(work.texts) * len(work.recipes):,} translations are missing", highlight=False)
        with TranslationProgress(total, console) as progress:
            translate(work.workshop, work.units, local_devices(work.translator_model, work.processes), progress)
    report = finish(work, console)
    show(report, Console())
    files = [str(work.output / task["file"]) for task in report["tasks"].values() if task["new_rows"]]
    print(f"Report, with dropped texts: {work.output / REPORT}")
    if files:
        print(f"Use: minbert train --augmented {shlex.join(files)}")
    return ExitCode.FINISHED


def show(report: Mapping[str, Any], console: Console) -> None:
    """The counts, as tables."""
    ways = report["recipes"]
    table = Table(title="back translations", title_justify="left", box=None)
    table.add_column("")
    for way in ways:
        table.add_column(f"{way['pivot']} {way['variant']}" if len(ways) > 1 else way["pivot"], justify="right")
    table.add_row("translated", *(f"{way['translations']:,}" for way in ways))
    for reason in (*FILTERS, REPEATED, SIMILARITY):
        if any(reason in way["dropped"] for way in ways) or reason in report["options"]["filters"]:
            table.add_row(f"dropped: {reason}", *(f"{way['dropped'].get(reason, 0):,}" for way in ways))
    table.add_row("kept", *(f"{way['kept']:,}" for way in ways))
    console.print(table)
    rows = Table(box=None)
    for heading in ("task", "rows", "of which augmented", "new rows", "dropped: pairs that became equal"):
        rows.add_column(heading, justify="left" if heading == "task" else "right")
    for name, task in report["tasks"].items():
        counts = (task[key] for key in ("rows", "augmented", "new_rows", "became_equal"))
        rows.add_row(name, *(f"{count:,}" for count in counts))
    console.print(rows)
