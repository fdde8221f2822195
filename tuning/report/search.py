"""The page of a search: which trials were best, and what their hyperparameters had to do with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minbert.data.errors import UserError
from minbert.trainer.config import parse_config
from minbert.tuning.report.facts import facts
from minbert.tuning.report.importance import importances, scores_at_equal_share
from minbert.tuning.report.page import (
    COLOURS,
    GREY,
    RED,
    Chart,
    Page,
    Report,
    Section,
    Table,
    duration,
    escaped,
    figure,
    number,
    setting,
)
from minbert.tuning.search import Search
from minbert.tuning.space import Choice, Distribution, LogUniform, Parameters, Uniform
from minbert.tuning.trial import METRIC, Trial, best, interrupted, ranked

SHOWN = 10  # trials in the table of the best
HIGHLIGHTED = 5  # learning curves in colour


@dataclass(frozen=True)
class Found:
    """What the page shows. Where the search has gone on in another space, charts about options have the trials that lie
    in the newest one."""

    search: Search
    trials: Sequence[Trial]
    scored: Sequence[Trial]  # the best first
    values: Mapping[str, Parameters]  # of a trial, by name: of all options that were ever searched
    inside: Mapping[str, Parameters]  # those of the trials that lie in the newest space

    @classmethod
    def of(cls, search: Search, trials: Sequence[Trial]) -> "Found":
        scored = [trial for trial in ranked(trials) if trial.steps and trial.earned()]
        values = {t.name: search.values(t.parameters) if search.earlier else t.parameters for t in trials}
        points = {trial.name: search.point(trial.number, trial.parameters) for trial in trials}
        inside = {name: point for name, point in points.items() if point is not None}
        return cls(search, trials, scored, values, inside)

    @property
    def options(self) -> list[str]:
        """All that were ever searched, those of the newest space first."""
        return list(dict.fromkeys(name for space in reversed(self.search.spaces) for name in space))

    @property
    def points(self) -> list[Trial]:
        """Those of `scored` that lie in the newest space."""
        return [trial for trial in self.scored if trial.name in self.inside]

    def space(self, trial: Trial) -> str:
        """From which a trial was drawn, in words for a table."""
        place = self.search.space_of(trial.number) + 1
        return str(place) if trial.name in self.inside else f"{place}, outside"

    def row(self, trial: Trial) -> list[str]:
        """The last cells of a trial in a table: its space, if there are several, and its options."""
        return [self.space(trial)] * bool(self.search.earlier) + [
            setting(self.values[trial.name][name]) for name in self.options
        ]

    @property
    def header(self) -> list[str]:
        return ["space"] * bool(self.search.earlier) + self.options


def search_report(folder: Path) -> Report:
    """The report of the search in `folder`, over or not. Raises UserError if no trial has a score yet."""
    search = Search.read(folder)
    trials = search.trials(folder)
    interrupted(trials, folder)
    found = Found.of(search, trials)
    if not found.scored:
        raise UserError(f"no trial of {folder} has a score yet")
    sections = [
        Section("The search", [_summary(found), _settings(search)]),
        Section("Best configurations", _best(found, folder)),
        Section("Best so far", [_history(found.scored)]),
        Section("Score against each hyperparameter", _against(found)),
        Section("Importance", _importance(found)),
        Section("Parallel coordinates", [_parallel(found)]),
        Section("Learning curves", [_curves(found.scored)]),
        Section("All trials", [_all(found)]),
    ]
    began = min((trial.started for trial in trials if trial.started), default=None)
    ended = max((trial.ended for trial in trials if trial.ended), default=None)
    about = facts(folder, parse_config(search.base, "search.yaml"), began, ended)
    page = Page(f"Search {folder.name}", _subtitle(trials), sections, _warnings(search, trials), about)
    return Report(page, _rows(found))


def _subtitle(trials: Sequence[Trial]) -> str:
    winner = best(trials)
    return f"{len(trials)} trials, best {METRIC} {winner.score:.3f} ({winner.name})"


def _warnings(search: Search, trials: Sequence[Trial]) -> list[str]:
    warnings = []
    left = search.samples - sum(trial.over for trial in trials)
    if left:
        warnings.append(
            f"The search is not over: {left} of {search.samples} trials are still to be trained or finished."
        )
    if failed := [trial for trial in trials if trial.status == "failed"]:
        lines = [f"{trial.name}: {trial.error}" for trial in failed[:SHOWN]]
        lines += [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
        warnings.append("\n".join(["Trials that failed and count for nothing:", *lines]))
    return warnings


def _summary(found: Found) -> str:
    search, trials = found.search, found.trials
    count = {status: sum(trial.status == status for trial in trials) for status in ("finished", "stopped", "failed")}
    done = [f"{count['finished']} were trained to the end"]
    done += [f"{count['stopped']} were stopped early"] if count["stopped"] else []
    done += [f"{count['failed']} failed"] if count["failed"] else []
    trained = sum(trial.step for trial in trials)
    whole = sum(trial.steps or 0 for trial in trials if trial.step)
    saved = f" Stopping early left out {1 - trained / whole:.0%} of the steps." if count["stopped"] and whole else ""
    return (
        f"Of {search.samples} trials {', '.join(done)}.{saved} A trial's score is its best {METRIC}, on the dev splits."
        + _moves(found)
    )


def _moves(found: Found) -> str:
    if not found.search.earlier:
        return ""
    before = [trial for trial in found.trials if trial.number < found.search.first]
    inside = sum(trial.name in found.inside for trial in before)
    return (
        f" The search went on in another space from trial-{found.search.first:04d} on. Of the {len(before)} trials "
        f"before, {inside} lie in it, with the values that they had of all its options: the search learns from them, "
        "and they are in all charts. The others are in the tables, the history and the curves."
    )


def _settings(search: Search) -> Table:
    rows = [("algorithm", search.algorithm), ("scheduler", search.scheduler), ("seed", str(search.seed))]
    if not search.earlier:
        rows += [(name, _describe(kind)) for name, kind in search.space.items()]
        return Table(("option", "value"), rows, text_columns=2)
    starts = [0, *(earlier.trials for earlier in search.earlier)]
    header = [f"{place}, from trial-{start:04d}" for place, start in enumerate(starts, 1)]
    names = dict.fromkeys(name for space in search.spaces for name in space)
    rest = search.values({})
    rows = [(name, *[value] * len(starts)) for name, value in rows]
    for name in names:
        cells = [_describe(s[name]) if name in s else f"{setting(rest[name])} (not searched)" for s in search.spaces]
        rows.append((name, *cells))
    return Table(("option, in space", *header), rows, text_columns=len(header) + 1)


def _describe(kind: Distribution) -> str:
    if isinstance(kind, Choice):
        return "one of " + ", ".join(setting(value) for value in kind.values)
    scale = ", evenly in the logarithm" if isinstance(kind, LogUniform) else ""
    return f"{setting(kind.low)} to {setting(kind.high)}{scale}"


def _best(found: Found, folder: Path) -> list[Any]:
    tasks = parse_config(found.search.base, "search.yaml").corpus.names
    rows = []
    for trial in found.scored[:SHOWN]:
        record = _best_record(trial)
        scores = [number(record.get(f"dev/{name}")) for name in tasks]
        place = f"{trial.step}/{trial.steps}"
        rows.append([trial.name, trial.status, number(trial.score), *scores, place, *found.row(trial)])
    header = ["trial", "status", "overall", *tasks, "steps", *found.header]
    return [
        "The task scores are those of the evaluation with the best overall score. minbert tune --best "
        f"{folder.name} starts the full run from the first, whose configuration is in best.yaml.",
        Table(header, rows, text_columns=2),
    ]


def _history(scored: Sequence[Trial]) -> Chart:
    """Each trial at its end, and the best score until then."""
    import plotly.graph_objects as go

    over = sorted((trial for trial in scored if trial.over), key=lambda trial: (trial.ended or 0.0, trial.number))
    best_so_far = list(accumulate((trial.score for trial in over), max))
    places = list(range(1, len(over) + 1))
    points = go.Scatter(
        x=places,
        y=[trial.score for trial in over],
        mode="markers",
        marker={"color": GREY, "size": 7, "symbol": ["x" if trial.status == "stopped" else "circle" for trial in over]},
        name="a trial",
        text=[f"{escaped(trial.name)}: {trial.score:.3f}" for trial in over],
        hovertemplate="%{text}<extra></extra>",
    )
    line = go.Scatter(
        x=places,
        y=best_so_far,
        mode="lines",
        line={"color": COLOURS[0], "width": 2, "shape": "hv"},
        name="the best so far",
        hovertemplate="best of %{x}: %{y:.3f}<extra></extra>",
    )
    drawn = figure(points, line, xaxis={"title": {"text": "trials that are over"}}, yaxis={"title": {"text": METRIC}})
    since = next((place for place, score in zip(places, best_so_far) if score == best_so_far[-1]), 0)
    note = f"In the order in which they ended; a cross was stopped early. The best was number {since} of {len(over)}."
    return Chart("The best score over the search", drawn, note if over else "No trial is over yet.", wide=True)


def _best_record(trial: Trial) -> dict[str, Any]:
    return max(trial.earned(), key=lambda record: record[METRIC])


def _hover(found: Found, trial: Trial) -> str:
    lines = [f"{trial.name}: {trial.score:.3f} at {trial.step}/{trial.steps}"]
    lines += [f"{name} {setting(value)}" for name, value in found.inside[trial.name].items()]
    return "<br>".join(escaped(line) for line in lines)


def _against(found: Found) -> list[Any]:
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
                        text=[_hover(found, trial) for trial in members],
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


def _importance(found: Found) -> list[Any]:
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


def _parallel(found: Found) -> Chart | str:
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
                mode="lines",
                line={"color": COLOURS[0] if rank > 0.75 else GREY, "width": 1 + 2 * rank},
                opacity=0.5 + 0.5 * rank,
                text=[_hover(found, trial)] * len(names),
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
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
        margin={"l": 64, "r": 64, "t": 40, "b": 16},
    )
    note = "Each line is a trial; the higher its score, the thicker; in blue the upper quarter of the range."
    return Chart("Every trial's configuration", drawn, note, wide=True, height=420)


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


def _curves(scored: Sequence[Trial]) -> Chart:
    import plotly.graph_objects as go

    traces = []
    for place, trial in reversed(list(enumerate(scored))):
        records = trial.evaluations()
        best_ones = place < HIGHLIGHTED
        stopped = trial.status == "stopped"
        colour = COLOURS[place] if best_ones else GREY
        traces.append(
            go.Scatter(
                x=[100 * record["step"] / trial.steps for record in records],
                y=[record[METRIC] for record in records],
                mode="lines+markers",
                line={"color": colour, "width": 2 if best_ones else 1},
                opacity=1 if best_ones else 0.55,
                marker={
                    "size": [0] * (len(records) - 1) + [9 if stopped else 5],
                    "symbol": ["circle"] * (len(records) - 1) + ["x" if stopped else "circle"],
                },
                name=f"{trial.name} {trial.score:.3f}",
                showlegend=best_ones,
                legendrank=place,
                hovertemplate=escaped(trial.name) + ": %{y:.3f} at %{x:.0f}%<extra></extra>",
            )
        )
    drawn = figure(
        *traces,
        xaxis={"title": {"text": "share of the budget, %"}, "range": [0, 102]},
        yaxis={"title": {"text": METRIC}},
        hovermode="closest",
    )
    note = f"In colour the best {min(HIGHLIGHTED, len(scored))}; a cross is where a trial was stopped."
    return Chart("Dev score while training", drawn, note, wide=True, height=420)


def _all(found: Found) -> Table:
    rows = []
    for trial in found.trials:
        seconds = trial.ended - trial.started if trial.started and trial.ended else None
        place = f"{trial.step}/{trial.steps}" if trial.steps else "–"
        rows.append([trial.name, trial.status, number(trial.score), place, duration(seconds), *found.row(trial)])
    return Table(["trial", "status", "overall", "steps", "time", *found.header], rows, text_columns=2)


def _rows(found: Found) -> list[list[Any]]:
    tasks = parse_config(found.search.base, "search.yaml").corpus.names
    fields = ("trial", "number", "status", "score", "step", "steps", "started", "ended", "stopped_by", "error")
    rows: list[list[Any]] = [[*fields, *(f"dev/{name}" for name in tasks), *found.header]]
    for trial in found.trials:
        record = _best_record(trial) if trial.earned() else {}
        own = [trial.name, *(getattr(trial, name) for name in fields[1:])]
        scores = [record.get(f"dev/{name}") for name in tasks]
        space = [found.space(trial)] * bool(found.search.earlier)
        rows.append([*own, *scores, *space, *(found.values[trial.name][name] for name in found.options)])
    return rows
