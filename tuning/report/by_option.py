"""Charts of a search over its options: what the hyperparameters had to do with the score."""

from typing import Any

import numpy as np

from minbert.tuning.report.found import Found
from minbert.tuning.report.importance import importances, scores_at_equal_share
from minbert.tuning.report.page import COLOURS, GREY, RED, Chart, escaped, figure, of_trial, setting
from minbert.tuning.space import Choice, Distribution, LogUniform, Uniform
from minbert.tuning.trial import Trial


def against(found: Found) -> list[Any]:
    """A small chart for each option: every trial's score over its value."""
    import plotly.graph_objects as go

    groups = [("trained to the end", "finished", COLOURS[0], "circle"), ("stopped early", "stopped", GREY, "x")]
    groups += [("not over", "running", RED, "circle-open"), ("not over", "pending", RED, "circle-open")]
    charts: list[Any] = [
        "Each point is a trial. Trials that were stopped early stand where they were stopped: lower also because they "
        "were trained for less."
    ]
    for name, kind in found.search.space.items():
        traces = []
        for label, status, colour, symbol in groups:
            members = [trial for trial in found.points if trial.status == status]
            if members:
                traces.append(
                    go.Scatter(
                        x=[_place(kind, found.inside[trial.name][name], trial) for trial in members],
                        y=[trial.score for trial in members],
                        mode="markers",
                        marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.85},
                        name=label,
                        customdata=[trial.name for trial in members],
                        text=[found.hover(trial) for trial in members],
                        hovertemplate="%{text}<extra></extra>",
                    )
                )
        axis: dict[str, Any] = {"title": {"text": name}}
        if isinstance(kind, Choice):
            ticks = list(range(len(kind.values)))
            axis |= {"tickvals": ticks, "ticktext": [escaped(setting(v)) for v in kind.values]}
            axis |= {"range": [-0.5, len(ticks) - 0.5]}
        elif isinstance(kind, LogUniform):
            axis |= {"type": "log", **_decades(kind), "range": [np.log10(kind.low) - 0.05, np.log10(kind.high) + 0.05]}
        elif isinstance(kind, Uniform):
            margin = 0.03 * (kind.high - kind.low)
            axis["range"] = [kind.low - margin, kind.high + margin]
        charts.append(Chart(name, figure(*traces, xaxis=axis, yaxis={"title": {"text": "score"}}), height=280))
    return charts


def _decades(kind: LogUniform) -> dict[str, Any]:
    """Ticks at the powers of ten, over short ranges at 2 and 5 times as well: plotly's own say little there."""
    steps = (1, 2, 5) if kind.high / kind.low < 300 else (1,)
    ticks = [m * 10.0**e for e in range(-12, 12) for m in steps]
    ticks = [tick for tick in ticks if kind.low * 0.999 <= tick <= kind.high * 1.001]
    return {"tickvals": ticks, "ticktext": [f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e") for tick in ticks]}


def _place(kind: Distribution, value: Any, trial: Trial) -> float:
    """A number as it is; another choice at its place in the list, beside other trials with the same."""
    if not isinstance(kind, Choice):
        return value
    return kind.values.index(value) + 0.5 * ((trial.number * 0.618) % 1 - 0.5)


def importance(found: Found) -> list[Any]:
    import plotly.graph_objects as go

    points = found.points
    share, scores = scores_at_equal_share(points)
    forest = importances(found.search.space, [found.inside[trial.name] for trial in points], scores)
    if forest is None:
        return ["There are too few trials with different scores to tell which hyperparameters mattered."]
    options = forest.options[::-1]
    bars = go.Bar(
        x=[option.mean for option in options],
        y=[option.option for option in options],
        error_x={"type": "data", "array": [option.deviation for option in options], "color": GREY, "thickness": 1},
        orientation="h",
        marker={"color": COLOURS[0]},
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    trust = (
        "that is too little to trust the order below"
        if forest.explained < 0.2
        else "so the order below says something, the small values nothing"
    )
    text = (
        f"A random forest learnt the score from the hyperparameters. Of trials that it had not seen, it predicts "
        f"{max(forest.explained, 0):.0%} of the variance: {trust}. All scores are taken at {share:.0%} of the budget, "
        f"which every trial reached ({len(points)} trials)."
    )
    note = "Rise of the error when one option's values are shuffled, as a share of the variance; with the deviation."
    drawn = figure(bars, xaxis={"title": {"text": "share of the variance"}}, showlegend=False)
    return [text, Chart("Permutation importance", drawn, note, height=90 + 28 * len(options))]


def parallel(found: Found) -> Chart | str:
    """Lines of SVG, not plotly's own parallel coordinates, which need WebGL and scripts made at run time."""
    import plotly.graph_objects as go

    space, scored = found.search.space, found.points
    if not scored:
        return "No trial that lies in the newest space has a score yet."
    names = [*space, "score"]
    scores = np.array([trial.score for trial in scored])
    low, high = float(scores.min()), float(scores.max())
    traces = []
    for trial in reversed(scored):  # the best on top
        rank = (trial.score - low) / (high - low) if high > low else 1.0
        heights = [_height(kind, found.inside[trial.name][name]) for name, kind in space.items()]
        traces.append(
            go.Scatter(
                x=list(range(len(names))),
                y=[*heights, rank],
                mode="lines+markers",
                marker={"size": 5},
                line={"color": COLOURS[0] if rank > 0.75 else GREY, "width": 1 + 2 * rank},
                opacity=0.5 + 0.5 * rank,
                text=[found.hover(trial)] * len(names),
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
                **of_trial(trial.name),
            )
        )
    notes = []
    for place, name in enumerate(names):
        marks = _marks(space[name]) if name != "score" else [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]
        for height, text in marks:
            notes.append(
                {"x": place, "y": height, "text": escaped(text), "showarrow": False, "xanchor": "left", "xshift": 4}
                | {"font": {"size": 11}}
            )
    drawn = figure(
        *traces,
        xaxis={"tickvals": list(range(len(names))), "ticktext": names, "range": [-0.1, len(names) - 0.7]}
        | {"side": "top", "zeroline": False, "gridwidth": 2},
        yaxis={"visible": False, "range": [-0.08, 1.08]},
        annotations=notes,
        hovermode="closest",
        meta={"axes": True},  # every place on x is an axis of its own
        margin={"l": 64, "r": 64, "t": 40, "b": 16},
    )
    note = "Each line is a trial; the higher its score, the thicker; in blue the upper quarter of the range. "
    note += "A box that is drawn on an axis keeps the trials that pass through it; with shift, on another one too."
    return Chart("Every trial's configuration", drawn, note, wide=True, height=420, least_width=95 * len(names))


def _height(kind: Distribution, value: Any) -> float:
    """Where on its axis, from 0 to 1, a value stands."""
    if isinstance(kind, Choice):
        return kind.values.index(value) / (len(kind.values) - 1) if len(kind.values) > 1 else 0.5
    low, high = kind.low, kind.high
    if isinstance(kind, LogUniform):
        low, high, value = np.log(low), np.log(high), np.log(value)
    return float((value - low) / (high - low))


def _marks(kind: Distribution) -> list[tuple[float, str]]:
    values = kind.values if isinstance(kind, Choice) else (kind.low, kind.high)
    return [(_height(kind, value), setting(value)) for value in values]
