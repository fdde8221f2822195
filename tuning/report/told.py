"""What a chart shows, in words, for who cannot see it: the text alternative is the finding, not the kind of chart."""

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

MOST = 6  # traces that are told


def told(figure: Any) -> str:
    """A sentence for each of the first traces of a plotly figure, and how many there are besides."""
    traces = [trace for trace in figure.data if trace.hoverinfo != "skip"]
    axis = figure.layout.xaxis
    places = list(axis.ticktext or ()) if list(axis.tickvals or ()) == list(range(len(axis.tickvals or ()))) else []
    said = [text for trace in traces[:MOST] if (text := _trace(trace, places))]
    if len(traces) > MOST:
        said.append(f"And {len(traces) - MOST} more.")
    return " ".join(said)


def _trace(trace: Any, places: Sequence[str]) -> str:
    """`places`: names of the whole numbers on the axis, where they stand for something."""
    name = f"{_plain(trace.name)}: " if trace.name else ""
    if trace.type == "heatmap":
        return _cells(trace)
    if trace.type == "histogram":
        values = _numbers(trace.x)
        return f"{name}{len(values)} values, {_number(min(values))} to {_number(max(values))}." if values else ""
    if trace.type == "bar":
        return f"{name}{len(trace.x)} spans." if trace.base is not None else _bars(name, trace)
    x, y = list(trace.x if trace.x is not None else ()), list(trace.y if trace.y is not None else ())
    if trace.error_x is not None and trace.error_x.array is not None:
        reaches = zip(y, x, trace.error_x.array)
        return " ".join(
            f"{_plain(who)} {_number(value)} ± {_number(reach)}." for who, value, reach in list(reaches)[:12]
        )
    if places:
        x = [places[min(len(places) - 1, max(0, round(at)))] for at in x]
    points = [(at, value) for at, value in zip(x, y) if isinstance(value, numbers.Real) and math.isfinite(value)]
    if not points:
        return ""
    if "lines" in (trace.mode or ""):
        (first, start), (last, end) = points[0], points[-1]
        top, best = max(points, key=lambda point: point[1])
        text = f"{name}from {_number(start)} at {_number(first)} to {_number(end)} at {_number(last)}"
        return text + (f", the highest {_number(best)} at {_number(top)}." if best > max(start, end) else ".")
    values = [value for _, value in points]
    top = _number(max(points, key=lambda point: point[1])[0])
    return f"{name}{len(points)} points, {_number(min(values))} to {_number(max(values))}, the highest at {top}."


def _bars(name: str, trace: Any) -> str:
    values, names = (trace.x, trace.y) if trace.orientation == "h" else (trace.y, trace.x)
    pairs = [
        (value, who) for value, who in zip(values, names) if isinstance(value, numbers.Real) and math.isfinite(value)
    ]
    if not pairs:
        return ""
    (high, most), (low, least) = max(pairs, key=lambda p: p[0]), min(pairs, key=lambda p: p[0])
    return f"{name}largest {_number(most)} with {_number(high)}, smallest {_number(least)} with {_number(low)}."


def _cells(trace: Any) -> str:
    cells = [
        (value, f"{_plain(row)}, {_plain(column)}")
        for row, values in zip(trace.y, trace.z)
        for column, value in zip(trace.x, values)
        if isinstance(float(value), float) and math.isfinite(value)
    ]
    if not cells:
        return ""
    (high, most), (low, least) = max(cells), min(cells)
    return f"Highest {_number(high)} ({most}), lowest {_number(low)} ({least})."


def _numbers(values: Any) -> Sequence[float]:
    return [float(value) for value in values if math.isfinite(float(value))] if values is not None else []


def _number(value: Any) -> str:
    return f"{float(value):.3g}" if isinstance(value, numbers.Real) else _plain(value)


def _plain(text: Any) -> str:
    return re.sub(r"<[^>]*>", " ", str(text)).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
