"""The page of runs compared: in what they differ, their curves over each other, and scores with intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minbert.data.task import Task
from minbert.tuning.report.facts import facts, span
from minbert.tuning.report.links import to_run
from minbert.tuning.report.page import (
    COLOURS,
    Chart,
    Page,
    Report,
    Section,
    Table,
    escaped,
    figure,
    seeds_curve,
    setting,
)
from minbert.tuning.runs_compared import Compared, Group

MOST = 6  # groups that the head names
AXES = {"loss": {"type": "log"}, "dev_loss": {"type": "log"}, "tokens_per_second": {"tickformat": ","}}
FACTS = ("Model", "Data", "Code", "Date", "Duration")


def compared_report(found: Compared, place: Path) -> Report:
    """The report, for the folder `place`, of the groups of `found`; the first is what the others are compared with."""
    groups = found.groups
    metrics = metrics_of(groups)
    sections = [
        Section("In what they differ", [_options(found)]),
        Section("Scores", [_explained(found), scores_table(found, metrics), *_intervals(found)]),
        Section("Curves over each other", _curves(groups, metrics)),
        Section("The runs", _runs(groups, place)),
    ]
    count = sum(len(group.runs) for group in groups)
    page = Page(f"{count} runs compared", _finding(found), sections, _warnings(groups))
    return Report(page, _csv(groups))


def _finding(found: Compared) -> str:
    """In a line: the overall score of each group, or their names while there are none."""
    spreads = {group.name: group.spreads().get("overall") for group in found.groups}
    told = [name if spread is None else f"{name} {spread}" for name, spread in spreads.items()]
    scored = any(spread is not None for spread in spreads.values())
    more = f" and {len(told) - MOST} more" if len(told) > MOST else ""
    return ("Overall: " if scored else "") + ", ".join(told[:MOST]) + more


def metrics_of(groups: Sequence[Group]) -> list[str]:
    """Every task that one of them has a score of, and overall at the end."""
    names = dict.fromkeys(name for group in groups for each in group.scores.values() for name in each)
    return [*(name for name in names if name != "overall"), *(["overall"] if "overall" in names else [])]


def _warnings(groups: Sequence[Group]) -> list[str]:
    without = [group.name for group in groups if not group.scores]
    return [f"No evaluation yet: {', '.join(without)}."] if without else []


def _options(found: Compared) -> Table | str:
    if not found.options:
        return "Their configurations are the same."
    rows = [[name, *(shown(value) for value in values)] for name, values in found.options.items()]
    header = ["option", *(group.name for group in found.groups)]
    return Table(header, rows, text_columns=len(header))


def shown(value: Any) -> str:
    """The value of an option in which runs differ; of tasks the names."""
    if isinstance(value, list | tuple) and value and all(isinstance(each, Task) for each in value):
        return ", ".join(task.name for task in value)
    return setting(value)


def _explained(found: Compared) -> str:
    first = found.groups[0].name
    ways = "; ".join(f"{name}: {how}" for name, how in found.pairing.items())
    return (
        f"Each run's scores are those of its evaluation with the best overall score. Differences are to {first}, with "
        f"95% intervals where they can be paired ({ways}), not corrected for the number of comparisons."
    )


def scores_table(found: Compared, metrics: Sequence[str]) -> Table:
    rows = []
    for group in found.groups:
        spreads, differences = group.spreads(), found.differences.get(group.name, {})
        cells = [str(spreads[name]) if name in spreads else "–" for name in metrics]
        below = [f"\n{differences[name].interval}" if name in differences else "" for name in metrics]
        rows.append([group.name, *(cell + difference for cell, difference in zip(cells, below))])
    return Table(["runs", *metrics], rows)


def _intervals(found: Compared) -> list[Chart]:
    import plotly.graph_objects as go

    charts = []
    for place, group in enumerate(found.groups[1:]):
        known = {name: d for name, d in found.differences[group.name].items() if d.low is not None}
        if not known:
            continue
        points = go.Scatter(
            x=[difference.mean for difference in known.values()][::-1],
            y=list(known)[::-1],
            error_x={
                "type": "data",
                "array": [d.high - d.mean for d in known.values()][::-1],
                "arrayminus": [d.mean - d.low for d in known.values()][::-1],
                "thickness": 1.5,
            },
            mode="markers",
            marker={"color": COLOURS[(place + 1) % len(COLOURS)], "size": 9},
            text=[escaped(difference.interval) for difference in known.values()][::-1],
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
        drawn = figure(
            points, xaxis={"title": {"text": "difference of the score"}, "rangemode": "tozero"}, showlegend=False
        )
        note = f"Right of 0, {group.name} is better ({found.pairing[group.name]})."
        charts.append(
            Chart(f"{group.name}, difference to {found.groups[0].name}", drawn, note, height=100 + 34 * len(known))
        )
    return charts


def _curves(groups: Sequence[Group], metrics: Sequence[str]) -> list[Chart]:
    named = {f"dev/{name}": f"Dev score: {name}" for name in reversed(metrics)}
    logged = [record for group in groups for record in group.runs[0].read_metrics()]
    for prefix, title in (("loss/", "Training loss"), ("dev_loss/", "Dev loss")):
        losses = dict.fromkeys(name for record in logged for name in record if name.startswith(prefix))
        named |= {name: f"{title}: {name.removeprefix(prefix)}" for name in losses}
    named |= {"lr": "Learning rate of the encoder", "tokens_per_second": "Tokens a second"}
    sizes = [group.configs[0].batch.batch_size for group in groups]
    by_examples = len(set(sizes)) > 1  # steps of different size are not the same distance
    charts = []
    for name, title in named.items():
        traces = []
        for place, group in enumerate(groups):
            curves = [curve for run in group.runs if (curve := group.curve(run, name))]
            if by_examples:
                curves = [{step * sizes[place]: value for step, value in curve.items()} for curve in curves]
            if curves and set.intersection(*(set(curve) for curve in curves)):
                dash = ("solid", "dash", "dot")[place // len(COLOURS) % 3]
                traces.append(seeds_curve(group.name, curves, COLOURS[place % len(COLOURS)], dash))
        if traces:
            drawn = figure(
                *traces,
                xaxis={"title": {"text": "examples of a task (step x batch size)" if by_examples else "step"}},
                yaxis=AXES.get(name.partition("/")[0], {}),
                hovermode="closest",
                showlegend=True,
            )
            charts.append(Chart(title, drawn))
    return charts


def _runs(groups: Sequence[Group], place: Path) -> list[Table]:
    """A run's folder leads to its own page where there is one."""
    rows, started = [], []
    for group in groups:
        for run, config in zip(group.runs, group.configs):
            known = dict(facts(run.path, config, *span(run)))
            name = to_run(str(run.path), run.path, place)
            rows.append([name, group.name, str(config.seed), *(known.get(fact, "–") for fact in FACTS)])
            started.append([str(run.path), known.get("Command", "–"), known["Not the default"]])
    return [
        Table(["run", "group", "seed", *map(str.lower, FACTS)], rows, text_columns=3 + len(FACTS)),
        Table(["run", "command", "not the default"], started, "How they were started", text_columns=3),
    ]


def _csv(groups: Sequence[Group]) -> list[list[Any]]:
    """The best scores: a row for each run and metric."""
    rows: list[list[Any]] = [["group", "run", "seed", "metric", "score"]]
    for group in groups:
        paths = {config.seed: run.path for run, config in zip(group.runs, group.configs)}
        for seed, scores in group.scores.items():
            rows += [[group.name, str(paths[seed]), seed, name, value] for name, value in scores.items()]
    return rows
