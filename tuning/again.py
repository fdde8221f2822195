"""The best trials of a search once more, with other seeds: the first of many is also the luckiest of many.

Of noisy scores the highest flatters its configuration, the more so the more trials there are. The seeds that the search
did not have tell by how much, and which of the best is the best. Their runs are SEARCH/again/TRIAL/seed-N/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minbert.tuning.comparison import Difference, Spread, paired, spread
from minbert.tuning.search import Search
from minbert.tuning.trial import METRIC, Trial, best, ranked, read_trials

FOLDER = "again"


def runs_again(search: Search, folder: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The runs that the search asks for when all its trials are over, those of one seed before the next; and further
    ones that are over, as of trials that were among the best before others came."""
    there = {run.name: run for run in read_trials(folder / FOLDER, "*/*")}
    runs = []
    over = all(trial.over for trial in trials) and len(trials) >= search.samples
    for seed in search.seeds if over else ():
        for trial in ranked(trials)[: search.again]:
            name = f"{trial.name},seed={seed}"
            place = folder / FOLDER / trial.name / f"seed-{seed}"
            new = Trial(place, name, 0, dict(trial.parameters), variant=trial.name, seed=seed)
            runs.append(there.pop(name, new))
    runs += [run for run in there.values() if run.over]
    for number, run in enumerate(runs):
        run.number = number
    return runs


def runs_in_all(search: Search, folder: Path) -> int:
    """How many trials and runs with other seeds it has at its end. Before its trials are over that is the most: one
    without a score is not trained again."""
    trials = search.trials(folder)
    runs = runs_again(search, folder, trials)
    if len(trials) < search.samples or any(not trial.over for trial in trials):
        return max(search.samples, len(trials)) + max(search.again * len(search.seeds), len(runs))
    return len(trials) + len(runs)


@dataclass(frozen=True)
class Candidate:
    """One of the best trials, and its scores with the other seeds."""

    trial: Trial
    scores: Mapping[int, float]  # seed -> score

    @property
    def spread(self) -> Spread:
        return spread(list(self.scores.values()))

    @property
    def flattery(self) -> float:
        """By how much the score in the search is above the mean over the other seeds."""
        return self.trial.score - self.spread.mean

    def to(self, other: "Candidate") -> Difference | None:
        """The difference to another over the seeds that both have."""
        common = self.scores.keys() & other.scores.keys()
        return paired([self.scores[seed] - other.scores[seed] for seed in sorted(common)]) if common else None


def candidates(trials: Sequence[Trial], runs: Sequence[Trial]) -> list[Candidate]:
    """Those that have a score with another seed, the highest mean first. One with fewer seeds than others comes after
    them: its mean says less."""
    found = []
    for trial in ranked(trials):
        own = [run for run in runs if run.variant == trial.name and run.status == "finished" and run.score is not None]
        if own:
            found.append(Candidate(trial, {run.seed: run.score for run in own}))
    return sorted(found, key=lambda each: (-len(each.scores), -each.spread.mean, each.trial.number))


def verdict(found: Sequence[Candidate]) -> str:
    """In words: what the first trial of the search is worth, and which is the best."""
    first = max(found, key=lambda each: each.trial.score)
    best = found[0]
    over = f"over {len(first.scores)} other seeds" if len(first.scores) > 1 else "with another seed"
    text = (
        f"{first.trial.name} is the best of the search with {first.trial.score:.3f}; {over} it has {first.spread}. "
        f"The search {'flatters it by' if first.flattery >= 0 else 'was too modest by'} {abs(first.flattery):.3f}."
    )
    if best is not first:
        return f"{text} {best.trial.name} is better: {best.spread}, {best.to(first).interval} to it, seed by seed."
    others = [each for each in found if each is not first]
    return f"{text} It stays the best of the {len(found)} that were trained again." if others else text


def winner(search: Search, trials: Sequence[Trial], runs: Sequence[Trial]) -> tuple[Trial, str] | None:
    """The best trial, by its mean over the other seeds once they have been trained, and what it is the best of; None if
    no trial has a score."""
    found = candidates(trials, runs)
    asked = [each for each in found if each.scores.keys() >= set(search.seeds)]
    if asked and all(run.over for run in runs):
        first = asked[0]
        again = f"{len(found)} of them trained again with other seeds"
        known = f"{first.trial.name}, {METRIC} {first.spread} ({first.trial.score:.4f} in the search)"
        return first.trial, f"The best of {len(trials)} trials, {again}: {known}."
    chosen = best(trials)
    if chosen is None:
        return None
    known = f"{chosen.name}, {METRIC} {chosen.score:.4f} within {chosen.step} steps"
    return chosen, f"The best of {len(trials)} trials: {known}."
