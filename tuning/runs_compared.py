"""Runs side by side: in what they differ, their scores, and differences with intervals where they can be paired.

Runs that differ in their seed only are one group. Groups are compared with the first seed by seed (a paired t-test)
where they share two seeds or more; single runs by what they predict for the same dev examples, which are drawn with
replacement (a paired bootstrap), as far as both have their prediction files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minbert.data.errors import UserError
from minbert.data.reading import read_json
from minbert.data.sources.examples import parse_label
from minbert.data.task import Task
from minbert.trainer.config import INCIDENTAL, RunConfig, flatten
from minbert.trainer.evaluation.prediction_files import RECORD, predicted_tasks, prediction_file_name
from minbert.trainer.evaluation.scoring import overall, score
from minbert.trainer.run.data import load_examples_of
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.comparison import Difference, Spread, best_scores, paired, spread
from minbert.tuning.trial import score_of

# Options that make no other run, or only another seed of it.
SAME_GROUP = INCIDENTAL | {"keep", "keep_every", "keep_best"}
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    name: str
    runs: Sequence[RunFolder]
    configs: Sequence[RunConfig]

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Seed -> scores at the evaluation with the best overall score."""
        found = {}
        for run, config in zip(self.runs, self.configs):
            records = [record for record in run.read_metrics() if score_of(record) is not None]
            if records:
                found[config.seed] = best_scores(records)
        return found

    def spreads(self) -> dict[str, Spread]:
        scores = list(self.scores.values())
        names = scores[0] if scores else {}
        return {name: spread([each[name] for each in scores if each.get(name) is not None]) for name in names}

    def curve(self, run: RunFolder, name: str) -> dict[int, float]:
        return {r["step"]: r[name] for r in run.read_metrics() if isinstance(r.get(name), int | float)}


@dataclass(frozen=True)
class Compared:
    """`options`: name -> value in each group, where they are not all the same. `differences`: group -> metric ->
    difference to the first group, and how it was paired."""

    groups: Sequence[Group]
    options: dict[str, list[Any]]
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    pairing: dict[str, str] = field(default_factory=dict)


def compare_runs(paths: Sequence[Path]) -> Compared:
    """Raises UserError if one is no run, or there is only one."""
    groups = _grouped([RunFolder.existing(path) for path in paths])
    flat = [flatten(group.configs[0]) for group in groups]
    options = {
        name: [each[name] for each in flat]
        for name in flat[0]
        if name not in SAME_GROUP and any(each[name] != flat[0][name] for each in flat[1:])
    }
    if any(len(group.runs) == 1 for group in groups) and len({group.configs[0].seed for group in groups}) > 1:
        options["seed"] = [", ".join(str(config.seed) for config in group.configs) for group in groups]
    found = Compared(groups, options)
    first = groups[0]
    for group in groups[1:]:
        differences, how = _differences(first, group)
        found.differences[group.name], found.pairing[group.name] = differences, how
    return found


def _grouped(runs: Sequence[RunFolder]) -> list[Group]:
    """In the order given. Runs of the same configuration and seed stay apart."""
    members: dict[str, list[tuple[RunFolder, RunConfig]]] = {}
    for run in runs:
        config = run.read_config()
        same = {name: str(value) for name, value in flatten(config).items() if name not in SAME_GROUP}
        key = json.dumps(same, sort_keys=True)
        while any(other.seed == config.seed for _, other in members.get(key, [])):
            key += "'"
        members.setdefault(key, []).append((run, config))
    names = _names(runs)
    groups = []
    for parts in members.values():
        name = names[parts[0][0].path]
        if len(parts) > 1:
            common = _common_start([names[run.path] for run, _ in parts])
            name = f"{common or name} ({len(parts)} seeds)"
        groups.append(Group(name, [run for run, _ in parts], [config for _, config in parts]))
    return groups


def _common_start(names: Sequence[str]) -> str:
    """`a/siamese` of `a/siamese,seed=0` and `a/siamese,seed=1`."""
    letters = takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    return "".join(same for same, *_ in letters).rstrip(",=-_ /").removesuffix("seed").rstrip(",=-_ /")


def _names(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """The last parts of their paths, as many as tell them apart."""
    paths = [run.path for run in runs]
    absolute = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, absolute)) + 1):
        short = ["/".join(parts[-count:]) for parts in absolute]
        if len(set(short)) == len(set(absolute)):
            break
    return dict(zip(paths, short))


