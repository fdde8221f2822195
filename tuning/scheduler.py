"""Which trials are stopped early: Ray's ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning").

At shares `grace`, `grace * reduction`, ... of its budget a trial is compared with all that were there before it, and
stopped unless it is among the best 1 / reduction. The comparison is of shares of each trial's own budget, because a
step is not the same amount of training at every batch size. What counts is the best score so far, as in the ranking.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from minbert.tuning.trial import Trial, better, score_of

REACHED = "reached"  # in a worker's results: the best score so far
WORST = -1e9  # of a trial whose evaluations had no score yet: what is no number compares with nothing
LAST_RUNG = 0.6  # share of the budget after which stopping saves little, and would leave no full score


class RememberingASHA(ASHAScheduler):
    """ASHA that knows trials by their own names, so that a search that goes on judges by all earlier results too."""

    def __init__(self, grace: float, reduction: float, earlier: Iterable[Trial] = ()):
        super().__init__(
            time_attr="progress",
            metric=REACHED,
            mode="max",
            max_t=max(grace, LAST_RUNG),
            grace_period=grace,
            reduction_factor=reduction,
            stop_last_trials=False,
        )
        for trial in earlier:
            known = _named(trial.name)
            super().on_trial_add(None, known)
            reached = None
            for record in trial.evaluations(scored=False):
                if trial.steps and record["step"] <= trial.step:
                    reached = better(reached, score_of(record))
                    result = {"progress": record["step"] / trial.steps, REACHED: WORST if reached is None else reached}
                    super().on_trial_result(None, known, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _named(trial.config["name"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, _named(trial.config["name"]), result)
        finished = result.get("progress", 0.0) >= 1.0
        return TrialScheduler.CONTINUE if finished else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its evaluations have been heard already."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """What it reached still counts."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """What it reached still counts."""


def _named(name: str) -> Any:
    """All that ASHA looks at in a trial."""
    return SimpleNamespace(trial_id=name)
