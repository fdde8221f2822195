"""Running trials on Ray, from where their folders stand: the one process that decides and keeps the record.

Ray Tune schedules, restarts and stops; it is given only the trials that are not over, and its own record of the search
is thrown away. What happened to a trial is written to its `trial.json` at once, by nobody else.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner

from minbert.data.errors import UserError, disk_trouble
from minbert.trainer.config import ParallelConfig
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.background import Train, tells_of_disk
from minbert.tuning.population import Population, record_take_over
from minbert.tuning.proposals import Proposals
from minbert.tuning.search import Resources
from minbert.tuning.space import Parameters
from minbert.tuning.take_over import stage
from minbert.tuning.trainable import TrialWorker
from minbert.tuning.trial import METRIC, Trial

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # that Ray puts around names


class StopOnRequest(Stopper):
    """Ends all trials, which save, when the search was asked to stop, or its disk takes nothing any more."""

    def __init__(self, stop: StopRequest, recorder: "Recorder"):
        self.stop, self.recorder = stop, recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stop.signal is not None or self.recorder.no_room is not None


class Recorder(Callback):
    """Writes what Ray tells of a trial to its file. `tell` hears of every trial that starts or is over; `describe`
    says what a trial's worker has to know. `no_room`: what a disk that is full or read-only has refused."""

    def __init__(
        self,
        trials: dict[str, Trial],
        stop: StopRequest,
        tell: Callable[[Trial], None],
        describe: Callable[[Trial], dict[str, Any]],
    ):
        self.trials, self.stop, self.tell, self.describe = trials, stop, tell, describe
        self.scheduler = ""
        self.no_room: str | None = None

    def setup(self, stop: Any = None, **info: Any) -> None:
        self.stop.catch()  # Tune has just taken a signal for itself

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        ours.status, ours.error = "running", None
        ours.started = ours.started or time.time()
        self._write(ours)

    def hear(self, name: str, result: dict[str, Any]) -> None:
        """Of an evaluation; a scheduler that acts on it calls this first, and Ray does afterwards."""
        ours = self.trials[name]
        if METRIC in result and result["taken_over"] == len(ours.taken_over):
            ours.step, ours.score, ours.steps = result["at"], result["best"], result["steps"]

    def take_over(self, name: str, donor: str, parameters: Parameters) -> dict[str, Any]:
        """Let a trial go on from where another is, with `parameters`; returns what its worker has to know."""
        ours = self.trials[name]
        donor_folder = RunFolder(self.trials[donor].folder)
        record_take_over(ours, self.trials[donor], parameters)
        self.tell(ours)
        described = self.describe(ours)
        stage(RunFolder(ours.folder), donor_folder, described["options"], len(ours.taken_over))
        return described

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        self.hear(ours.name, result)
        if result.get("ending") == "no room":
            self._interrupt(ours, result["error"])
        elif "ending" in result:
            self._end(ours, result["ending"], result.get("error"))
        elif result.get("done"):  # not by itself
            ours.stopped_by = self.scheduler
            self._end(ours, "stopped")
        elif METRIC in result:
            with self._room():
                ours.write()

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours, error = self.trials[trial.config["name"]], _error_of(trial)
        if tells_of_disk(error):
            self._interrupt(ours, error)
            return
        ours.error = _last_line(error)
        self._write(ours)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours, error = self.trials[trial.config["name"]], _error_of(trial)
        if self.no_room or tells_of_disk(error):  # the others cannot save, either
            self._interrupt(ours, error)
        else:
            self._end(ours, "failed", error)

    def _interrupt(self, ours: Trial, error: str) -> None:
        """A disk that is full is nobody's failure: the search stops, and goes on when there is room."""
        self.no_room = self.no_room or f"{ours.folder}: {_last_line(error)}"
        ours.status = "pending"
        with self._room():
            ours.write()

    def _end(self, ours: Trial, status: str, error: str | None = None) -> None:
        ours.status, ours.ended, ours.error = status, time.time(), _last_line(error)
        if error and status == "failed":
            with self._room():
                (ours.folder / "error.txt").write_text(error.rstrip() + "\n")
        self._write(ours)

    def _write(self, ours: Trial) -> None:
        with self._room():
            ours.write()
            self.tell(ours)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Around what writes: Tune does not survive an error of this object."""
        try:
            yield
        except OSError as error:
            if (trouble := disk_trouble(error)) is None:
                raise
            self.no_room = self.no_room or str(trouble)


class Room(NamedTuple):
    """What Ray sets aside for a trial, which lies on one node, and how many trials its nodes hold at once."""

    limits: dict[str, float]
    fitting: int


def find_room(resources: Resources, parallel: ParallelConfig) -> Room:
    """On the Ray of this process. Raises UserError if no node can hold a trial: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    limits = limits_of(resources, parallel, nodes)
    return Room(limits, _fitting(limits, nodes))


