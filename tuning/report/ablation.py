"""The page of an ablation: what every extension brings, the paper's table beside ours."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.task import Task
from minbert.trainer.config import parse_config
from minbert.tuning.ablation import ABLATION_FILE, TITLES, Ablation
from minbert.tuning.comparison import AGAINST, Row, compare, differences, labels
from minbert.tuning.extensions import BASELINE
from minbert.tuning.report.facts import facts, not_default
from minbert.tuning.report.links import to_run
from minbert.tuning.report.page import (
    COLOURS,
    DIVERGING,
    GREY,
    Chart,
    Page,
    Report,
    Section,
    Table,
    escaped,
    figure,
    number,
    seeds_curve,
    setting,
)
from minbert.tuning.trial import METRIC, Trial, interrupted

# "Optimizing minBERT on Downstream Tasks Using Pretraining and Siamese Network Architecture", dev scores: SST accuracy,
# Quora accuracy, STS Pearson, overall. Its extensions are added in this order; those without a variant of ours were
# not measured here.
PAPER: Sequence[tuple[str, str | None, tuple[float, float, float, float]]] = (
    ("baseline", "baseline", (0.411, 0.375, 0.201, 0.428)),
    ("siamese features", "siamese", (0.411, 0.687, 0.398, 0.599)),
    ("two hidden layers", "siamese+two_hidden_layers", (0.411, 0.694, 0.448, 0.610)),
    ("back translation", "siamese+two_hidden_layers+back_translation", (0.411, 0.694, 0.449, 0.610)),
    ("SMART", "siamese+two_hidden_layers+back_translation+smart", (0.414, 0.694, 0.449, 0.611)),
    ("encoder unfrozen", "siamese+two_hidden_layers+unfrozen", (0.493, 0.853, 0.817, 0.752)),
)
PAPER_TASKS = ("sst", "quora", "sts")
SHOWN = 10  # failures


def ablation_report(folder: Path, place: Path) -> Report:
    """The report, for the folder `place`, of the ablation in `folder`, over or not. Raises UserError if no run is
    finished."""
    ablation = Ablation.read(folder)
    trials = ablation.trials(folder)
    interrupted(trials, folder)
    rows = {row.variant: row for row in compare(ablation, trials)}
    columns = next((list(row.scores) for row in rows.values() if row.scores), None)
    if columns is None:
        raise UserError(f"no run of {folder} is finished yet; minbert ablate --ablation {folder} goes on with it")
    sections = [Section("The ablation", [_summary(ablation), _settings(ablation)])]
    if tuple(columns[:-1]) == PAPER_TASKS and "added" in ablation.groups:
        sections.append(Section("The paper's table beside ours", _beside_paper(rows)))
    for group, variants in ablation.groups.items():
        members = [rows[name] for name in variants]
        sections.append(Section(TITLES[group], [_table(group, members, columns), _differences(group, members)]))
    sections += [
        Section("Differences by task", [_by_task(rows, parse_config(ablation.baseline, ABLATION_FILE).corpus.tasks)]),
        Section("Learning curves", [_curves(ablation, trials)]),
        Section("All runs", [_all(trials, columns, place)]),
    ]
    done = sum(trial.status == "finished" for trial in trials)
    subtitle = f"{_best(rows.values())}. {len(ablation.variants)} variants with {ablation.seeds_told}, "
    subtitle += f"{done} of {len(trials)} runs finished."
    began = min((trial.started for trial in trials if trial.started), default=None)
    ended = max((trial.ended for trial in trials if trial.ended), default=None)
    about = facts(folder, parse_config(ablation.baseline, ABLATION_FILE), began, ended)[:-1]
    page = Page(f"Ablation {folder.name}", subtitle, sections, _warnings(trials), about)
    return Report(page, _csv(trials, columns))


def _best(rows: Iterable[Row]) -> str:
    """The finding in a line: the highest mean, and how far it is from the baseline."""
    best = max((row for row in rows if row.scores), key=lambda row: row.scores["overall"].mean)
    gain = f", {best.difference.interval} to the baseline" if best.difference else ""
    return f"Best: {_name(best.variant)}, overall {best.scores['overall']}{gain}"


def _warnings(trials: Sequence[Trial]) -> list[str]:
    warnings = []
    if left := sum(not trial.over for trial in trials):
        warnings.append(f"The ablation is not over: {left} of {len(trials)} runs are still to be trained or finished.")
    if failed := [trial for trial in trials if trial.status == "failed"]:
        lines = [f"{trial.name}: {trial.error}" for trial in failed[:SHOWN]]
        warnings.append("\n".join(["Runs that failed and count for nothing:", *lines]))
    return warnings


def _summary(ablation: Ablation) -> str:
    at = "at its evaluation with the best overall score on the dev splits."
    if len(ablation.seeds) == 1:
        return f"Scores are each run's {at} Of a single seed nothing tells how far another would be off."
    return (
        f"Scores are mean ± standard deviation over {ablation.seeds_told}, each run's {at} Differences are taken seed "
        "by seed, with the 95% intervals of a paired t-test, not corrected for the number of comparisons, and the "
        "number of seeds in which the variant is ahead."
    )


def _settings(ablation: Ablation) -> Table:
    changed = not_default(parse_config(ablation.baseline, ABLATION_FILE))
    rows = [(name, setting(value)) for name, value in changed.items()]
    rows.append(("seeds", setting(ablation.seeds)))
    return Table(("option of the baseline", "value"), rows, text_columns=2)


def _beside_paper(rows: Mapping[str, Row]) -> list[Any]:
    lines = []
    for label, variant, scores in PAPER:
        row = rows.get(variant)
        ours = [str(row.scores[name]) if row and row.scores else "–" for name in (*PAPER_TASKS, "overall")]
        pairs = [f"{number(paper)} / {our}" for paper, our in zip(scores, ours)]
        lines.append(["+ " + label if label != "baseline" else label, *pairs])
    header = ["paper / ours, after", *PAPER_TASKS, "overall"]
    return [
        "Every row adds its extension to those above. The paper's last row has back translation and SMART in it, "
        "ours has not. Ours have the encoder, data and budget of the settings above, the paper's BERT-base, all data "
        "and ten or more epochs: compare the steps from row to row, not the scores.",
        Table(header, lines),
    ]


def _table(group: str, rows: Sequence[Row], columns: Sequence[str]) -> Table:
    """With the differences to what the group is compared with, and to the baseline."""
    called, compared = labels(group, [row.variant for row in rows]), differences(group, rows)
    others = [AGAINST[group]] if AGAINST[group] != "the baseline" else []
    lines = []
    for row in rows:
        failed = f" ({row.failed} failed)" if row.failed else ""
        scores = [str(row.scores[name]) if row.scores else "–" for name in columns]
        steps = [str(compared.get(row.variant, "")) for _ in others]
        lines.append([called[row.variant] + failed, *scores, *steps, str(row.difference or "")])
    return Table(["variant", *columns, *(f"overall to {other}" for other in [*others, "the baseline"])], lines)


def _name(variant: str) -> str:
    return variant.replace("+", " + ")


def _differences(group: str, rows: Sequence[Row]) -> Chart | str:
    """Interval plot of the paired differences."""
    import plotly.graph_objects as go

    called, other = labels(group, [row.variant for row in rows]), AGAINST[group]
    shown = dict(reversed(differences(group, rows).items()))
    if not shown:
        return f"There is nothing to compare with {other} yet."
    reach = [each.high - each.mean if each.high is not None else 0 for each in shown.values()]
    points = go.Scatter(
        x=[each.mean for each in shown.values()],
        y=[escaped(called[variant]) for variant in shown],
        error_x={"type": "data", "array": reach, "color": COLOURS[0], "thickness": 1.5},
        mode="markers",
        marker={"color": COLOURS[0], "size": 9},
        text=[escaped(str(each)) for each in shown.values()],
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    drawn = figure(
        points,
        xaxis={"title": {"text": "difference of the overall score"}, "rangemode": "tozero"},
        showlegend=False,
    )
    means = {
        "added": "right of 0, the extension helps beside those above it",
        "left_out": "left of 0, the model is worse without the extension",
    }
    interval = " with its 95% interval" if any(each.low is not None for each in shown.values()) else ""
    note = f"Mean of the paired differences{interval}: {means.get(group, 'right of 0, better than the baseline')}."
    return Chart(f"Difference to {other}", drawn, note, wide=True, height=100 + 34 * len(shown))


def _by_task(rows: Mapping[str, Row], declared: Sequence[Task]) -> Chart:
    """What an extension gives to one task and takes from another."""
    import plotly.graph_objects as go

    base = rows[BASELINE].scores
    shown = [row for row in rows.values() if row.scores and base and row.variant != BASELINE][::-1]
    tasks = [task.name for task in declared]
    values = [[row.scores[task].mean - base[task].mean for task in tasks] for row in shown]
    limit = max([0.01, *(abs(value) for row in values for value in row)])
    heat = go.Heatmap(
        z=values,
        x=[f"{task.name} ({task.metric})" for task in declared],
        y=[_name(row.variant) for row in shown],
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        text=[[number(value, sign=True) for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
        showscale=False,
    )
    note = "Mean score less the baseline's: blue is better, red worse."
    return Chart("Score of each task, to the baseline", figure(heat), note, wide=True, height=90 + 30 * len(shown))


def _curves(ablation: Ablation, trials: Sequence[Trial]) -> Chart:
    """The mean over the seeds at every evaluation that all of a variant's runs have."""

    traces = []
    for place, variant in enumerate(ablation.variants):
        runs = [trial for trial in trials if trial.variant == variant and trial.status != "failed"]
        curves = [{record["step"]: record[METRIC] for record in trial.evaluations()} for trial in runs]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        colour = COLOURS[place % len(COLOURS)] if variant != BASELINE else GREY
        dash = ("solid", "dash", "dot")[place // len(COLOURS) % 3]
        traces.append(seeds_curve(_name(variant), curves, colour, dash))
    drawn = figure(
        *traces,
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": METRIC}},
        hovermode="closest",
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
    )
    note = "Means over the seeds, with their standard deviations." if len(ablation.seeds) > 1 else ""
    return Chart("Dev score while training", drawn, note, wide=True, height=420, least_width=640)


def _record(trial: Trial) -> dict[str, Any]:
    return max(trial.evaluations(), key=lambda record: record[METRIC], default={})


def _all(trials: Sequence[Trial], columns: Sequence[str], place: Path) -> Table:
    """A name leads to the run's own page where there is one."""
    rows = []
    for trial in sorted(trials, key=lambda trial: (trial.variant, trial.seed)):
        record = _record(trial)
        scores = [number(record.get(f"dev/{name}")) for name in columns]
        reached = f"{trial.step}/{trial.steps}" if trial.steps else "–"
        name = to_run(_name(trial.variant), trial.folder, place)
        rows.append([name, trial.status, str(trial.seed), *scores, reached])
    return Table(["variant", "status", "seed", *columns, "steps"], rows, text_columns=2)


def _csv(trials: Sequence[Trial], columns: Sequence[str]) -> list[list[Any]]:
    rows: list[list[Any]] = [["variant", "seed", "status", "step", "steps", *(f"dev/{c}" for c in columns), "error"]]
    for trial in trials:
        record = _record(trial)
        scores = [record.get(f"dev/{name}") for name in columns]
        rows.append([trial.variant, trial.seed, trial.status, trial.step, trial.steps, *scores, trial.error])
    return rows
