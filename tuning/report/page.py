"""The page: sections of paragraphs, tables and charts, rendered to one HTML file that asks nobody for anything.

Style, script and plotly.js are inside the file. A content security policy lets only these run and forbids every
request, so the page works offline, and text from a data set can neither run nor load anything.
"""

import base64
import csv
import hashlib
import html
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minbert.data.files import replacing
from minbert.tuning.report.told import told

# Distinct from each other, also for the colour-blind, each with a contrast of 4.5:1 or more to a white page; on a dark
# page the script puts the second of each pair in its place, for which the same holds.
_PAIRS = (
    ("#1f5fc4", "#7fb0ff"),
    ("#a85a00", "#f0a04b"),
    ("#0f766e", "#4fc3b3"),
    ("#a8327f", "#e884bd"),
    ("#6a48c4", "#b39af0"),
    ("#6b6a00", "#c9c552"),
    ("#55616e", "#a3b0bd"),
)
COLOURS = tuple(light for light, _ in _PAIRS)
GREY, RED = "#667080", "#b3293d"
DARK = dict(_PAIRS) | {GREY: "#98a2ad", RED: "#f07b88"}
# Translucent, so that text on it can be read on a white and on a dark page: red below 0, blue above.
DIVERGING = [[0, "rgba(209,73,91,0.6)"], [0.5, "rgba(138,146,156,0.06)"], [1, "rgba(59,125,216,0.6)"]]
RISING = [[0, "rgba(59,125,216,0.04)"], [1, "rgba(59,125,216,0.6)"]]


@dataclass(frozen=True)
class Table:
    """Cells are shown as they stand; the first `text_columns` are text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text_columns: int = 1
    trials: Sequence[str] = ()  # of whom the rows tell; a selection in the charts keeps theirs


@dataclass(frozen=True)
class Chart:
    """A figure of plotly, without colours of its own for text and background; `note` says how to read it."""

    title: str
    figure: Any  # plotly.graph_objects.Figure
    note: str = ""
    wide: bool = False
    height: int = 320  # pixels
    least_width: int = 0  # pixels; on a narrower screen the chart scrolls


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it: a string is a paragraph."""

    title: str
    parts: Sequence[str | Table | Chart]

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """`warnings` stand above everything else: what is not over, or could not be read."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()  # what it is about: names and values
    above: str = ""  # a link to what it is a part of


@dataclass(frozen=True)
class Report:
    """A page, and its numbers as the rows of a csv, the header first."""

    page: Page
    rows: Sequence[Sequence[Any]]


def write(report: Report, html_file: Path, csv_file: Path) -> None:
    """Write both files. Raises OSError."""
    content = render(report.page)
    with replacing(html_file) as temporary:
        temporary.write_text(content, encoding="utf-8")
    with replacing(csv_file) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(report.rows)


def render(page: Page) -> str:
    """The HTML file."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("minbert.tuning", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["chart"] = lambda part: isinstance(part, Chart)
    environment.filters["figure"] = lambda figure: json.loads(figure.to_json())
    environment.filters["told"] = told
    # What an HTML parser would take for the end of the script may stand in strings of it.
    scripts = [_source(environment, "page.js"), get_plotlyjs()]
    scripts = [script.replace("</script", "<\\/script") for script in scripts]
    return environment.get_template("page.html").render(
        page=page,
        dark=DARK,
        style=Markup(_source(environment, "page.css")),
        script=Markup(scripts[0]),
        plotly=Markup(scripts[1]),
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )


def figure(*traces: Any, **layout: Any) -> Any:
    """A figure with what all of them have in common; its colours come with the page."""
    import plotly.graph_objects as go

    common = {
        "margin": {"l": 56, "r": 16, "t": 30, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        "hoverlabel": {"align": "left", "namelength": -1},
    }
    found = go.Figure(list(traces), layout=common)
    found.update_layout(template=None, **layout)
    found.update_xaxes(automargin=True)
    found.update_yaxes(automargin=True, exponentformat="power")
    for name, axis in (("x", found.layout.xaxis), ("y", found.layout.yaxis)):
        if axis.type == "log" and axis.ticktext is None:
            axis.tickformat = "~g"  # plotly's own are 2 and 5 for 0.2 and 50
            drawn = [trace[name] for trace in found.data if trace[name] is not None]
            values = [value for each in drawn for value in each if value is not None and value > 0]
            if values and 5 < max(values) / min(values) < 100:
                axis.dtick = "D2"  # plotly's own lie over each other
        if any(trace.type == "heatmap" for trace in found.data):
            axis.showgrid = False  # lines through the numbers
    return found


def of_trial(name: str) -> dict[str, Any]:
    """What says of a trace that it is a trial's; of the points of one, `customdata` says whose each is."""
    return {"meta": {"trial": name}}


def link(text: str, target: str) -> str:
    """A cell that leads to another place."""
    return Markup('<a href="{}">{}</a>').format(target, text)


def seeds_curve(name: str, curves: Sequence[Mapping[int, float]], colour: str, dash: str = "solid") -> Any:
    """One line for several seeds: the mean at every step that all of them have, with the standard deviation as bars.
    `curves`: of each seed, step -> value."""
    import plotly.graph_objects as go

    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    deviations = [statistics.stdev(each) for each in values] if len(curves) > 1 else None
    return go.Scatter(
        x=steps,
        y=[statistics.fmean(each) for each in values],
        error_y={"type": "data", "array": deviations, "thickness": 1, "width": 3} if deviations else None,
        mode="lines+markers" if len(steps) < 40 else "lines",
        line={"color": colour, "dash": dash, "width": 1.8},
        marker={"size": 4},
        name=name,
        hovertemplate=escaped(name) + ": %{y:.3f} at step %{x}<extra></extra>",
    )


def escaped(text: object) -> str:
    """Text for a label or a tooltip of a chart, where plotly would read markup."""
    return html.escape(str(text), quote=False).replace("\n", "<br>")


def lines(texts: Iterable[str], width: int = 70) -> str:
    """Several texts for a tooltip, escaped and wrapped."""
    import textwrap

    wrapped = (line for text in texts for line in textwrap.wrap(text, width)[:6])
    return "<br>".join(escaped(line) for line in wrapped)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or value != value:
        return "–"
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def setting(value: Any) -> str:
    """The value of an option for a table."""
    if value is None:
        return "not set"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _source(environment: Environment, name: str) -> str:
    return environment.loader.get_source(environment, name)[0]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
