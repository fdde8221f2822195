"""What a person sees of a run that this process trains: a panel on a terminal, lines elsewhere, JSON for machines."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from minbert.data.files import to_json
from minbert.data.task import Task
from minbert.trainer.config import RunConfig
from minbert.trainer.run.display import LivePanel, View, as_json, is_ascii, line, may_live

QUIET = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """Shows `view`, which it keeps up to date; does nothing where it is not enabled. `form`: `auto`, `lines` or `json`.

    `moved` is told of every step; `look`, called before something is shown, brings news of the processes.
    """

    def __init__(
        self,
        view: View,
        enabled: bool,
        form: str = "auto",
        moved: Callable[[int], None] = lambda step: None,
        look: Callable[[], None] = lambda: None,
    ):
        self.view, self.json, self.moved, self.look = view, enabled and form == "json", moved, look
        self.console = Console(quiet=not enabled or self.json)
        live = enabled and form == "auto" and may_live(self.console)
        self.live = Live(console=self.console, get_renderable=self._panel, refresh_per_second=4) if live else None
        self.trained: tuple[str, ...] | None = None
        self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def _panel(self) -> LivePanel:
        self.look()
        return LivePanel(self.view, is_ascii(self.console))

    def advance(self, step: int) -> None:
        self.view.step = step
        self.moved(step)

    def logged(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.view.take(record)
        evaluated = "dev/overall" in record
        if self.json:
            self._event("evaluation" if evaluated else "log")
        elif not self.live and not evaluated and time.monotonic() - self.said > QUIET:
            self.look()
            self._print(line(self.view))

    def extend(self, total: int) -> None:
        self.say(f"The dev score still rises: going on to step {total}.")
        self.view.total = total

    def trains(self, step: int, parts: tuple[str, ...], of: tuple[str, ...]) -> None:
        """Say which `of` the encoder's parts are trained from here on, when they are others than before."""
        if parts != self.trained:
            what = f"the encoder from {parts[0]} up" if parts else "the heads alone"
            what = "all of the encoder" if parts == of else what
            self.say(f"step {step:>6}/{self.view.total}  trains {what}")
        self.trained = parts

    def scores(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        line = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        mark = "  (best so far)" if best else ""
        self._print(f"step {step:>6}/{self.view.total}  {line}{mark}")

    def say(self, text: str) -> None:
        if self.json:
            self._event("message", text=text)
        self._print(text)

    def _print(self, text: str) -> None:
        self.said = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _event(self, event: str, **more: Any) -> None:
        self.look()
        print(to_json({"event": event} | more | as_json(self.view)), flush=True)


def say(text: str, config: RunConfig) -> None:
    """A line of the run's own, or an event where it speaks JSON."""
    print(to_json({"event": "message", "text": text}) if config.progress == "json" else text, flush=True)


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
