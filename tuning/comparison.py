"""What an ablation shows: each variant's scores over the seeds, and its paired difference to the baseline.

Runs with the same seed share their order of the data and as much of their initial weights as fits, so differences are
taken seed by seed (a paired t-test): their spread is smaller than that of the scores, which holds what all variants of
a seed have in common.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minbert.tuning.ablation import Ablation
from minbert.tuning.extensions import BASELINE
from minbert.tuning.trial import METRIC, Trial

CONFIDENCE = 0.95


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
    """To the baseline, over the seeds that both have. `low` and `high`: the 95% interval of the mean (Student's t)."""

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
    difference: Difference | None
    failed: int


def compare(ablation: Ablation, trials: Sequence[Trial]) -> list[Row]:
    """A row for every variant that has a score: its runs' evaluations with the best overall score."""
    by_variant: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ablation.variants}
    failed = dict.fromkeys(ablation.variants, 0)
    for trial in trials:
        if trial.status == "failed":
            failed[trial.variant] += 1
        elif trial.status == "finished" and (records := trial.evaluations()):
            by_variant[trial.variant][trial.seed] = best_scores(records)
    baseline = by_variant[BASELINE]
    rows = []
    for variant, runs in by_variant.items():
        scores = {name: spread([run[name] for run in runs.values()]) for name in next(iter(runs.values()), {}) if runs}
        common = sorted(runs.keys() & baseline.keys())
        pairs = [runs[seed]["overall"] - baseline[seed]["overall"] for seed in common]
        difference = paired(pairs) if variant != BASELINE and pairs else None
        rows.append(Row(variant, scores, difference, failed[variant]))
    return rows


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
