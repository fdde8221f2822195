"""What an ablation shows: each variant's scores over the seeds, and its paired differences to the baseline, and in a
group of variants to the one before it or to the full model.

Runs with the same seed share their order of the data and as much of their initial weights as fits, so differences are
taken seed by seed (a paired t-test): their spread is smaller than that of the scores, which holds what all variants of
a seed have in common.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minbert.tuning.ablation import Ablation
from minbert.tuning.extensions import BASELINE
from minbert.tuning.trial import METRIC, Trial

CONFIDENCE = 0.95

# With what the variants of a group are compared.
AGAINST = {"alone": "the baseline", "added": "the row above", "left_out": "the full model", "named": "the baseline"}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds; no deviation of a single one."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


@dataclass(frozen=True)
class Difference:
    """To another, over the seeds that both have. `low` and `high`: the 95% interval of the mean (Student's t)."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    wins: int  # seeds in which the variant is ahead
    count: int

    @property
    def interval(self) -> str:
        """The mean, with its interval if there is one."""
        return f"{self.mean:+.3f}" + ("" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]")

    def __str__(self) -> str:
        return self.interval + ("" if self.low is None else f", {self.wins} of {self.count}")


@dataclass(frozen=True)
class Row:
    """A variant's line in the table."""

    variant: str
    scores: dict[str, Spread]  # of each task, and overall
    difference: Difference | None  # to the baseline
    failed: int
    by_seed: dict[int, float]  # the overall score

    def against(self, other: "Row") -> Difference | None:
        """Of the overall score, seed by seed; None if there is no seed that both have."""
        common = sorted(self.by_seed.keys() & other.by_seed.keys())
        return paired([self.by_seed[seed] - other.by_seed[seed] for seed in common]) if common else None


def compare(ablation: Ablation, trials: Sequence[Trial]) -> list[Row]:
    """A row for every variant that has a score: its runs' evaluations with the best overall score."""
    by_variant: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ablation.variants}
    failed = dict.fromkeys(ablation.variants, 0)
    for trial in trials:
        if trial.status == "failed":
            failed[trial.variant] += 1
        elif trial.status == "finished" and (records := trial.evaluations()):
            by_variant[trial.variant][trial.seed] = best_scores(records)
    rows = []
    for variant, runs in by_variant.items():
        scores = {name: spread([run[name] for run in runs.values()]) for name in next(iter(runs.values()), {}) if runs}
        by_seed = {seed: run["overall"] for seed, run in runs.items()}
        rows.append(Row(variant, scores, None, failed[variant], by_seed))
    baseline = next(row for row in rows if row.variant == BASELINE)
    return [row if row is baseline else replace(row, difference=row.against(baseline)) for row in rows]


def differences(group: str, rows: Sequence[Row]) -> dict[str, Difference]:
    """Variant -> difference to what its group compares it with (`AGAINST`); `rows` are the group's, in its order."""
    if group == "added":
        pairs = list(zip(rows[1:], rows))
    elif group == "left_out":
        pairs = [(row, rows[0]) for row in rows[1:]]
    else:
        return {row.variant: row.difference for row in rows if row.difference is not None}
    found = {row.variant: row.against(other) for row, other in pairs}
    return {variant: difference for variant, difference in found.items() if difference is not None}


def labels(group: str, variants: Sequence[str]) -> dict[str, str]:
    """Variant -> how a table of its group calls it: by what it adds to the one before, or leaves out of the first."""
    found = {name: name.replace("+", " + ") for name in variants}
    if group == "added":
        found |= {name: f"+ {_missing(name, before)}" for name, before in zip(variants[1:], variants)}
    elif group == "left_out":
        full, *others = variants
        found |= {full: f"all: {found[full]}"}
        found |= {name: f"without {_missing(full, name)}" for name in others if name != BASELINE}
    return found


def _missing(variant: str, other: str) -> str:
    """The extensions of a variant that the other has not."""
    has = other.split("+")
    return " + ".join(member for member in variant.split("+") if member not in has)


def paired(differences: Sequence[float]) -> Difference:
    """The mean of per-seed differences, with its interval where there are two or more."""
    count, mean = len(differences), statistics.fmean(differences)
    wins = sum(difference > 0 for difference in differences)
    if count < 2:
        return Difference(mean, None, None, None, wins, count)
    from scipy.stats import t

    deviation = statistics.stdev(differences)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / count**0.5
    return Difference(mean, deviation, mean - half, mean + half, wins, count)


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def best_scores(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The tasks' scores and the overall one, of which more is better, at the evaluation where that is the highest."""
    record = max(evaluations, key=lambda record: record[METRIC])
    return {name.removeprefix("dev/"): value for name, value in record.items() if name.startswith("dev/")}
