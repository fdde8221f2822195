"""The page of a run: its curves, what its best model gets wrong, and where its tasks' gradients conflict."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from minbert.data.errors import UserError
from minbert.data.task import Split, named
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.scoring import overall
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import total_steps
from minbert.trainer.surgery.conflicts import cosines, read_gramians
from minbert.tuning.report.answers import Answers, answers, calibrate
from minbert.tuning.report.facts import facts, not_default, span
from minbert.tuning.report.page import (
    COLOURS,
    DIVERGING,
    GREY,
    RISING,
    Chart,
    Page,
    Report,
    Section,
    Table,
    figure,
    lines,
    number,
    setting,
)

MOST_POINTS = 2000  # of a scatter plot
FEW = 40  # points of a curve that are each seen


def run_report(run: RunFolder, config: RunConfig, split: Split = "dev", mistakes: int = 10) -> Report:
    """The report of a run, over or not; its best model answers `split` of the data that `config` describes.

    Raises UserError if the run has no metrics yet. Without a model, or data where the configuration says, the page has
    a warning in the answers' place.
    """
    records = run.read_metrics()
    if not records:
        raise UserError(f"{run.path} has logged nothing yet")
    warnings = []
    if (steps := total_steps(run.read_config().model_copy(update={"run": run.path}))) > records[-1]["step"]:
        warnings.append(f"The run is not over: it has logged {records[-1]['step']} of {steps} steps.")
    found: list[Answers] = []
    try:
        found = answers(run, config, split)
    except UserError as error:
        warnings.append(f"The model's answers are missing: {error}")
    perplexities = [f"dev/{task.name}" for task in run.read_config().corpus.tasks if task.metric == "perplexity"]
    sections = [Section("The run", _summary(run, found, split)), Section("Curves", _curves(records, perplexities))]
    sections += [
        Section(f"{answer.task.title[0].upper()}{answer.task.title[1:]}", _task(answer, mistakes)) for answer in found
    ]
    if run.gramians_file.exists():
        sections.append(Section("Gradient conflicts", _conflicts(run)))
    evaluations = [record for record in records if record.get("dev/overall") is not None]
    best = max((record["dev/overall"] for record in evaluations), default=None)
    subtitle = f"step {records[-1]['step']} of {steps}" + ("" if best is None else f", best dev/overall {best:.3f}")
    page = Page(
        f"Run {run.path.name}", subtitle, sections, warnings, facts(run.path, run.read_config(), *span(run))[:-1]
    )
    return Report(page, _csv(records))


def _summary(run: RunFolder, found: Sequence[Answers], split: Split) -> list[Any]:
    parts: list[Any] = []
    if found:
        rows = [[a.task.name, a.task.metric, str(len(a.examples)), number(a.score)] for a in found]
        mean = overall([a.task for a in found], {a.task.name: a.score for a in found})
        rows.append(["overall", "mean, a correlation r as (r + 1) / 2", "", number(mean)])
        parts.append(Table(("task", "metric", "examples", "score"), rows, f"Best model on {split}", text_columns=2))
    chosen = [(name, setting(value)) for name, value in not_default(run.read_config()).items()]
    parts.append(Table(("option", "value"), chosen, "Options that are not the default", text_columns=2))
    return parts


def _curves(records: Sequence[dict], perplexities: Sequence[str]) -> list[Chart]:
    names = list(dict.fromkeys(name for record in records for name in record))
    scores = [name for name in names if name.startswith("dev/") and name not in perplexities]
    scored = [
        ("Score on dev while training", scores, "score", False),
        ("Perplexity on held-out text while training", perplexities, "perplexity", True),
    ]
    others = [
        ("Learning rates", [name for name in names if name in ("lr", "head_lr")], "learning rate", False),
        ("Gradient norm before clipping", ["grad_norm"], "norm", True),
        ("Weights of the tasks", [name for name in names if name.startswith("weight/")], "weight", False),
        ("Throughput", ["tokens_per_second"], "tokens a second", False),
    ]
    tasks = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    losses = [_loss(records, task, is_first=task == tasks[0]) for task in tasks]
    return [*_measured(records, scored), *losses, *_measured(records, others)]


def _measured(records: Sequence[dict], groups: Sequence[tuple[str, Sequence[str], str, bool]]) -> list[Chart]:
    """Of each group, what was measured of it: title, names, what the axis says, and whether it is logarithmic."""
    charts = []
    for title, members, label, logarithmic in groups:
        curves = {name: _curve(records, name) for name in members}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if title.startswith("Weights") and all(set(values) == {1.0} for _, values in curves.values()):
            continue  # the plain sum
        if curves:
            axis = {"title": {"text": label}} | ({"type": "log"} if logarithmic else {"rangemode": "tozero"})
            axis |= {"tickformat": ","} if title == "Throughput" else {}
            charts.append(Chart(title, _lines(curves, axis)))
    return charts


def _loss(records: Sequence[dict], task: str, is_first: bool) -> Chart:
    """What a task's training loss does, and that of its dev split, where evaluations have one. The first chart says
    what they are."""
    import plotly.graph_objects as go

    (steps, losses), (evaluated, dev) = (_curve(records, f"{name}/{task}") for name in ("loss", "dev_loss"))
    blue, orange = COLOURS[:2]
    every, traces = {"x": steps, "y": losses, "mode": "lines", "name": "train"}, []
    if len(steps) < FEW:
        traces.append(go.Scatter(**every, line={"color": blue, "width": 1.6}))
    else:
        traces.append(go.Scatter(**every, line={"color": blue, "width": 1}, opacity=0.35))
        line = {"color": blue, "width": 1.8}
        traces.append(go.Scatter(x=steps, y=smoothed(losses), mode="lines", name="train, smoothed", line=line))
    if evaluated:
        line = {"color": orange, "width": 1.6}
        traces.append(go.Scatter(x=evaluated, y=dev, mode="lines+markers", marker={"size": 6}, line=line, name="dev"))
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss"}, "type": "log"}}
    drawn = figure(*traces, **layout, hovermode="x unified", showlegend=len(traces) > 1)
    note = "Train: the mean since the last line, with dropout and all that is added to the loss."
    note += " Dev: the plain loss." if evaluated else ""
    return Chart(f"Loss: {task}", drawn, note if is_first else "")


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """The exponential mean of what came before, over a twentieth of the values; a gap stays one.

    It starts unbiased, with the first value (Kingma and Ba 2015, section 3).
    """
    decay = 1 - 1 / max(1.0, len(values) / 20)
    found: list[float | None] = []
    total = weight = 0.0
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        found.append(None if value is None else total / weight)
    return found


def _curve(records: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; a number that is not finite leaves a gap."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [v if v is not None and math.isfinite(v) else None for _, v in points]


def _lines(curves: dict[str, tuple[Sequence[int], Sequence[float]]], axis: dict[str, Any], **layout: Any) -> Any:
    import plotly.graph_objects as go

    traces = [
        go.Scatter(
            x=steps,
            y=values,
            mode="lines+markers" if len(steps) < FEW else "lines",
            marker={"size": 4},
            line={"color": COLOURS[place % len(COLOURS)], "width": 1.6},
            name=name.partition("/")[2] or name,
        )
        for place, (name, (steps, values)) in enumerate(curves.items())
    ]
    layout |= {"hovermode": "x unified", "showlegend": len(traces) > 1}
    return figure(*traces, xaxis={"title": {"text": "step"}}, yaxis=axis, **layout)


def _task(answer: Answers, mistakes: int) -> list[Any]:
    if answer.task.kind == "multilabel":
        return [_labels(answer), _worst(answer, mistakes)]
    if answer.probabilities is None:
        charts = [_similarities(answer), _residuals(answer)]
    else:
        charts = [_confusion(answer), _calibration(answer)]
    return [*charts, _worst(answer, mistakes)]


def _labels(answer: Answers) -> Table:
    """Of a task with several labels: each label's precision, recall and F1."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(answer.labels, answer.predicted, zero_division=0)
    rows = [
        [name, str(int(count)), number(precision), number(recall), number(f1)]
        for name, precision, recall, f1, count in zip(answer.task.classes, *columns)
    ]
    title = f"Labels. All of an example's are right in {answer.correct.mean():.1%} of the examples."
    return Table(("label", "examples", "precision", "recall", "F1"), rows, title, text_columns=1)


