"""Running trials on Ray, from where their folders stand: the one process that decides and keeps the record.

Ray Tune schedules, restarts and stops; it is given only the trials that are not over, and its own record of the search
is thrown away. What happened to a trial is written to its `trial.json` at once, by nobody else.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner

from minbert.data.errors import UserError
from minbert.trainer.stop import StopRequest
from minbert.tuning.attempt import Train
from minbert.tuning.population import Population, record_take_over
from minbert.tuning.proposals import Proposals
from minbert.tuning.search import Resources
from minbert.tuning.space import Parameters
from minbert.tuning.trainable import TrialWorker
from minbert.tuning.trial import METRIC, Trial

# (trial's name, donor's name, new parameters) -> what the trial's worker has to know
TakeOver = Callable[[str, str, Parameters], dict[str, Any]]


class StopOnRequest(Stopper):
    """Ends all trials, which save, when the search was asked to stop."""

    def __init__(self, stop: StopRequest):
        self.stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stop.signal is not None


class Recorder(Callback):
    """Writes what Ray tells of a trial to its file. `tell` hears of every trial that starts or is over."""

    def __init__(self, trials: dict[str, Trial], stop: StopRequest, scheduler: str, tell: Callable[[Trial], None]):
        self.trials, self.stop, self.scheduler, self.tell = trials, stop, scheduler, tell

    def setup(self, stop: Any = None, **info: Any) -> None:
        self.stop.catch()  # Tune has just taken a signal for itself

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        ours.status, ours.error = "running", None
        ours.started = ours.started or time.time()
        ours.write()
        self.tell(ours)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        if METRIC in result and result["taken_over"] == len(ours.taken_over):
            ours.step, ours.score, ours.steps = result["at"], result["best"], result["steps"]
        if "ending" in result:
            self._end(ours, result["ending"], result.get("error"))
        elif result.get("done"):  # not by itself
            ours.stopped_by = self.scheduler
            self._end(ours, "stopped")
        elif METRIC in result:
            ours.write()

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        ours.error = _last_line(_error_of(trial))
        ours.write()
        self.tell(ours)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(self.trials[trial.config["name"]], "failed", _error_of(trial))

    def _end(self, ours: Trial, status: str, error: str | None = None) -> None:
        ours.status, ours.ended, ours.error = status, time.time(), _last_line(error)
        ours.write()
        if error and status == "failed":
            (ours.folder / "error.txt").write_text(error.rstrip() + "\n")
        self.tell(ours)


def run_trials(
    folder: Path,
    trials: Sequence[Trial],
    options: Callable[[Trial], dict[str, Any]],
    train: Train,
    resources: Resources,
    processes: int,
    stop: StopRequest,
    tell: Callable[[Trial], None],
    make_scheduler: Callable[[TakeOver], Any] = lambda take_over: None,
    proposals: Callable[[list[Trial], Callable[[Trial], dict[str, Any]]], Proposals] = Proposals,
    further: int = 0,
) -> str | None:
    """Run the `trials` that are not over, and `further` ones that `proposals` will make, on the Ray of this process.

    Returns when all are over, or when `stop` has a signal and every trial has saved, or when Tune could not go on;
    trials that are not over are pending then. In the last case it returns what happened.

    Args:
        folder: of the search; seen by all nodes.
        options: of a trial's run, without its folder.
        processes: of each trial.
        tell: hears of each trial that starts, goes on or is over.
        make_scheduler: receives what a population calls to let a trial go on from where another is.

    Raises UserError if no node can hold a trial.
    """
    limits = _limits(resources, processes)
    fitting = _fitting(limits)
    waiting = [trial for trial in trials if not trial.over]
    by_name = {trial.name: trial for trial in trials}
    for trial in waiting:
        trial.status = "pending"
        trial.write()

    def describe(trial: Trial) -> dict[str, Any]:
        by_name[trial.name] = trial
        trial.write()  # the worker reads from where it goes on
        return {
            "name": trial.name,
            "folder": str(trial.folder.absolute()),
            "options": options(trial),
            "parameters": trial.parameters,
            "taken_over": list(trial.taken_over),
        }

    def take_over(name: str, donor: str, parameters: Parameters) -> dict[str, Any]:
        record_take_over(by_name[name], by_name[donor], parameters)
        tell(by_name[name])
        return describe(by_name[name])

    algorithm, scheduler = proposals(list(waiting), describe), make_scheduler(take_over)
    storage = folder.absolute() / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    name = type(scheduler).__name__ if scheduler is not None else ""
    recorder = Recorder(by_name, stop, "asha" if "ASHA" in name else name, partial(_learn, algorithm, tell))
    tuner = Tuner(
        tune.with_resources(tune.with_parameters(TrialWorker, train=train), limits),
        tune_config=TuneConfig(
            num_samples=len(waiting) + further,
            search_alg=algorithm,
            scheduler=scheduler,
            # A population takes turns, and who waits for one is concurrent, too.
            max_concurrent_trials=None if isinstance(scheduler, Population) else resources.concurrent or fitting,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
        ),
        run_config=RunConfig(
            name="trials",
            storage_path=str(storage),
            stop=StopOnRequest(stop),
            failure_config=FailureConfig(max_failures=resources.retries),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[recorder],
            verbose=0,
        ),
    )
    problem = None
    try:
        tuner.fit()
    except Exception as error:
        problem = _memory_shortage(error)
        if problem is None:
            raise
    for trial in by_name.values():
        if not trial.over:
            trial.status = "pending"
            trial.write()
    shutil.rmtree(storage, ignore_errors=True)
    return problem


def _memory_shortage(error: BaseException | None) -> str | None:
    """What to tell, if `error` is that Ray ended a worker for want of memory, which Tune does not survive."""
    while error is not None:
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return f"{str(error).splitlines()[0]}\nFewer trials at once (--concurrent), or more --cpus for each, help."
        error = error.__cause__ or error.__context__
    return None


def _limits(resources: Resources, processes: int) -> dict[str, float]:
    """What Ray sets aside for a trial, which lies on one node. Raises UserError for parts of several GPUs."""
    gpus = resources.gpus
    if gpus != int(gpus) and (gpus > 1 or processes > 1):
        raise UserError(f"gpus={gpus:g}: only a trial of one process can have a part of a GPU, and then of one")
    return {"cpu": resources.cpus * processes} | ({"gpu": gpus * processes} if gpus else {})


def _fitting(limits: dict[str, float]) -> int:
    """How many trials Ray's nodes hold at once. Raises UserError if that is none: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = [min(int(node.get(name.upper(), 0) / amount + 1e-9) for name, amount in limits.items()) for node in nodes]
    if not any(held):
        wanted = " and ".join(f"{amount:g} {name.upper()}" for name, amount in limits.items())
        there = "; ".join(
            ", ".join(f"{node.get(name.upper(), 0):g} {name.upper()}" for name in limits) for node in nodes
        )
        raise UserError(
            f"a trial takes {wanted} on one node; Ray's nodes have {there}. See --cpus, --gpus, --processes."
        )
    return sum(held)


def _learn(algorithm: Proposals, tell: Callable[[Trial], None], trial: Trial) -> None:
    if trial.over:
        algorithm.learn(trial)
    tell(trial)


def _error_of(trial: Any) -> str:
    """What a failed trial of Ray's left."""
    file = trial.error_file
    return Path(file).read_text() if file and os.path.exists(file) else "the process that trained it was lost"


def _last_line(text: str | None) -> str | None:
    lines = [line for line in (text or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else None
