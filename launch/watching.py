"""Runs seen from outside: one run as its own panel shows it, or many in a table, from their files alone."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from minbert.data.clock import clock
from minbert.data.errors import UserError
from minbert.data.files import is_locked, to_json
from minbert.slurm.endings import TROUBLE, State
from minbert.slurm.status import Report, find_runs, inspect_runs
from minbert.trainer.run.display import View, as_json, is_ascii, may_live
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import QUIET
from minbert.trainer.run.standing import read_standings
from minbert.tuning.ablation import ABLATION_FILE, Ablation
from minbert.tuning.again import runs_in_all
from minbert.tuning.search import SEARCH_FILE, Search
from minbert.tuning.trial import LOCK

ASK = 10.0  # seconds between two questions to SLURM
ORDER = (State.RUNNING, State.PENDING, State.UNKNOWN)  # the first in the table; the others by their score


def is_under_way(report: Report) -> bool:
    return report.active or report.state == State.RUNNING


class WatchedRun:
    """What a run's files say, read again by `look` where they have changed."""

    def __init__(self, run: Path):
        self.folder, self.view = RunFolder(run), View(str(run), (), None)
        self._read: tuple[int, float] | None = None
        self._known = False
        self.seen = ""  # the state at the last look

    def look(self, report: Report | None = None) -> View:
        """`report`: how SLURM and the records say that it stands."""
        if not self._known and self.folder.config_file.exists():
            self._learn()
        there = len_and_time(self.folder.metrics_file)
        if self._known and there != self._read:
            self._read, fresh = there, View(self.view.name, self.view.tasks, self.view.total, flops=self.view.flops)
            for record in self.folder.read_metrics():
                fresh.take(record)
            self.view = fresh
        view = self.view
        view.processes = read_standings(self.folder.logs)
        if main := view.main:
            view.total = max(main.total_steps, view.total or 0)
            view.step = max(view.step, main.step) if not main.ended else view.step
        if report is not None:
            view.total = view.total or report.total
            view.state = "" if report.state == State.RUNNING else str(report.state)
            if not view.state and main and main.hangs():
                view.state = f"still {clock(main.still)}"
        return view

    def _learn(self) -> None:
        try:
            config = self.folder.read_config()
        except UserError:
            return  # being written
        flops = 0.0
        if (self.folder.encoder / "config.json").exists():
            from minbert.trainer.model.weights import read_config
            from minbert.trainer.run.speed import flops_per_token

            flops = flops_per_token(config, read_config(self.folder.encoder))
        self.view, self._known = View.of(self.view.name, config, None, flops), True


def len_and_time(path: Path) -> tuple[int, float]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0.0
    return status.st_size, status.st_mtime


@dataclass
class ManyRuns:
    """The runs below `folder`, of a search, an ablation, or none."""

    folder: Path
    watched: dict[Path, WatchedRun] = field(default_factory=dict)
    reports: Sequence[Report] = ()
    asked: float = 0.0
    planned: int | None = None  # runs that there will be, of a search or an ablation

    def look(self) -> "ManyRuns":
        now = time.monotonic()
        if not self.asked or now - self.asked > self._patience():
            runs = [run for run in find_runs([self.folder]) if (run / "config.yaml").exists()]
            self.reports, self.asked = inspect_runs(runs), now
            if (self.folder / SEARCH_FILE).exists():
                self.planned = runs_in_all(Search.read(self.folder), self.folder)
            elif (self.folder / ABLATION_FILE).exists():
                ablation = Ablation.read(self.folder)
                self.planned = len(ablation.variants) * len(ablation.seeds)
        for report in self.reports:
            watched = self.watched.setdefault(report.run, WatchedRun(report.run))
            if is_under_way(report) or watched.seen != report.state:
                watched.look(report)
            watched.seen = report.state
        return self

    def _patience(self) -> float:
        submitted = any(report.job_id for report in self.reports)
        return max(ASK if submitted else 1.0, 0.02 * len(self.reports))

    @property
    def rows(self) -> list[tuple[Report, View]]:
        """What is under way first, the others by score."""

        def place(row: tuple[Report, View]) -> tuple[int, float, str]:
            report, view = row
            first = ORDER.index(report.state) if report.state in ORDER else len(ORDER)
            best = view.best.get("overall", float("-inf")) if first == len(ORDER) else 0.0
            return first, -best, str(report.run)

        return sorted(((report, self.watched[report.run].view) for report in self.reports), key=place)

    @property
    def under_way(self) -> bool:
        if any(is_under_way(report) for report in self.reports) or is_locked(self.folder / LOCK):
            return True
        return (self.folder / "slurm").exists() and inspect_runs([self.folder])[0].active

    @property
    def summary(self) -> str:
        count = {state: sum(report.state == state for report in self.reports) for state in ORDER[:2]}
        failed = sum(report.state in TROUBLE for report in self.reports)
        over = len(self.reports) - sum(count.values())
        best = max(self.rows, key=lambda row: row[1].best.get("overall", float("-inf")), default=None)
        parts = [f"{over}/{self.planned or len(self.reports)} over", f"{count[State.RUNNING]} running"]
        parts += [f"{count[State.PENDING]} pending"] if count[State.PENDING] else []
        parts += [f"{failed} failed"] if failed else []
        if best and "overall" in best[1].best:
            parts.append(f"best {best[1].best['overall']:.3f} {_name(self, best[0])}")
        return ", ".join(parts)

    def line(self) -> str:
        running = [
            f"{report.run.name} {view.step}/{view.total or '?'}"
            + (f" {view.best['overall']:.3f}" if "overall" in view.best else "")
            for report, view in self.rows
            if report.state == State.RUNNING
        ]
        return f"{self.summary}" + (f"; {', '.join(running)}" if running else "")

    def as_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "runs": [as_json(view) for _, view in self.rows], "planned": self.planned}