def _confusion(answer: Answers) -> Chart:
    import plotly.graph_objects as go
    from sklearn.metrics import confusion_matrix

    classes = range(answer.probabilities.shape[1])
    counts = confusion_matrix(answer.labels.astype(int), answer.predicted.astype(int), labels=classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = list(answer.task.classes)
    heat = go.Heatmap(
        z=shares,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        colorscale=RISING,
        text=[[f"{share:.0%}<br>{count}" for share, count in zip(*row)] for row in zip(shares, counts)],
        texttemplate="%{text}",
        hovertemplate="labelled %{y}, predicted %{x}: %{text}<extra></extra>",
        showscale=False,
    )
    drawn = figure(
        heat,
        xaxis={"title": {"text": "predicted"}, "type": "category", "constrain": "domain"},
        yaxis={"title": {"text": "label"}, "type": "category", "autorange": "reversed"},
    )
    note = f"Shares of each label's examples, and their number. {answer.metric}."
    return Chart("Confusion matrix", drawn, note, height=380)


def _calibration(answer: Answers) -> Chart:
    import plotly.graph_objects as go

    found = calibrate(answer.confidence, answer.correct)
    filled = found.counts > 0
    share = found.counts / found.counts.sum()
    traces = [
        go.Bar(
            x=(found.edges[:-1] + found.edges[1:]) / 2,
            y=share,
            width=np.diff(found.edges) * 0.95,
            marker={"color": GREY},
            opacity=0.35,
            name="share of the examples",
            hovertemplate="%{y:.1%} of the examples<extra></extra>",
        ),
        go.Scatter(
            x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, name="perfect", hoverinfo="skip"
        ),
        go.Scatter(
            x=found.confidence[filled],
            y=found.accuracy[filled],
            mode="lines+markers",
            line={"color": COLOURS[0]},
            name="accuracy",
            text=[str(count) for count in found.counts[filled]],
            hovertemplate="confidence %{x:.2f}, accuracy %{y:.2f}, %{text} examples<extra></extra>",
        ),
    ]
    lowest = 1 / answer.probabilities.shape[1]
    drawn = figure(
        *traces,
        xaxis={"title": {"text": "confidence"}, "range": [max(0, lowest - 0.05), 1.01]},
        yaxis={"title": {"text": "accuracy"}, "range": [0, 1.02]},
    )
    note = f"Expected calibration error {found.error:.3f} ({len(found.counts)} bins)."
    return Chart("Calibration", drawn, note, height=380)


def _similarities(answer: Answers) -> Chart:
    import plotly.graph_objects as go

    rows = np.arange(len(answer.examples))
    if len(rows) > MOST_POINTS:
        rows = np.linspace(0, len(rows) - 1, MOST_POINTS).astype(int)
    low, high = answer.task.label_range
    texts = [lines([column[row] for column in answer.examples.sentences]) for row in rows]
    points = go.Scatter(
        x=answer.labels[rows],
        y=answer.predicted[rows],
        mode="markers",
        marker={"color": COLOURS[0], "size": 5, "opacity": 0.5},
        text=texts,
        hovertemplate="%{text}<br>labelled %{x:.2f}, predicted %{y:.2f}<extra></extra>",
    )
    diagonal = go.Scatter(
        x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip"
    )
    margin = 0.03 * (high - low)
    drawn = figure(
        diagonal,
        points,
        xaxis={"title": {"text": "label"}, "range": [low - margin, high + margin]},
        yaxis={"title": {"text": "predicted"}, "range": [low - margin, high + margin]},
        showlegend=False,
        hovermode="closest",
    )
    note = f"{answer.metric}."
    return Chart("Predicted against true similarity", drawn, note, height=380)


def _residuals(answer: Answers) -> Chart:
    import plotly.graph_objects as go

    error = answer.predicted - answer.labels
    bars = go.Histogram(
        x=error,
        nbinsx=40,
        marker={"color": COLOURS[0]},
        opacity=0.8,
        hovertemplate="%{x}: %{y} examples<extra></extra>",
    )
    drawn = figure(
        bars, xaxis={"title": {"text": "predicted less labelled"}}, yaxis={"title": {"text": "examples"}}, bargap=0.05
    )
    root = float(np.sqrt((error.astype(np.float64) ** 2).mean()))
    note = f"Mean {error.mean():+.3f}, root mean square {root:.3f}, on the scale of the labels."
    return Chart("Errors", drawn, note, height=380)


def _worst(answer: Answers, most: int) -> Table | str:
    chosen = answer.worst(most)
    if not len(chosen):
        return "There is no mistake."
    header = [*answer.task.sentences, "label", "predicted"]
    rows = []
    for row in chosen:
        texts = [column[row] for column in answer.examples.sentences]
        if answer.probabilities is None:
            rows.append([*texts, f"{answer.labels[row]:.2f}", f"{answer.predicted[row]:.2f}"])
        else:
            task = answer.task
            rows.append([*texts, named(task, answer.labels[row]), named(task, answer.predicted[row])])
            if task.kind != "multilabel":
                sure = answer.probabilities[row]
                rows[-1] += [f"{sure[int(answer.predicted[row])]:.2f}", f"{sure[int(answer.labels[row])]:.3f}"]
    if answer.probabilities is not None and answer.task.kind != "multilabel":
        header += ["confidence", "probability of the label"]
    title = "Worst mistakes" if answer.probabilities is not None else "Largest errors"
    return Table(header, rows, title, text_columns=len(answer.task.sentences))


def _conflicts(run: RunFolder) -> list[Any]:
    import plotly.graph_objects as go

    steps, tasks, layers, gramians = read_gramians(run.gramians_file)
    if not layers or len(tasks) < 2:
        return ["There is nothing to compare: the tasks share no trainable parameters, or there is only one task."]
    pairs = list(combinations(range(len(tasks)), 2))
    names = [f"{tasks[i]} · {tasks[j]}" for i, j in pairs]
    encoder, by_layer = cosines(gramians.sum(1)), cosines(gramians)
    over_time = {name: (steps, encoder[:, i, j].tolist()) for name, (i, j) in zip(names, pairs)}
    norms = {task: (steps, gramians.sum(1)[:, t, t].sqrt().tolist()) for t, task in enumerate(tasks)}
    mean = [[float(by_layer[:, layer, i, j].mean()) for i, j in pairs] for layer in range(len(layers))]
    limit = max(0.1, max(abs(value) for row in mean for value in row))
    heat = go.Heatmap(
        z=mean,
        x=names,
        y=list(layers),
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        text=[[number(value, 2, sign=True) for value in row] for row in mean],
        texttemplate="%{text}",
        hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        showscale=False,
    )
    share = float(np.mean([[float(step[i, j]) < 0 for i, j in pairs] for step in encoder]))
    text = (
        f"At {len(steps)} steps the gradient of each task was measured alone. {share:.0%} of the pairs had a negative "
        "cosine: what lowers one task's loss raises the other's."
    )
    return [
        text,
        Chart("Cosine of the tasks' gradients (encoder)", _lines(over_time, {"title": {"text": "cosine"}})),
        Chart("Norms of the tasks' gradients (encoder)", _lines(norms, {"title": {"text": "norm"}, "type": "log"})),
        Chart("Mean cosine by layer", figure(heat), "Red: conflict.", wide=True, height=90 + 28 * len(layers)),
    ]


def _csv(records: Sequence[dict]) -> list[list[Any]]:
    """The metrics: a row for each logged line, a column for each name."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return [names, *([record.get(name) for name in names] for record in records)]
