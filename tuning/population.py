"""Population-based training (Jaderberg et al. 2017): trials that fall behind go on from the checkpoint of one that is
ahead, with its options, a little changed.

Ray's scheduler decides who is behind and shares the machine out among the population. What is taken over is ours: the
other run's own checkpoint, whose hashes are verified, and not a copy that Ray has made.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pbt import _PBTTrialState

from minbert.tuning.search import Search
from minbert.tuning.space import Parameters, explore
from minbert.tuning.trial import METRIC, Trial


class Population(PopulationBasedTraining):
    """`take_over(name, donor, parameters)` records that a trial goes on from where the donor is; it returns what the
    worker has to know."""

    def __init__(self, search: Search, take_over: Callable[[str, str, Parameters], dict[str, Any]]):
        super().__init__(
            time_attr="progress",
            metric=METRIC,
            mode="max",
            perturbation_interval=search.grace,
            hyperparam_mutations={"options": {}},
            log_config=False,
            require_attrs=False,
        )
        self.search, self.take_over = search, take_over

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        self._trial_state[trial] = _PBTTrialState(trial)  # Ray's own way does without a search algorithm

    def _checkpoint_or_exploit(
        self, trial: RayTrial, tune_controller: Any, upper_quantile: list[RayTrial], lower_quantile: list[RayTrial]
    ) -> None:
        name, state = trial.config["name"], self._trial_state[trial]
        if trial not in lower_quantile or state.last_train_time >= 1:
            return
        key = f"{self.search.seed}/{name}/{state.last_train_time:.6f}"
        random = np.random.default_rng(zlib.crc32(key.encode()))
        donor = sorted(upper_quantile, key=lambda other: other.config["name"])[random.integers(len(upper_quantile))]
        parameters = explore(self.search.space, donor.config["parameters"], random)
        taken_over = self.take_over(name, donor.config["name"], parameters)
        tune_controller.pause_trial(trial)
        trial.set_config(trial.config | taken_over)
        state.last_perturbation_time = self._trial_state[donor].last_perturbation_time
        state.last_train_time = self._trial_state[donor].last_train_time


def record_take_over(trial: Trial, donor: Trial, parameters: Parameters) -> None:
    """Write down that `trial` goes on from the donor's checkpoint, before it does: a search that dies meanwhile does
    it when it goes on."""
    trial.parameters, trial.step, trial.score = parameters, donor.step, donor.score
    trial.taken_over.append({"donor": donor.name, "at": donor.step, "parameters": parameters})
    trial.write()
