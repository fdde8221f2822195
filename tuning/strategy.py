"""How the trials of a search go: which comes next, and what becomes of those that run, in Ray Tune's words."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import TrialScheduler

from minbert.tuning.population import Population
from minbert.tuning.proposals import Proposals, TpeProposals
from minbert.tuning.scheduler import RememberingASHA
from minbert.tuning.search import NextTrial, Search
from minbert.tuning.trial import Trial

if TYPE_CHECKING:
    from minbert.tuning.recorder import Recorder

Describe = Callable[[Trial], dict[str, Any]]  # what a trial's worker has to know


class Strategy:
    """The trials that are there, each to its end, as in an ablation."""

    name = ""  # by which a trial remembers what stopped it
    further = 0  # trials that are proposed beside those that are there
    takes_turns = False  # who waits for a turn is concurrent, too

    def proposals(self, waiting: list[Trial], describe: Describe) -> Proposals:
        """What gives Ray the trials that are `waiting`, and then new ones."""
        return Proposals(waiting, describe)

    def scheduler(self, recorder: "Recorder") -> TrialScheduler | None:
        """What stops trials or lets them take turns; `recorder` is what a population calls."""
        return None


class SearchStrategy(Strategy):
    """A search's own algorithm and scheduler, which know the `trials` of earlier starts."""

    def __init__(self, folder: Path, search: Search, trials: list[Trial]):
        self.folder, self.search, self.trials = folder, search, trials
        self.name, self.takes_turns = search.scheduler, search.scheduler == "pbt"
        self.further = max(0, search.samples - len(trials))

    def proposals(self, waiting: list[Trial], describe: Describe) -> Proposals:
        search, trials = self.search, self.trials
        if search.algorithm == "tpe":
            return TpeProposals(search, trials, waiting, describe, partial(search.new_trial, self.folder))
        return Proposals(waiting, describe, NextTrial(search, self.folder, trials))

    def scheduler(self, recorder: "Recorder") -> TrialScheduler | None:
        if self.search.scheduler == "asha":
            points = [trial for trial in self.trials if self.search.point(trial.number, trial.parameters) is not None]
            return RememberingASHA(self.search.grace, self.search.reduction, points)
        return Population(self.search, recorder, self.trials) if self.takes_turns else None
