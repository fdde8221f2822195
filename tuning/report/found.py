"""A search as its page shows it: the trials, the runs of the best with other seeds, and what tables say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.tuning.again import runs_again
from minbert.tuning.report.page import escaped, setting
from minbert.tuning.search import Search
from minbert.tuning.space import Parameters
from minbert.tuning.trial import METRIC, Trial, interrupted, ranked


@dataclass(frozen=True)
class Found:
    """What the page shows. Where the search has gone on in another space, charts about options have the trials that lie
    in the newest one."""

    search: Search
    trials: Sequence[Trial]
    runs: Sequence[Trial]  # of the best ones with other seeds, that have begun
    missing: int  # of those, how many are not over or have not begun, once all trials are over
    scored: Sequence[Trial]  # the best first
    values: Mapping[str, Parameters]  # of a trial, by name: of all options that were ever searched
    inside: Mapping[str, Parameters]  # those of the trials that lie in the newest space

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """Of the search in `folder`, over or not. Raises UserError if there is none."""
        search = Search.read(folder)
        trials = search.trials(folder)
        asked_for = runs_again(search, folder, trials)
        runs, missing = [run for run in asked_for if run.folder.exists()], sum(not run.over for run in asked_for)
        interrupted([*trials, *runs], folder)
        scored = [trial for trial in ranked(trials) if trial.steps and trial.earned()]
        values = {t.name: search.values(t.parameters) if search.earlier else t.parameters for t in trials}
        points = {trial.name: search.point(trial.number, trial.parameters) for trial in trials}
        inside = {name: point for name, point in points.items() if point is not None}
        return cls(search, trials, runs, missing, scored, values, inside)

    @property
    def options(self) -> list[str]:
        """All that were ever searched, those of the newest space first."""
        return list(dict.fromkeys(name for space in reversed(self.search.spaces) for name in space))

    @property
    def points(self) -> list[Trial]:
        """Those of `scored` that lie in the newest space."""
        return [trial for trial in self.scored if trial.name in self.inside]

    @property
    def spaces(self) -> dict[str, str]:
        """From which each trial was drawn, in words for a table."""
        places = {trial.name: self.search.space_of(trial.number) + 1 for trial in self.trials}
        return {name: f"{place}" if name in self.inside else f"{place}, outside" for name, place in places.items()}

    def row(self, trial: Trial) -> list[str]:
        """The last cells of a trial in a table: its space, if there are several, and its options."""
        return [self.spaces[trial.name]] * bool(self.search.earlier) + [
            setting(self.values[trial.name][name]) for name in self.options
        ]

    @property
    def header(self) -> list[str]:
        return ["space"] * bool(self.search.earlier) + self.options

    def hover(self, trial: Trial) -> str:
        """What a tooltip says of a trial."""
        lines = [f"{trial.name}: {trial.score:.3f} at {trial.step}/{trial.steps}"]
        lines += [f"{name} {setting(value)}" for name, value in self.inside[trial.name].items()]
        return "<br>".join(escaped(line) for line in lines)


def best_record(trial: Trial) -> dict[str, Any]:
    """Its evaluation with the highest overall score."""
    return max(trial.earned(), key=lambda record: record[METRIC])
