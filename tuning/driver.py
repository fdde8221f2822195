"""Running trials on Ray, from where their folders stand: the one process that decides and keeps the record.

Ray Tune schedules, restarts and stops; it is given only the trials that are not over, and its own record of the search
is thrown away. What happened to a trial is written to its `trial.json` at once (`recorder.py`).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner

from minbert.data.errors import UserError, disk_trouble
from minbert.trainer.options import ParallelConfig
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.background import Train
from minbert.tuning.recorder import Recorder
from minbert.tuning.room import find_room
from minbert.tuning.search import Resources
from minbert.tuning.strategy import Strategy
from minbert.tuning.trainable import TrialWorker
from minbert.tuning.trial import Trial


class StopOnRequest(Stopper):
    """Ends all trials, which save, when the search was asked to stop, or its disk takes nothing any more."""

    def __init__(self, stop: StopRequest, recorder: Recorder):
        self.stop, self.recorder = stop, recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stop.signal is not None or self.recorder.no_room is not None


class TrialRunner:
    """Trains the trials of a search or an ablation on the Ray of this process.

    Args:
        folder: of the search; seen by all nodes.
        options: of a trial's run, without its folder.
        train: what a worker does with a trial.
        resources: what a trial takes; `parallel` has its processes.

    Raises UserError if no node can hold a trial: Ray would wait for ever.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: Callable[[Trial], dict[str, Any]],
        train: Train,
        resources: Resources,
        parallel: ParallelConfig,
    ):
        self.folder, self.options, self.train, self.resources = folder.absolute(), options, train, resources
        self.room = find_room(resources, parallel)

    def run(
        self,
        trials: Sequence[Trial],
        *,
        stop: StopRequest,
        tell: Callable[[Trial], None],
        strategy: Strategy,
    ) -> str | None:
        """Run the `trials` that are not over, and those that `strategy` proposes.

        Returns when all are over, or when `stop` has a signal and every trial has saved, or when Tune could not go on;
        trials that are not over are pending then. In the last case it returns what happened. `tell` hears of each
        trial that starts, goes on or is over.

        Raises UserError if the disk is full or read-only; the trials that could not be saved go on from before.
        """
        waiting = [trial for trial in trials if not trial.over]
        _make_pending(waiting)
        recorder = Recorder(trials, stop, tell, self._configuration, strategy.name, self.room.limits)
        recorder.proposals = strategy.proposals(list(waiting), recorder.describe)
        storage = self.folder / "ray"
        shutil.rmtree(storage, ignore_errors=True)
        tuner = self._tuner(len(waiting) + strategy.further, strategy, recorder, StopOnRequest(stop, recorder), storage)
        problem = None
        try:
            tuner.fit()
        except Exception as error:
            problem = _memory_shortage(error)
            recorder.no_room = recorder.no_room or _disk_trouble(error)
            if problem is None and recorder.no_room is None:
                raise
        shutil.rmtree(storage, ignore_errors=True)
        _make_pending([trial for trial in recorder.trials.values() if not trial.over])
        if recorder.no_room:
            raise UserError(f"{recorder.no_room}\nThe search has stopped. Make room, then repeat the command to go on.")
        return problem

    def _configuration(self, trial: Trial) -> dict[str, Any]:
        """What a trial's worker has to know."""
        return {
            "name": trial.name,
            "folder": str(trial.folder.absolute()),
            "options": self.options(trial),
            "parameters": trial.parameters,
            "taken_over": list(trial.taken_over),
            "gpus": self.room.limits.get("gpu", 0),
        }

    def _tuner(self, samples: int, strategy: Strategy, recorder: Recorder, stopper: Stopper, storage: Path) -> Tuner:
        concurrent = self.resources.concurrent or self.room.fitting
        return Tuner(
            tune.with_resources(tune.with_parameters(TrialWorker, train=self.train), self.room.limits),
            tune_config=TuneConfig(
                num_samples=samples,
                search_alg=recorder.proposals,
                scheduler=strategy.scheduler(recorder),
                max_concurrent_trials=None if strategy.takes_turns else concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["name"],
                trial_dirname_creator=lambda trial: trial.config["name"],
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=str(storage),
                stop=stopper,
                failure_config=FailureConfig(max_failures=self.resources.retries),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                callbacks=[recorder],
                verbose=0,
            ),
        )


def _make_pending(trials: Sequence[Trial]) -> None:
    """A file that a full disk does not take stays as it was; that the trial does not run, the lock says, too."""
    for trial in trials:
        trial.status = "pending"
        try:
            trial.write()
        except OSError as error:
            if disk_trouble(error) is None:
                raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_trouble(error: BaseException) -> str | None:
    troubles = (disk_trouble(one) for one in _chain(error) if isinstance(one, OSError))
    return next((str(trouble) for trouble in troubles if trouble), None)


def _memory_shortage(error: BaseException) -> str | None:
    """What to tell, if `error` is that Ray ended a worker for want of memory, which Tune does not survive."""
    for one in _chain(error):
        if isinstance(one, ray.exceptions.OutOfMemoryError):
            return f"{str(one).splitlines()[0]}\nFewer trials at once (--concurrent), or more --cpus for each, help."
    return None
