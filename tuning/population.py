"""Population-based training (Jaderberg et al. 2017): trials that fall behind go on from the checkpoint of one that is
ahead, with its options, a little changed.

Ray starts and pauses the trials. Who is judged, who takes over from whom and whose turn it is, is decided here. What is
taken over is the other run's own checkpoint, whose hashes are verified, and not a copy that Ray has made.

No trial ever goes back: it takes over only from one that has come as far, and after that trains an interval of its own
before it may again. So every turn brings its trial closer to its end, and the search ends however few fit at a time.
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from minbert.tuning.search import Search
from minbert.tuning.space import Parameters, explore
from minbert.tuning.trial import METRIC, Trial

if TYPE_CHECKING:
    from minbert.tuning.recorder import Recorder

QUANTILE = 0.25  # share of the population that takes over, and of that from which it does
ROUNDING = 1e-9


@dataclass
class Standing:
    """How a trial stands. `progress` is the share of its budget."""

    progress: float = 0.0
    score: float | None = None  # of its newest evaluation; None if that has none
    heard: bool = False  # of an evaluation, ever
    since: float = 0.0  # the progress at which it took over last
    turn: float = 0.0  # the progress at which its turn began


class Population(FIFOScheduler):
    """`recorder` is told of every evaluation and of who takes over from whom. `earlier`: the trials as they stand when
    the search starts."""

    def __init__(self, search: Search, recorder: "Recorder", earlier: Iterable[Trial] = ()):
        super().__init__()
        self.search, self.recorder = search, recorder
        self.standings = {trial.name: _standing(trial) for trial in earlier}

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        self.standings.setdefault(trial.config["name"], Standing())

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        if METRIC not in result or result["taken_over"] != len(trial.config["taken_over"]):
            return TrialScheduler.CONTINUE
        self.recorder.hear(trial.config["name"], result)
        standing = self._of(trial)
        standing.progress, standing.score, standing.heard = result["progress"], result[METRIC], True
        trials = [other for other in tune_controller.get_trials() if not other.is_finished()]
        for other in trials:  # who waits is judged again, as others may have come as far meanwhile
            if other is trial or other.status == RayTrial.PAUSED:
                self._judge(other, trials, tune_controller)
        if trial.status == RayTrial.PAUSED:  # it has taken over
            return TrialScheduler.NOOP
        waiting = [other for other in trials if other.status in (RayTrial.PENDING, RayTrial.PAUSED)]
        over = self._trained(standing.progress - standing.turn) and standing.progress < 1
        makes_room = over and any(self._of(other).progress < standing.progress for other in waiting)
        return TrialScheduler.PAUSE if makes_room else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The one that has come least far."""
        waiting = [t for t in tune_controller.get_trials() if t.status in (RayTrial.PENDING, RayTrial.PAUSED)]
        chosen = min(waiting, key=lambda trial: (self._of(trial).progress, trial.config["name"]), default=None)
        if chosen is not None:
            self._of(chosen).turn = self._of(chosen).progress
        return chosen

    def _of(self, trial: RayTrial) -> Standing:
        return self.standings[trial.config["name"]]

    def _trained(self, progress: float) -> bool:
        return progress >= self.search.grace - ROUNDING

    def _judge(self, trial: RayTrial, trials: list[RayTrial], tune_controller: Any) -> None:
        """Let the trial take over from another if it is among the worst, and one of the best has come as far."""
        standing = self._of(trial)
        if standing.progress >= 1 or not self._trained(standing.progress - standing.since):
            return
        donors = self._donors(trial, trials)
        if not donors:
            return
        name = trial.config["name"]
        key = f"{self.search.seed}/{name}/{standing.progress:.6f}"
        random = np.random.default_rng(zlib.crc32(key.encode()))
        donor = donors[random.integers(len(donors))]
        parameters = explore(self.search.space, donor.config["parameters"], random)
        taken_over = self.recorder.take_over(name, donor.config["name"], parameters)
        if trial.status != RayTrial.PAUSED:
            tune_controller.pause_trial(trial, should_checkpoint=False)
        trial.set_config(trial.config | taken_over)
        progress = self._of(donor).progress
        self.standings[name] = Standing(progress, None, heard=True, since=progress, turn=progress)

    def _donors(self, trial: RayTrial, trials: list[RayTrial]) -> list[RayTrial]:
        """By name, those of the best that have come as far as `trial`; none if it is not among the worst, or somebody
        was not heard yet."""
        if not all(self._of(other).heard for other in trials):
            return []
        own = self._of(trial)
        there = [other for other in trials if other is trial or self._of(other).score is not None]
        there.sort(key=lambda other: -math.inf if (score := self._of(other).score) is None else score)
        count = min(math.ceil(len(there) * QUANTILE), len(there) // 2)
        if trial not in there[:count]:
            return []
        donors = [other for other in there[-count:] if own.progress <= self._of(other).progress < 1]
        donors = [other for other in donors if own.score is None or self._of(other).score > own.score]
        return sorted(donors, key=lambda other: other.config["name"])


def _standing(trial: Trial) -> Standing:
    """As the trial's own files tell."""
    if not trial.steps:
        return Standing()
    progress, earned = trial.step / trial.steps, trial.earned()
    since = trial.taken_over[-1]["at"] / trial.steps if trial.taken_over else 0.0
    score = earned[-1][METRIC] if earned else None
    return Standing(progress, score, heard=trial.step > 0, since=since, turn=progress)


def record_take_over(trial: Trial, donor: Trial, parameters: Parameters) -> None:
    """Write down that `trial` goes on from the donor's checkpoint, before it does: a search that dies meanwhile does
    it when it goes on. Scores stay with the steps that earned them: the new parameters have none yet."""
    left = {"parameters": trial.parameters, "score": trial.score, "step": trial.step}
    trial.taken_over.append({"donor": donor.name, "at": donor.step, "parameters": parameters, "left": left})
    trial.parameters, trial.score, trial.step, trial.steps = parameters, None, donor.step, donor.steps
    trial.write()
