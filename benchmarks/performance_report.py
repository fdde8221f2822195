"""What `performance.py` leaves behind: every turn as JSON, the tables, and a plot."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from pathlib import Path

from turns import Measured, Ratio, Turn, speed


@dataclass(frozen=True)
class Aim:
    """What a ratio should be, and what it is; None where it could not be measured."""

    text: str
    bound: float
    value: float | None
    is_least: bool

    @staticmethod
    def at_least(text: str, bound: float, side: Measured, other: Measured) -> "Aim":
        """`side` does at least `bound` times the work of `other` in the same time."""
        return Aim(text, bound, speed(side, other).median if side.turns and other.turns else None, True)

    @staticmethod
    def at_most(text: str, bound: float, side: Measured, other: Measured) -> "Aim":
        """`side` takes at most `bound` times the time of `other` for the same work."""
        return Aim(text, bound, speed(other, side).median if side.turns and other.turns else None, False)

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def row(self) -> str:
        found = "-" if self.value is None else f"{self.value:.2f}"
        verdict = {True: "reached", False: "missed", None: "not measured"}[self.reached]
        return f"| {self.text} | {'≥' if self.is_least else '≤'} {self.bound:g} | {found} | {verdict} |"


@dataclass
class Comparison:
    """Sides that took turns. Ratios are to the side `base`. `operations` of a unit of work, and the side `peak` whose
    work are operations, give the share of the machine's peak."""

    section: str
    setting: str
    unit: str
    base: str
    sides: list[Measured]
    operations: float | None = None
    peak: Measured | None = None
    aims: list[Aim] = field(default_factory=list)

    def side(self, name: str) -> Measured:
        return next((side for side in self.sides if side.name == name), Measured(name, why="not asked for"))

    def ratio(self, side: Measured, cpu: bool = False) -> Ratio | None:
        base = self.side(self.base)
        return speed(side, base, cpu) if side.turns and base.turns else None

    def share_of_peak(self, side: Measured) -> float | None:
        if self.operations is None or self.peak is None or not self.peak.turns or not side.turns:
            return None
        return self.operations * speed(side, self.peak).median

    def table(self) -> str:
        """Markdown."""
        lines = [f"### {self.section}: {self.setting}", ""]
        if self.peak is not None and self.peak.turns:
            lines += [f"Peak of a matrix product: {_median(self.peak) / 1e9:,.0f} GFLOP/s.", ""]
        lines += [
            f"| side | {self.unit} a second | speed to {self.base} | by processor time | share of peak | MiB |",
            "|---|---|---|---|---|---|",
        ]
        for side in self.sides:
            if side.why:
                reason = "failed" if side.failed else "left out"
                lines.append(f"| {side.name} | {reason}: {side.why.splitlines()[-1].replace('|', '/')} | | | | |")
                continue
            share = self.share_of_peak(side)
            rate = _median(side)
            cells = [
                side.name,
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
                _show(self.ratio(side)),
                _show(self.ratio(side, cpu=True)),
            ]
            cells += ["" if share is None else f"{share:.0%}", f"{side.memory:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        if any(side.scores for side in self.sides):
            lines += ["", *(f"Dev scores of {side.name}: {side.scores}." for side in self.sides if side.scores)]
        if self.aims:
            lines += ["", "| aim | | found | |", "|---|---|---|---|", *(aim.row() for aim in self.aims)]
        return "\n".join([*lines, ""])


def _median(side: Measured) -> float:
    return Ratio.of([turn.rate for turn in side.turns]).median


def _show(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.low == ratio.high:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def describe_machine() -> dict[str, str]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {"processor": models[0] if models else platform.machine(), "cores": str(len(os.sched_getaffinity(0)))}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found | {
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def keep(folder: Path, comparison: Comparison, machine: dict[str, str], command: str) -> None:
    """Add a comparison to the results in `folder`, in place of an earlier one of the same things."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    old = json.loads(file.read_text()) if file.exists() else []
    new = asdict(comparison) | {"machine": machine, "command": command}
    key = (comparison.section, comparison.setting)
    results = [each for each in old if (each["section"], each["setting"]) != key] + [new]
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(file)
    comparisons = [_read(each) for each in results]
    shown = ", ".join(f"{name} {value}" for name, value in machine.items())
    notes = (
        f"Machine: {shown}. Medians over the rounds, ratios within a round, with their range. MiB: the most that a\n"
        "process held above what was loaded before the first step; of an epoch, all that it held.\n"
    )
    (folder / "results.md").write_text("\n".join([notes, *(each.table() for each in comparisons)]))
    (folder / "results.svg").write_text(plot(comparisons))


def _read(raw: dict) -> Comparison:
    def side(raw: dict) -> Measured:
        return Measured(**raw | {"turns": [Turn(**turn) for turn in raw["turns"]]})

    known = {key: raw[key] for key in Comparison.__dataclass_fields__}
    known["sides"] = [side(each) for each in raw["sides"]]
    known["peak"] = raw["peak"] and side(raw["peak"])
    known["aims"] = [Aim(**each) for each in raw["aims"]]
    return Comparison(**known)


BAR, LEFT, WIDE, RIGHT = 18, 290, 420, 150  # pixels


def plot(comparisons: list[Comparison]) -> str:
    """The speed of every side as a bar, with its range, as SVG; each comparison is drawn to a scale of its own."""
    parts, y = [], 10
    for comparison in comparisons:
        ratios = [(side, ratio) for side in comparison.sides if (ratio := comparison.ratio(side))]
        scale = WIDE / max((ratio.high for _, ratio in ratios), default=1.0)
        y += 20
        title = f"{comparison.section}: {comparison.setting}"
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 8
        for side, ratio in ratios:
            middle, colour = y + BAR / 2, "#999" if side.name == comparison.base else "#2a6fbb"
            low, high = LEFT + ratio.low * scale, LEFT + ratio.high * scale
            parts += [
                f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(side.name)}</text>',
                f'<rect x="{LEFT}" y="{y + 2}" width="{ratio.median * scale:.1f}" height="{BAR - 4}" fill="{colour}"/>',
                f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 5}v{BAR - 10}M{high:.1f} {y + 5}v{BAR - 10}" '
                'stroke="#222"/>',
                f'<text x="{max(high, LEFT) + 6:.1f}" y="{middle + 4}">{ratio.median:.2f}</text>',
            ]
            y += BAR
    size = f'width="{LEFT + WIDE + RIGHT}" height="{y + 20}"'
    style = "text{font:12px sans-serif;fill:#222}"
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{background}{"".join(parts)}</svg>\n'
