"""Charts of a search over time: which trial was trained when, at what cost, and what had been found by then."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from markupsafe import Markup

from minbert.data.clock import clock
from minbert.tuning.again import candidates, verdict
from minbert.tuning.report.found import Found
from minbert.tuning.report.links import to_run
from minbert.tuning.report.page import COLOURS, GREY, RED, Chart, Table, escaped, figure, number, of_trial
from minbert.tuning.trial import METRIC, Trial

HIGHLIGHTED = 5  # learning curves in colour
# How a trial ended, in the words, the colours and the order of the page.
ENDINGS: Mapping[str, tuple[str, str]] = {
    "finished": ("trained to the end", COLOURS[0]),
    "stopped": ("stopped early", GREY),
    "failed": ("failed", RED),
    "running": ("not over", COLOURS[1]),
    "pending": ("not over", COLOURS[1]),
}
AGAIN = ("again, with other seeds", COLOURS[2])


def history(scored: Sequence[Trial]) -> Chart:
    """Each trial at its end, and the best score until then."""
    import plotly.graph_objects as go

    over = sorted((trial for trial in scored if trial.over), key=lambda trial: (trial.ended or 0.0, trial.number))
    leaders = list(accumulate(over, lambda leader, trial: max(leader, trial, key=lambda each: each.score)))
    places = list(range(1, len(over) + 1))
    points = go.Scatter(
        x=places,
        y=[trial.score for trial in over],
        mode="markers",
        marker={"color": GREY, "size": 7, "symbol": ["x" if trial.status == "stopped" else "circle" for trial in over]},
        name="a trial",
        customdata=[trial.name for trial in over],
        text=[f"{escaped(trial.name)}: {trial.score:.3f}" for trial in over],
        hovertemplate="%{text}<extra></extra>",
    )
    line = go.Scatter(
        x=places,
        y=[leader.score for leader in leaders],
        mode="lines",
        line={"color": COLOURS[0], "width": 2, "shape": "hv"},
        name="the best so far",
        customdata=[leader.name for leader in leaders],  # the line lies over their points
        hovertemplate="best of %{x}: %{y:.3f}<extra></extra>",
    )
    drawn = figure(points, line, xaxis={"title": {"text": "trials that are over"}}, yaxis={"title": {"text": METRIC}})
    since = next((place for place, leader in zip(places, leaders) if leader is leaders[-1]), 0)
    note = f"In the order in which they ended; a cross was stopped early. The best was number {since} of {len(over)}."
    return Chart("The best score over the search", drawn, note if over else "No trial is over yet.", wide=True)


def curves(scored: Sequence[Trial]) -> Chart:
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
                **of_trial(trial.name),
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


def timeline(found: Found) -> list[Any]:
    """When each trial was trained, beside the others that were trained at the same time, and what that cost."""
    import plotly.graph_objects as go

    trained = [trial for trial in (*found.trials, *found.runs) if trial.turns]
    if not trained:
        return ["No trial has been trained yet."]
    began = min(trial.turns[0][0] for trial in trained)
    whole = max(trial.turns[-1][1] for trial in trained) - began
    unit, seconds = ("hours", 3600) if whole > 7200 else ("minutes", 60) if whole > 120 else ("seconds", 1)
    lanes = _lanes(trained)
    traces = []
    for label, colour, members in _by_ending(found):
        bars = [(trial, turn) for trial in members for turn in trial.turns]
        if bars:
            traces.append(
                go.Bar(
                    base=[(begin - began) / seconds for _, (begin, _) in bars],
                    x=[max(end - begin, whole / 500) / seconds for _, (begin, end) in bars],
                    y=[lanes[trial.name] for trial, _ in bars],
                    width=0.85,  # of a lane; by itself a trace takes all the room between its own bars
                    orientation="h",
                    marker={"color": colour},
                    name=label,
                    customdata=[trial.variant or trial.name for trial, _ in bars],
                    text=[_told(trial) for trial, _ in bars],
                    textposition="none",
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    count = max(lanes.values()) + 1
    drawn = figure(
        *traces,
        xaxis={"title": {"text": f"{unit} since the first trial"}},
        yaxis={"range": [count - 0.5, -0.5], "visible": False},
        barmode="overlay",
        hovermode="closest",
    )
    busy = sum(trial.seconds for trial in trained)
    note = f"{len(trained)} runs in {clock(whole)}, {busy / max(whole, 1e-9):.1f} at a time on average. "
    spent = {
        label: sum(map(cost, members)) / max(sum(map(cost, trained)), 1e-9) for label, _, members in _by_ending(found)
    }
    note += (
        f"{spent['stopped early']:.0%} of the cost went to trials that were stopped early, {spent['failed']:.0%} to "
    )
    note += "failed ones."
    height = 190 + 26 * min(count, 16)
    _legend_below(drawn, height)
    return [Chart("When each trial was trained", drawn, note, wide=True, height=height), _costs(found)]


def _legend_below(drawn: Any, height: int) -> None:
    """Put the legend of a figure below its axis, however low (pixels) its chart is."""
    drawn.update_layout(legend_y=-52 / (height - 150))


def _told(trial: Trial) -> str:
    score = "" if trial.score is None else f" {trial.score:.3f}"
    return escaped(f"{trial.name} {trial.status}{score}, {clock(trial.seconds)}")


def _by_ending(found: Found) -> list[tuple[str, str, list[Trial]]]:
    """Label, colour and members of each kind of trial."""
    kinds: dict[tuple[str, str], list[Trial]] = {kind: [] for kind in ENDINGS.values()}
    for trial in found.trials:
        kinds[ENDINGS[trial.status]].append(trial)
    kinds[AGAIN] = list(found.runs)
    return [(*kind, members) for kind, members in kinds.items()]


def _lanes(trials: Sequence[Trial]) -> dict[str, int]:
    """A line for each trial in which no other is drawn at the same time, as few as can be."""
    free: list[float] = []  # when the last of each line ended
    lanes = {}
    for trial in sorted(trials, key=lambda trial: trial.turns[0][0]):
        lane = next((n for n, end in enumerate(free) if end <= trial.turns[0][0]), len(free))
        free[lane : lane + 1] = [trial.turns[-1][1]]
        lanes[trial.name] = lane
    return lanes


def cost(trial: Trial) -> float:
    """Hours of the GPUs that Ray had set aside for the trial while it was trained, or of its cores if it had none."""
    return trial.seconds / 3600 * (trial.takes.get("gpu") or trial.takes.get("cpu", 1))


def cost_unit(trials: Sequence[Trial]) -> str:
    return "GPU hours" if any(trial.takes.get("gpu") for trial in trials) else "core hours"


def _costs(found: Found) -> Table:
    every = [*found.trials, *found.runs]
    whole = sum(map(cost, every))
    rows = []
    for label, _, members in [*_by_ending(found), ("in all", "", every)]:
        if members:
            spent = sum(map(cost, members))
            share = f"{spent / whole:.0%}" if whole else "–"
            rows.append((label, str(len(members)), f"{spent:.3g}", share, f"{spent / len(members):.3g}"))
    return Table(("what became of them", "trials", cost_unit(every), "share", "each"), rows, title="What they cost")


def seeds(found: Found, place: Path) -> list[Any]:
    """The best trials of the search with the seeds that it did not have, for a page in the folder `place`. A score
    leads to the page of its run where there is one."""
    import plotly.graph_objects as go

    again = candidates(found.trials, found.runs)
    if not again:
        return ["No run with another seed is finished yet."]
    shown = again[::-1]
    names = [each.trial.name for each in shown]
    means = go.Scatter(
        x=[each.spread.mean for each in shown],
        y=names,
        error_x={"type": "data", "array": [each.spread.deviation or 0.0 for each in shown], "color": COLOURS[0]},
        mode="markers",
        marker={"color": COLOURS[0], "size": 10},
        name="mean over the other seeds ± standard deviation",
        customdata=names,
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    each_seed = go.Scatter(
        x=[score for each in shown for score in each.scores.values()],
        y=[each.trial.name for each in shown for _ in each.scores],
        mode="markers",
        marker={"color": COLOURS[0], "size": 7, "symbol": "line-ns-open"},
        name="each seed",
        customdata=[each.trial.name for each in shown for _ in each.scores],
        text=[f"seed {seed}: {score:.3f}" for each in shown for seed, score in each.scores.items()],
        hovertemplate="%{y}, %{text}<extra></extra>",
    )
    searched = go.Scatter(
        x=[each.trial.score for each in shown],
        y=names,
        mode="markers",
        marker={"color": COLOURS[1], "size": 10, "symbol": "diamond-open", "line": {"width": 2}},
        name="in the search",
        customdata=names,
        hovertemplate="%{y} in the search: %{x:.3f}<extra></extra>",
    )
    drawn = figure(means, each_seed, searched, xaxis={"title": {"text": METRIC}}, hovermode="closest")
    first = again[0]
    rows = []
    for each in again:
        difference = each.to(first) if each is not first else None
        folders = {run.seed: run.folder for run in found.runs if run.variant == each.trial.name}
        links = [to_run(f"{score:.3f}", folders[seed], place) for seed, score in each.scores.items()]
        scores = Markup(", ").join(links)
        cells = [number(each.trial.score), str(each.spread), number(each.flattery, sign=True), scores]
        rows.append((each.trial.name, *cells, str(difference or "")))
    header = (
        "trial",
        "in the search",
        "with other seeds",
        "flattered by",
        "each seed",
        "to the first [95%], seeds ahead",
    )
    note = "Right of the interval: the score by which the trial was chosen was luck in part."
    height = 190 + 34 * len(shown)
    _legend_below(drawn, height)
    chart = Chart("In the search, and with other seeds", drawn, note, wide=True, height=height)
    return [verdict(again), Table(header, rows), chart]
