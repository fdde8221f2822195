"""`minbert augment TASK ...`: new training rows by back translation, for `minbert train --augmented`."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console
from rich.table import Table

from minbert.data.augmentation.filters import FILTERS, SIMILARITY
from minbert.data.augmentation.selection import REPEATED
from minbert.data.augmentation.work import local_devices, missing, translate
from minbert.data.errors import UserError
from minbert.launch.options import asks_for_help, job_option_types, parse, refuse_job_options
from minbert.launch.translation import REPORT, SentenceProgress, Work, finish, make_output
from minbert.launch.words import read_options
from minbert.trainer.options import Count
from minbert.trainer.processes.exit_codes import ExitCode


@dataclass(frozen=True)
class AugmentOptions(Work):
    """Translate the sentences of tasks' training rows into another language and back, drop what is no paraphrase, and
    write new rows for `minbert train --augmented`. Translations are kept: the same command goes on after a kill."""

    tasks: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TASK|FILE ...")]
    """Tasks to augment: names, or YAML files with the declaration of one's own."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the translations, the new rows (TASK.tsv) and the report."""
    slurm: bool = False
    """Translate in a job array on a SLURM cluster, each job on all GPUs of its node, and write the files when all is
    translated. Takes a job's options, too, which `minbert submit --help` lists: --gpus-per-node, --time, ..."""
    elements: Count = 4
    """Jobs of that array."""

    @property
    def work(self) -> Work:
        """What is done, wherever."""
        return Work(**{field.name: getattr(self, field.name) for field in fields(Work)})


def main(arguments: list[str]) -> int:
    options, job = _read(arguments)
    if options.slurm:
        from minbert.launch.augment_job import submit_array

        submit_array(options.work, options.elements, job)
        return ExitCode.FINISHED
    work, console = options.work, Console(stderr=True)
    work.check()
    make_output(work)
    while left := missing(work.store, work.units):  # once more, if a shard was damaged meanwhile
        total = sum(count for _, count in left)
        console.print(f"{total:,} of {len(work.texts) * len(work.recipes):,} translations are missing", highlight=False)
        devices = local_devices(work.translator_model, work.processes)
        with SentenceProgress(total, console) as progress:
            translate(work.workshop, [unit for unit, _ in left], devices, progress)
    report = finish(work, console)
    show(report, Console())
    files = [str(work.output / task["file"]) for task in report["tasks"].values() if task["new_rows"]]
    print(f"Report, with dropped texts: {work.output / REPORT}")
    if files:
        print(f"Use: minbert train --augmented {shlex.join(files)}")
    return ExitCode.FINISHED


def _read(arguments: list[str]) -> tuple[AugmentOptions, dict[str, Any]]:
    """The command's options, and those of a job. Raises UserError."""
    job_types = job_option_types()
    own = [field.name for field in fields(AugmentOptions) if field.name != "tasks"]
    if asks_for_help(arguments):
        parse(AugmentOptions, arguments, "augment")
    types = get_type_hints(AugmentOptions, include_extras=True)
    given, words = read_options({name: types[name] for name in own} | job_types, arguments, "augment")
    job = {name: value for name, value in given.items() if name in job_types}
    if "output" not in given or not words:
        raise UserError("usage: minbert augment TASK|FILE ... --output FOLDER [options]; --help tells more")
    options = AugmentOptions(tuple(words), **{name: value for name, value in given.items() if name not in job})
    if not options.slurm:
        refuse_job_options({name: value for name, value in given.items() if name == "elements"} | job)
    return options, job


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