def run_trials(
    folder: Path,
    trials: Sequence[Trial],
    options: Callable[[Trial], dict[str, Any]],
    train: Train,
    resources: Resources,
    room: Room,
    stop: StopRequest,
    tell: Callable[[Trial], None],
    make_scheduler: Callable[[Recorder], Any] = lambda recorder: None,
    proposals: Callable[[list[Trial], Callable[[Trial], dict[str, Any]]], Proposals] = Proposals,
    further: int = 0,
) -> str | None:
    """Run the `trials` that are not over, and `further` ones that `proposals` will make, on the Ray of this process.

    Returns when all are over, or when `stop` has a signal and every trial has saved, or when Tune could not go on;
    trials that are not over are pending then. In the last case it returns what happened.

    Args:
        folder: of the search; seen by all nodes.
        options: of a trial's run, without its folder.
        tell: hears of each trial that starts, goes on or is over.
        make_scheduler: receives what a population calls to let a trial go on from where another is.

    Raises UserError if the disk is full or read-only; the trials that could not be saved go on from before.
    """
    waiting = [trial for trial in trials if not trial.over]
    by_name = {trial.name: trial for trial in trials}
    _make_pending(waiting)

    def describe(trial: Trial) -> dict[str, Any]:
        by_name[trial.name] = trial
        trial.write()  # the worker reads from where it goes on
        return {
            "name": trial.name,
            "folder": str(trial.folder.absolute()),
            "options": options(trial),
            "parameters": trial.parameters,
            "taken_over": list(trial.taken_over),
            "gpus": room.limits.get("gpu", 0),
        }

    algorithm = proposals(list(waiting), describe)
    recorder = Recorder(by_name, stop, partial(_learn, algorithm, tell), describe)
    scheduler = make_scheduler(recorder)
    storage = folder.absolute() / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    name = type(scheduler).__name__ if scheduler is not None else ""
    recorder.scheduler = "asha" if "ASHA" in name else name
    tuner = Tuner(
        tune.with_resources(tune.with_parameters(TrialWorker, train=train), room.limits),
        tune_config=TuneConfig(
            num_samples=len(waiting) + further,
            search_alg=algorithm,
            scheduler=scheduler,
            # A population takes turns, and who waits for one is concurrent, too.
            max_concurrent_trials=None if isinstance(scheduler, Population) else resources.concurrent or room.fitting,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
        ),
        run_config=RunConfig(
            name="trials",
            storage_path=str(storage),
            stop=StopOnRequest(stop, recorder),
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
        recorder.no_room = recorder.no_room or _disk_trouble(error)
        if problem is None and recorder.no_room is None:
            raise
    shutil.rmtree(storage, ignore_errors=True)
    _make_pending([trial for trial in by_name.values() if not trial.over])
    if recorder.no_room:
        raise UserError(f"{recorder.no_room}\nThe search has stopped. Make room, then repeat the command to go on.")
    return problem


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


def limits_of(resources: Resources, parallel: ParallelConfig, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a trial takes of a node; a GPU for each of its processes where there are GPUs, unless that is said
    otherwise. Raises UserError for parts of several GPUs, or a GPU that is wanted and not set aside."""
    processes, gpus = parallel.processes, resources.gpus
    if gpus is None:
        gpus = 1 if parallel.device != "cpu" and any(node.get("GPU", 0) for node in nodes) else 0
    if gpus != int(gpus) and (gpus > 1 or processes > 1):
        raise UserError(f"gpus={gpus:g}: only a trial of one process can have a part of a GPU, and then of one")
    if parallel.device == "cuda" and not gpus:
        why = "the trials get none (--gpus 0)" if resources.gpus == 0 else "Ray's nodes have none"
        raise UserError(f"device=cuda needs GPUs, and {why}")
    return {"cpu": resources.cpus * processes} | ({"gpu": gpus * processes} if gpus else {})


def _fitting(limits: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once. Raises UserError if that is none."""
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
    text = Path(file).read_text() if file and os.path.exists(file) else "the process that trained it was lost"
    return COLOURS.sub("", text)


def _last_line(text: str | None) -> str | None:
    lines = [line for line in (text or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else None
