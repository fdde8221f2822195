"""How a run under way looks: the same numbers as a panel on a terminal, as a line in a log, and as JSON for machines.

The numbers come from records of metrics.jsonl and from what the processes say of themselves, whether the run is here or
elsewhere. Every part of the panel has its place and width from the beginning, so that nothing moves when a number comes
or grows.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minbert.data.clock import clock
from minbert.trainer.config import RunConfig
from minbert.trainer.run.standing import Standing

MOST_TASKS = 8  # that have a line of their own
PARTS = {"loss/": "losses", "dev/": "scores", "dev_loss/": "dev_losses"}


@dataclass
class View:
    """All there is to show of a run. `flops` for each token, of the model (`speed.flops_per_token`)."""

    name: str
    tasks: Sequence[str]
    total: int | None
    step: int = 0
    flops: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation, as are the dev losses
    dev_losses: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # of the one with the best overall score
    best_step: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # tokens_per_second, lr, head_lr, conflicts, ...
    processes: Sequence[Standing] = ()
    state: str = ""  # of a run that this process does not train

    @classmethod
    def of(cls, name: str, config: RunConfig, total: int | None, flops: float = 0.0) -> "View":
        return cls(name, config.corpus.names, total, flops=flops)

    def take(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.step = max(self.step, record["step"])
        found: dict[str, dict[str, float]] = {part: {} for part in PARTS.values()}
        for name, value in record.items():
            if not isinstance(value, int | float):
                continue
            part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)
            if part:
                found[part][name.partition("/")[2]] = value
            elif name != "step":
                self.numbers[name] = value
        self.losses |= found["losses"]
        if scores := found["scores"]:
            self.scores, self.dev_losses = scores, found["dev_losses"]
            if scores.get("overall", float("-inf")) > self.best.get("overall", float("-inf")):
                self.best, self.best_step = scores, record["step"]

    @property
    def main(self) -> Standing | None:
        return self.processes[0] if self.processes and self.processes[0].rank == 0 else None

    @property
    def seconds_left(self) -> float | None:
        if self.total is None or self.main is None or self.main.ended:
            return None
        return self.main.seconds_left(self.total, self.main.age)

    @property
    def elapsed(self) -> float | None:
        """Seconds since this start of the run had everything in memory."""
        return None if self.main is None else self.main.written + self.main.age - self.main.began

    @property
    def memory(self) -> int | None:
        """Bytes, of the process that has most."""
        return max((standing.memory for standing in self.processes), default=None)

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPs a second, of those of the processes' matrix products."""
        peak, speed = sum(each.peak for each in self.processes), self.numbers.get("tokens_per_second")
        if not peak or not speed or not self.flops or len(self.processes) != self.processes[0].processes:
            return None
        return speed * self.flops / peak


def panel(view: View, width: int, ascii_only: bool = False, colours: bool = True) -> Text:
    """`width` columns at most, and always as many lines for the same run and width."""
    text = Text(no_wrap=True, overflow="crop")
    _bar(text, view, width, ascii_only)
    text.append("\n")
    parts = [
        (f"{_grouped(view.numbers.get('tokens_per_second')):>9} tokens/s", "bold"),
        (f"{_percent(view.share_of_peak):>4} of peak", ""),
        (f"lr {_rate(view.numbers.get('lr')):>7}", ""),
        (f"heads {_rate(view.numbers.get('head_lr')):>7}", ""),
        (f"conflict {_percent(view.numbers.get('conflicts')):>4}", ""),
        (f"{_bytes(view.memory):>8}", ""),
    ]
    for place, (part, style) in enumerate(parts):
        part = ("  " if place else "") + part
        if len(text.plain.rpartition("\n")[2]) + len(part) > width:
            break
        text.append(part, style if colours else "")
    tasks = list(view.tasks)[:MOST_TASKS]
    shown = max([7, *map(len, tasks)])
    shown = min(shown, max(7, width - 30))
    text.append(f"\n{'':<{shown}}  {'loss':>7}  {'dev':>6}  {'best':>6}", "dim" if colours else "")
    for task in [*tasks, "overall"]:
        loss = _number(view.losses.get(task)) if task != "overall" else ""
        text.append(f"\n{_cut(task, shown):<{shown}}  {loss:>7}", "bold" if colours and task == "overall" else "")
        text.append(f"  {_number(view.scores.get(task)):>6}  ")
        text.append(f"{_number(view.best.get(task)):>6}", "green" if colours else "")
        if task == "overall":
            text.append(f"  at {view.best_step}" if view.best_step is not None else "")
            more = len(view.tasks) - len(tasks)
            text.append(f"  ({more} more tasks)" if more else "")
    if ascii_only:
        text = Text(text.plain.replace("–", "-"), no_wrap=True, overflow="crop")
    return text