def table(runs: ManyRuns, width: int, height: int, ascii_only: bool = False) -> Text:
    """At most `height` lines: the runs under way, then the best, then how many more there are."""
    text = Text(no_wrap=True, overflow="crop")
    rows = runs.rows
    name_width = max([4, *(len(_name(runs, report)) for report, _ in rows)])
    name_width = min(name_width, max(8, width - 62))
    text.append(f"{runs.folder}  {runs.summary}"[:width], "bold")
    heading = f"{'run':<{name_width}}  {'state':<11}  {'step':>13}  {'left':>6}  {'dev':>6}  {'best':>6}  tokens/s"
    text.append("\n" + heading[:width], "dim")
    shown = rows[: max(1, height - 3)]
    for report, view in shown:
        dev, best = (f"{scores['overall']:.3f}" if "overall" in scores else "–" for scores in (view.scores, view.best))
        left = clock(view.seconds_left) if report.state == State.RUNNING else ""
        state = view.state or str(report.state)
        speed = view.numbers.get("tokens_per_second") if report.state == State.RUNNING else None
        row = (
            f"{_name(runs, report)[-name_width:]:<{name_width}}  {state[:11]:<11}  "
            f"{view.step:>6}/{view.total or '?':<6}  {left:>6}  {dev:>6}  {best:>6}  "
            f"{'' if speed is None else f'{speed:,.0f}':>8}"
        )
        style = {State.RUNNING: "cyan", State.PENDING: "yellow", **dict.fromkeys(TROUBLE, "red")}.get(report.state, "")
        text.append("\n" + row[:width].rstrip(), style)
    if len(rows) > len(shown):
        text.append(f"\nand {len(rows) - len(shown)} more", "dim")
    return Text(text.plain.replace("–", "-"), no_wrap=True, overflow="crop") if ascii_only else text


def _name(runs: ManyRuns, report: Report) -> str:
    below = report.run.relative_to(runs.folder)
    return str(Path(*below.parts[1:])) if below.parts[:1] in (("trials",), ("runs",)) else str(below)


class Drawing:
    """What `draw` gives for the console's size, as rich asks for it."""

    def __init__(self, draw: Callable[[int, int, bool], Text]):
        self.draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(options.max_width, console.height, is_ascii(console))


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Show the runs below `folder` while the block runs them: a table on a terminal, a line now and then elsewhere."""
    runs, console = ManyRuns(folder), Console()

    def look() -> None:
        with suppress(OSError, UserError, ValueError):  # files that are being written, or not there yet
            runs.look()

    if may_live(console):

        def draw() -> Text:
            look()
            return table(runs, console.width, max(6, console.height - 6), is_ascii(console))

        with Live(console=console, get_renderable=draw, refresh_per_second=1, transient=True):
            yield
        return
    end = threading.Event()

    def tell() -> None:
        while not end.wait(QUIET):
            look()
            print(runs.line(), flush=True)

    teller = threading.Thread(target=tell, name="watching", daemon=True)
    teller.start()
    try:
        yield
    finally:
        end.set()
        teller.join()


def show(
    look: Callable[[], bool],
    draw: Callable[[int, int, bool], Text],
    say: Callable[[], str],
    describe: Callable[[], dict[str, Any]],
    interval: float,
    json: bool,
    once: bool,
) -> None:
    """Until `look` says that it is over: what `draw` gives on a terminal, else what `say` gives now and then, or what
    `describe` gives whenever it has changed."""
    console = Console()
    live = not json and may_live(console)
    before, told = None, float("-inf")
    over = look() is False
    if once and not json:
        console.print(Drawing(draw) if live else say(), highlight=False, soft_wrap=not live)
        return
    drawing = Drawing(draw)
    with Live(drawing, console=console, auto_refresh=False) if live else nullcontext() as screen:
        while True:
            if live:
                screen.update(drawing, refresh=True)
            elif json:
                now = {name: value for name, value in describe().items() if name not in ("time", "elapsed")}
                if now != before:
                    before = now
                    print(to_json(describe()), flush=True)
            elif time.monotonic() - told > QUIET or over:
                told = time.monotonic()
                print(say(), flush=True)
            if over or once:
                return
            time.sleep(interval)
            over = look() is False
