"""An augmentation from its options: the rows to augment, what there is to translate, and the files that come of it.

The command and the elements of its job array both start here: what is to be done follows from the options alone, and
what is done already lies in the output folder.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minbert.data.augmentation.filters import Filter, FilterOptions
from minbert.data.augmentation.recipe import Decoding, Recipe
from minbert.data.augmentation.round_trip import Model, find_model, recipes
from minbert.data.augmentation.rows import new_rows, write_rows
from minbert.data.augmentation.selection import Cosines, HeldOut, Selection, held_out, select
from minbert.data.augmentation.store import Store, Translation, is_store, sweep
from minbert.data.augmentation.work import Unit, Workshop, units
from minbert.data.errors import UserError
from minbert.data.files import alone, replacing, to_json
from minbert.data.machine import PROCESS, available, size
from minbert.data.sources.examples import BadRows, Examples, limit
from minbert.data.sources.loading import load_examples
from minbert.data.task import DECLARATIONS, Task, resolve_task
from minbert.trainer.options import Count, Seed

STORE = "translations"  # in the output folder
REPORT = "report.json"
QUIET = 10.0  # seconds between two lines where there is no terminal
LOCK_PATIENCE = 600.0  # seconds for another command that writes the files
FILTERS = FilterOptions().names


@dataclass(frozen=True)
class Work:
    """What is augmented, how it is translated, what is dropped, and where everything goes."""

    tasks: tuple[str, ...]
    output: Path
    data: str = "builtin"
    """`builtin`, a folder with the course's files, `hub`, or `hub:DIR`; a task with own files has its rows there."""
    task_folder: Path | None = None
    """A folder with declarations of tasks of one's own, NAME.yaml."""
    bad_rows: BadRows = "refuse"
    """What to do with rows that cannot be used: `refuse` to start, or `skip` and count them."""
    train_limit: Count | None = None
    """Augment this many rows per task, spread evenly over its file, as a run with the same option sees them."""
    translator: str = "opus-mt"
    """`opus-mt` (Marian models), a hub name or folder of a model for many languages (M2M, mBART, NLLB), a folder with
    models as DIR/en-zh and DIR/zh-en (transformers' or CTranslate2's), or `apertium`."""
    language: str = "en"
    """The language of the sentences, as the model calls it."""
    pivot: Annotated[tuple[str, ...], Field(min_length=1)] = ("zh",)
    """Languages to go through; each gives variants of its own."""
    beam: Count = 5
    """Beams of the search, where nothing is sampled."""
    sample: bool = False
    """Draw the words instead of searching for the best: more varied, and faster."""
    top_k: Count = 10
    """Draw among this many most probable words."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 prefers the probable words, above 1 evens them out."""
    variants: Count = 1
    """Draws for each pivot."""
    seed: Seed = 0
    """Seed of the draws."""
    batch_size: Count = 32
    """Sentences that a model translates at a time."""
    processes: Count | None = None
    """Processes on this machine; the default is one for each GPU, and for Apertium one for each core."""
    filters: tuple[Filter, ...] = FILTERS
    """Filters that are on; none after the option alone."""
    max_copy: Annotated[float, Field(ge=0, le=1)] = FilterOptions.max_copy
    """Filter `copy`: the largest similarity by edits, in characters, of a text and its back translation."""
    max_length_ratio: Annotated[float, Field(ge=1)] = FilterOptions.max_length_ratio
    """Filter `length`: the largest ratio of their numbers of words."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Drop what the encoder finds less alike than this, as a cosine."""
    model: str = "minilm"
    """That encoder: `minilm`, the folder of a BERT checkpoint, or a hub name."""
    format: Literal["tsv", "csv", "jsonl", "parquet"] = "tsv"
    """Of the files with the new rows."""

    @cached_property
    def resolved_tasks(self) -> tuple[Task, ...]:
        tasks = tuple(resolve_task(word, self.task_folder) for word in self.tasks)
        if len({task.name for task in tasks}) < len(tasks):
            raise UserError(f"a task is named twice: {', '.join(task.name for task in tasks)}")
        if corpora := [task.name for task in tasks if task.kind == "masked_lm"]:
            raise UserError(f"{corpora[0]} has no rows of its own: augment the tasks whose texts it has")
        if not tasks:
            raise UserError("name the tasks to augment, such as `minbert augment sts`")
        return tasks

    @cached_property
    def examples(self) -> dict[str, Examples]:
        """The training rows of each task. Raises UserError."""
        loaded = {task.name: load_examples(self.data, task, "train", self.bad_rows) for task in self.resolved_tasks}
        return {name: limit(rows, self.train_limit or len(rows)) for name, rows in loaded.items()}

    @cached_property
    def texts(self) -> list[str]:
        """Their sentences, each once."""
        columns = (column for examples in self.examples.values() for column in examples.sentences)
        return list(dict.fromkeys(text for column in columns for text in column))

    def check(self) -> None:
        """Raises UserError for an output folder that is somebody else's, and what is wrong with tasks, data, encoder or
        translator, before anything is written."""
        if self.output.is_dir() and any(self.output.iterdir()) and not is_store(self.store):
            raise UserError(
                f"--output {self.output} is not empty, and no earlier augmentation: it has no folder {STORE} with what "
                "one has translated; name another folder"
            )
        self.examples  # noqa: B018
        if self.min_similarity is not None:
            from minbert.trainer.model.similarity import require_encoder

            require_encoder(self.model)
        self.recipes  # noqa: B018
        processes = min(self.processes or 1, len(self.units))
        if (needed := processes * PROCESS) > (there := available()):
            raise UserError(
                f"{processes:,} processes need at least {size(needed)} of memory, and this machine has {size(there)}; "
                "ask for fewer --processes"
            )

    @cached_property
    def translator_model(self) -> Model:
        return find_model(self.translator, self.language)

    @cached_property
    def recipes(self) -> list[Recipe]:
        """Raises UserError if a model is missing."""
        decoding = Decoding(self.beam, self.sample, self.top_k, self.temperature, self.seed)
        return recipes(self.translator_model, self.language, self.pivot, decoding, self.variants)

    @property
    def units(self) -> list[Unit]:
        return units(self.texts, self.recipes)

    @property
    def workshop(self) -> Workshop:
        return Workshop(self.store, self.translator_model, self.batch_size)

    @property
    def store(self) -> Path:
        return self.output / STORE

    def held_out(self) -> HeldOut:
        """What no new row may repeat: the dev and test sentences of any task that the source has."""
        folders = (DECLARATIONS, self.task_folder)
        others = [resolve_task(str(path)) for folder in folders if folder for path in sorted(folder.glob("*.yaml"))]
        others = [task for task in others if task.kind != "masked_lm"]
        if self.data == "hub":
            others = []  # a look at every data set of the hub would fetch them all
        return held_out(self.data, self.resolved_tasks, others, self.bad_rows)

    def file(self, task: str) -> Path:
        return self.output / f"{task}.{self.format}"

    def absolute(self) -> "Work":
        """The same from any folder."""
        named = [
            word if word in _known(self.task_folder) else str(Path(word).expanduser().absolute()) for word in self.tasks
        ]
        places = {
            name: str(Path(value).expanduser().absolute())
            for name in ("data", "translator", "model")
            if Path(value := getattr(self, name)).expanduser().is_dir()
        }
        folder = self.task_folder and self.task_folder.expanduser().absolute()
        output = self.output.expanduser().absolute()
        return replace(self, tasks=tuple(named), output=output, task_folder=folder, **places)


