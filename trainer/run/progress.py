"""What a person sees of a run: a bar with the scores on a terminal, a line per evaluation elsewhere."""

import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from minbert.data.task import Task

QUIET = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """The bar of a run of `total` steps, `done` of them before; does nothing where it is not enabled."""

    def __init__(self, total: int, enabled: bool, done: int = 0):
        self.console = Console(quiet=not enabled)
        self.bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        self.total = total
        self.trained: tuple[str, ...] | None = None
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def extend(self, total: int) -> None:
        self.console.print(f"The dev score still rises: going on to step {total}.")
        self.total = total
        self.bar.update(self.task, total=total)

    def trains(self, step: int, parts: tuple[str, ...], of: tuple[str, ...]) -> None:
        """Say which `of` the encoder's parts are trained from here on, when they are others than before."""
        if parts != self.trained:
            what = f"the encoder from {parts[0]} up" if parts else "the heads alone"
            what = "all of the encoder" if parts == of else what
            self.console.print(f"step {step:>6}/{self.total}  trains {what}", highlight=False, soft_wrap=True)
        self.trained = parts

    def scores(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        line = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.bar.update(self.task, completed=step, description=line)
        mark = "  (best so far)" if best else ""
        self.console.print(f"step {step:>6}/{self.total}  {line}{mark}", highlight=False, soft_wrap=True)


class PredictionProgress:
    """How many of `total` batches are predicted: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, total: int, console: Console):
        self.console, self.total, self.done, self.said = console, total, 0, time.monotonic()
        columns = (TextColumn("predicting {task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "PredictionProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def counting(self, what: str, stopped: Callable[[], bool]) -> Callable[[], bool]:
        """`stopped`, as it is asked before each batch of `what`: the batches are counted on the way."""

        def ask() -> bool:
            self.bar.update(self.task, completed=self.done, description=what)
            if not self.console.is_terminal and time.monotonic() - self.said > QUIET:
                self.said = time.monotonic()
                self.console.print(f"predicting {what}: {self.done / self.total:.0%} of all", highlight=False)
            self.done += 1
            return stopped()

        return ask


def score_table(title: str, tasks: Iterable[Task], columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Scores by task, one column per split."""
    table = Table(title=title, title_justify="left")
    for heading in ("task", "metric", *columns):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    names = list(next(iter(columns.values())))
    known = {task.name: task for task in tasks}
    for name in names:
        owner, _, beside = name.partition("/")
        metric = str(known[name].metric) if name in known else "mean, r as (r + 1) / 2, perplexity p as 1 / p"
        metric = beside.replace("_", " ") or metric
        shown = known[name].title if name in known else "" if owner in known else name
        table.add_row(shown, metric, *(f"{scores[name]:.3f}" for scores in columns.values()))
    return table
