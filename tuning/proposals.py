"""Which trial comes next: first those that are waiting, then what the algorithm proposes.

Random and grid searches make them one by one, whatever the results are. TPE (Bergstra et al. 2011, through Optuna)
proposes each from the results so far, those of an earlier start of the search included; with several trials at a time,
the results that there are depend on which trial ends first.
"""

import zlib
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from minbert.tuning.search import Search
from minbert.tuning.space import Choice, Integer, LogUniform, Parameters
from minbert.tuning.trial import METRIC, Trial

STARTUP = 10  # random trials before TPE has something to learn from


class Proposals(Searcher):
    """`describe` turns a trial into the configuration that its worker receives; `propose` makes a new one, as long as
    there is one."""

    def __init__(
        self,
        waiting: list[Trial],
        describe: Callable[[Trial], dict[str, Any]],
        propose: Callable[[], Trial | None] = lambda: None,
    ):
        super().__init__(metric=METRIC, mode="max")
        self.waiting, self.describe, self.propose = waiting, describe, propose

    def suggest(self, trial_id: str) -> Any:
        trial = self.waiting.pop(0) if self.waiting else self.propose()
        return Searcher.FINISHED if trial is None else self.describe(trial)

    def learn(self, trial: Trial) -> None:
        """Hear that a trial is over."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """`learn` is told by our own names."""

    def save(self, checkpoint_path: str) -> None:
        """The trials' own files say everything."""

    def restore(self, checkpoint_path: str) -> None:
        """The trials' own files say everything."""


class TpeProposals(Proposals):
    """Needs Optuna, as `Search.check` has seen to."""

    def __init__(
        self,
        search: Search,
        trials: list[Trial],
        waiting: list[Trial],
        describe: Callable[[Trial], dict[str, Any]],
        create: Callable[[int, Parameters], Trial],
    ):
        super().__init__(waiting, describe, self._propose)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self.create = search, create
        self.next_number = max((trial.number for trial in trials), default=-1) + 1
        self.distributions = {name: _distribution(kind) for name, kind in search.space.items()}
        self.study = optuna.create_study(direction="maximize")
        for trial in trials:
            if trial.over:
                self.learn(trial)

    def _propose(self) -> Trial | None:
        if self.next_number >= self.search.samples:
            return None
        self.study.sampler = self._sampler(self.next_number)
        asked = self.study.ask(self.distributions)
        parameters = {name: self._value(name, asked.params[name]) for name in self.search.space}
        trial = self.create(self.next_number, parameters)
        self.next_number += 1
        return trial

    def _sampler(self, number: int) -> Any:
        """Of one proposal: it depends on the seed, its number and the results so far, and on no earlier start."""
        import optuna

        seed = zlib.crc32(f"{self.search.seed}/{number}".encode())
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)

    def learn(self, trial: Trial) -> None:
        import optuna

        point = self.search.point(trial.number, trial.parameters)
        if trial.status == "failed" or point is None:
            return
        parameters = {
            name: kind.values.index(point[name]) if isinstance(kind, Choice) else point[name]
            for name, kind in self.search.space.items()
        }
        # One whose evaluations had no score is worse than any other.
        state = optuna.trial.TrialState.PRUNED if trial.score is None else optuna.trial.TrialState.COMPLETE
        told = optuna.trial.create_trial(
            state=state, params=parameters, distributions=self.distributions, value=trial.score
        )
        self.study.add_trial(told)

    def _value(self, name: str, value: Any) -> Any:
        kind = self.search.space[name]
        return kind.values[value] if isinstance(kind, Choice) else value


def _distribution(kind: Any) -> Any:
    """In Optuna's words; choices by their place in the list, as it takes no lists for values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(kind, Choice):
        return CategoricalDistribution(range(len(kind.values)))
    if isinstance(kind, Integer):
        return IntDistribution(kind.low, kind.high)
    return FloatDistribution(kind.low, kind.high, log=isinstance(kind, LogUniform))