def _known(folder: Path | None) -> set[str]:
    return {path.stem for place in (DECLARATIONS, folder) if place for path in place.glob("*.yaml")}


class SentenceProgress:
    """How many of `total` sentences are done, `translated` or so, at what pace: a bar on a terminal, elsewhere a line
    now and then."""

    def __init__(self, total: int, console: Console, done: str = "translated"):
        self.console, self.total, self.done, self.verb = console, total, 0, done
        self.begun = self.said = time.monotonic()
        columns = (TextColumn(done), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        left = (TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *left, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "SentenceProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        pace = self.done / max(now - self.begun, 1e-9)
        self.bar.update(self.task, completed=self.done, description=f"{pace:,.1f} sentences/s")
        if not self.console.is_terminal and (now - self.said > QUIET or self.done >= self.total):
            self.said = now
            left = (self.total - self.done) / max(pace, 1e-9)
            self.console.print(
                f"{self.verb} {self.done:,} of {self.total:,} sentences, {pace:,.1f} a second, {left:,.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


def finish(work: Work, console: Console) -> dict[str, Any]:
    """Filter all translations, which are there, and write each task's new rows and the report, which is returned."""
    translations = read(work)
    held = work.held_out()
    options = FilterOptions(work.filters, work.max_copy, work.max_length_ratio, held.sentences)
    cosines: Cosines | None = None
    if work.min_similarity is not None:
        import torch

        from minbert.trainer.model.similarity import Similarity

        similarity = Similarity(work.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

        def cosines(first: Sequence[str], second: Sequence[str]) -> list[float]:
            with SentenceProgress(len({*first, *second}), console, "encoded") as progress:
                return similarity(first, second, progress)

    selection = select(work.texts, translations, options, work.min_similarity, cosines)
    tasks: dict[str, Any] = {}
    # One command at a time; the next waits for it.
    with alone(work.output / ".lock", f"another command writes into {work.output}; wait for it", LOCK_PATIENCE):
        for name, examples in work.examples.items():
            kept, equal = new_rows(examples, selection.variants)
            write_rows(work.file(name), examples.task, kept)
            tasks[name] = {
                "file": work.file(name).name,
                "rows": len(examples),
                "augmented": len({row.origin[1] for row in kept}),
                "new_rows": len(kept),
                "became_equal": len(equal),
            }
        report = _report(work, selection, held, tasks)
        with replacing(work.output / REPORT) as temporary:
            temporary.write_text(to_json(report, indent=2) + "\n")
        sweep(work.store)
    return report


def read(work: Work) -> dict[Recipe, Mapping[str, Translation]]:
    return {recipe: Store(work.store, recipe).translations for recipe in work.recipes}


def _report(work: Work, selection: Selection, held: HeldOut, tasks: Mapping[str, Any]) -> dict[str, Any]:
    ways = []
    for recipe, counts in selection.counts.items():
        dropped = {reason: count for reason, count in counts.items() if reason != "kept"}
        ways.append(
            {"model": recipe.model}
            | recipe.identity
            | {"translations": counts.total(), "kept": counts["kept"], "dropped": dropped}
        )
    settings = {
        name: value for name, value in asdict(work).items() if name not in ("output", "processes", "batch_size")
    }
    return {
        "tasks": tasks,
        "recipes": ways,
        "examples": selection.examples,
        "compared_with": held.splits,
        "not_compared_with": dict(held.absent),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
    }


def make_output(work: Work) -> None:
    """Raises UserError if the output folder cannot be made or may not be written to."""
    folder = work.output
    try:
        work.store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be used: {error.strerror}") from None