def _differences(first: Group, group: Group) -> tuple[dict[str, Difference], str]:
    ours, theirs = group.scores, first.scores
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) > 1:
        names = [name for name in theirs[seeds[0]] if all(name in ours[s] and name in theirs[s] for s in seeds)]
        return {name: paired([ours[s][name] - theirs[s][name] for s in seeds]) for name in names}, (
            f"{len(seeds)} seeds, paired t-test"
        )
    if len(group.runs) == len(first.runs) == 1:
        try:
            how = "the same dev examples, paired bootstrap"
            if any(each.configs[0].corpus.eval_limit for each in (first, group)):
                how += ", of the whole dev splits (the scores are of the eval_limit)"
            return bootstrap(first.runs[0], group.runs[0]), how
        except (UserError, OSError, ValueError, KeyError) as error:
            why = str(error)
    else:
        why = "no two seeds in common"
    if not ours or not theirs:
        return {}, "no scores"
    means = {name: value.mean for name, value in first.spreads().items()}
    plain = {
        name: Difference(value.mean - means[name], None, None, None, 0, 1)
        for name, value in group.spreads().items()
        if name in means
    }
    return plain, f"no interval: {why}"


def bootstrap(first: RunFolder, second: RunFolder, draws: int = DRAWS) -> dict[str, Difference]:
    """Of two runs' best models: each task's difference of scores on its whole dev split, second less first, with the
    2.5% and 97.5% points over `draws` samples of the examples (Efron and Tibshirani 1993, chapter 13), the same for
    both runs. The overall one too, if all that it is the mean of has predictions in both.

    Raises UserError if the files of predictions are missing, or are of other examples.
    """
    pairs = _predicted(first), _predicted(second)
    common = [name for name in pairs[0] if name in pairs[1]]
    if not common:
        raise UserError("they have no task in common that is predicted")
    random = np.random.default_rng(0)
    whole: list[dict[str, float]] = [{}, {}]
    drawn: list[dict[str, np.ndarray]] = [{}, {}]
    tasks = []
    for name in common:
        (task, mine, labels, ids), (_, theirs, _, other) = pairs[0][name], pairs[1][name]
        if ids != other:
            raise UserError(f"the predictions of {name} are of other examples")
        tasks.append(task)
        for side, predicted in enumerate((mine, theirs)):
            whole[side][name] = score(task, torch.from_numpy(predicted), labels)
            drawn[side][name] = np.empty(draws)
        for draw in range(draws):
            places = random.integers(0, len(labels), len(labels))
            for side, predicted in enumerate((mine, theirs)):
                drawn[side][name][draw] = score(task, torch.from_numpy(predicted[places]), labels[places])
    found = {}
    complete = all(set(common) == _scored(run) for run in (first, second))
    for name in [*common, "overall"] if complete else common:
        if name == "overall":
            values = [
                np.array([overall(tasks, {n: side[n][i] for n in common}) for i in range(draws)]) for side in drawn
            ]
            mean = overall(tasks, whole[1]) - overall(tasks, whole[0])
        else:
            values, mean = [side[name] for side in drawn], whole[1][name] - whole[0][name]
        differences = values[1] - values[0]
        low, high = np.nanpercentile(differences, [2.5, 97.5])
        ahead = int((differences > 0).sum())
        found[name] = Difference(mean, float(np.nanstd(differences)), float(low), float(high), ahead, draws)
    return found


def _scored(run: RunFolder) -> set[str]:
    """The tasks of which a run's overall score is the mean, and those of no weight that have predictions."""
    return {task.name for task in run.read_config().corpus.tasks if task.weight or task.kind != "masked_lm"}


Predicted = Mapping[str, tuple[Task, np.ndarray, np.ndarray, list[str]]]


def _predicted(run: RunFolder) -> Predicted:
    """Of every task with a dev prediction file: predictions, labels and ids."""
    config = run.read_config()
    corpus = config.corpus.model_copy(update={"eval_limit": None})
    config = config.model_copy(update={"corpus": corpus})
    record = read_json(run.predictions / RECORD) if run.predictions.is_dir() else {}
    found = {}
    for task in predicted_tasks(config):
        path = run.predictions / prediction_file_name(config, task, "dev")
        if not path.is_file():
            continue
        if record.get(path.name, {}).get("data") != corpus.data:
            continue  # of other data than the run's own
        if run.best_model.exists() and path.stat().st_mtime < run.best_model.stat().st_mtime:
            raise UserError(f"{path} is older than the best model: minbert predict {run.path}")
        examples = load_examples_of(config, task.name, "dev")
        lines, starts = path.read_text().split("\n")[1:-1], [f"{each} , " for each in examples.ids]
        if len(lines) != len(starts) or not all(map(str.startswith, lines, starts)):
            raise UserError(f"{path} does not fit the dev split of {corpus.data}")
        values = [line[len(start) :].strip() for line, start in zip(lines, starts)]
        if task.predictions.values in ("float", "index"):
            numbers: list = [float(value) for value in values]
        else:
            numbers = [parse_label(task, value) for value in values]
        found[task.name] = (task, np.array(numbers), examples.labels, examples.ids)
    if not found:
        raise UserError(f"{run.path} has no prediction files: minbert predict {run.path}")
    return found