def _bar(text: Text, view: View, width: int, ascii_only: bool) -> None:
    total = "?" if view.total is None else f"{view.total}"
    digits = max(5, len(total))
    share = min(1.0, view.step / view.total) if view.total else 0.0
    head = f"step {view.step:>{digits}}/{total}  "
    left = view.state or f"{clock(view.seconds_left)} left"
    tail = f"  {share:>4.0%}  {clock(view.elapsed):>6}  {left:>11}"
    room = width - len(head) - len(tail)
    text.append(head)
    if room >= 4:
        full, empty = ("#", "-") if ascii_only else ("━", "╌")
        done = round(room * share)
        text.append(full * done, "cyan")
        text.append(empty * (room - done), "dim")
    text.append(tail[:width])


class LivePanel:
    """The panel as rich draws it, at whatever size the terminal has at that moment."""

    def __init__(self, view: View, ascii_only: bool):
        self.view, self.ascii_only = view, ascii_only

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield panel(self.view, options.max_width, self.ascii_only)


def line(view: View) -> str:
    """One line, for a log."""
    losses = " ".join(f"{name} {_number(view.losses[name])}" for name in view.tasks if name in view.losses)
    parts = [f"step {view.step:>6}/{view.total or '?'}", f"loss {losses}" if losses else ""]
    scores = " ".join(
        f"{name} {_number(view.scores[name])}" for name in (*view.tasks, "overall") if name in view.scores
    )
    parts += [f"dev {scores}"] if scores else []
    if speed := view.numbers.get("tokens_per_second"):
        share = f" ({view.share_of_peak:.0%} of peak)" if view.share_of_peak else ""
        parts.append(f"{speed:.0f} tokens/s{share}")
    parts += [f"lr {_rate(view.numbers['lr'])}"] if "lr" in view.numbers else []
    parts += [f"conflict {view.numbers['conflicts']:.0%}"] if "conflicts" in view.numbers else []
    parts += [_bytes(view.memory)] if view.memory else []
    parts += [f"left {clock(view.seconds_left)}"] if view.seconds_left is not None else []
    return "  ".join(filter(None, parts))


def as_json(view: View) -> dict[str, Any]:
    """Everything, under names that stay; None for what is not known."""
    return {
        "run": view.name,
        "state": view.state or None,
        "step": view.step,
        "total_steps": view.total,
        "seconds_left": view.seconds_left,
        "elapsed": view.elapsed,
        "losses": view.losses,
        "scores": view.scores,
        "dev_losses": view.dev_losses,
        "best": view.best,
        "best_step": view.best_step,
        "tokens_per_second": view.numbers.get("tokens_per_second"),
        "share_of_peak": view.share_of_peak,
        "lr": view.numbers.get("lr"),
        "head_lr": view.numbers.get("head_lr"),
        "conflicts": view.numbers.get("conflicts"),
        "memory": view.memory,
        "time": time.time(),
    }


def is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def may_live(console: Console) -> bool:
    """Whether a panel that is drawn over and over can be read there."""
    return console.is_terminal and not console.is_dumb_terminal and (console.width > 80 or not is_ascii(console))


def _grouped(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def _number(value: float | None) -> str:
    """Six characters or less of a loss, a score, or a perplexity."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}" if abs(value) >= 1e5 else f"{value:.0f}"


def _bytes(count: int | None) -> str:
    if not count:
        return "–"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "~"
