"""The record of what Ray tells of trials: each goes to the trial's own file at once, written by nobody else."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune import Callback

from minbert.data.errors import disk_trouble
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.background import line_on_disk, telling_line
from minbert.tuning.population import record_take_over
from minbert.tuning.proposals import Proposals
from minbert.tuning.space import Parameters
from minbert.tuning.take_over import stage
from minbert.tuning.trial import METRIC, Trial

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # that Ray puts around names


class Recorder(Callback):
    """Writes what Ray tells of a trial to its file. `tell` hears of every trial that starts or is over.

    `configuration` is what a trial's worker has to know, `takes` what Ray sets aside for it. `no_room`: what a disk
    that is full or read-only has refused.
    """

    proposals: Proposals  # which are made with `describe`
    no_room: str | None = None

    def __init__(
        self,
        trials: Sequence[Trial],
        stop: StopRequest,
        tell: Callable[[Trial], None],
        configuration: Callable[[Trial], dict[str, Any]],
        scheduler: str,
        takes: dict[str, float],
    ):
        self.takes = takes
        self.trials = {trial.name: trial for trial in trials}
        self.stop, self.tell, self.configuration, self.scheduler = stop, tell, configuration, scheduler

    def describe(self, trial: Trial) -> dict[str, Any]:
        """What the trial's worker has to know; from now on the trial is one of ours."""
        self.trials[trial.name] = trial
        trial.takes = self.takes
        trial.write()  # the worker reads from where it goes on
        return self.configuration(trial)

    def setup(self, stop: Any = None, **info: Any) -> None:
        self.stop.catch()  # Tune has just taken a signal for itself

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["name"]]
        ours.status, ours.error = "running", None
        now = time.time()
        ours.started = ours.started or now
        ours.turns.append([now, now])
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
        if ours.turns:
            ours.turns[-1][1] = time.time()
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
        if line_on_disk(error):
            self._interrupt(ours, error)
            return
        ours.error = telling_line(error)
        self._write(ours)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours, error = self.trials[trial.config["name"]], _error_of(trial)
        if self.no_room or line_on_disk(error):  # the others cannot save, either
            self._interrupt(ours, error)
        else:
            self._end(ours, "failed", error)

    def _interrupt(self, ours: Trial, error: str) -> None:
        """A disk that is full is nobody's failure: the search stops, and goes on when there is room."""
        self.no_room = self.no_room or f"{ours.folder}: {line_on_disk(error) or telling_line(error)}"
        ours.status = "pending"
        with self._room():
            ours.write()

    def _end(self, ours: Trial, status: str, error: str | None = None) -> None:
        ours.status, ours.ended, ours.error = status, time.time(), telling_line(error)
        if ours.turns:
            ours.turns[-1][1] = ours.ended
        if error and status == "failed":
            with self._room():
                (ours.folder / "error.txt").write_text(error.rstrip() + "\n")
        self._write(ours)

    def _write(self, ours: Trial) -> None:
        with self._room():
            ours.write()
            if ours.over:
                self.proposals.learn(ours)
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


def _error_of(trial: Any) -> str:
    """What a failed trial of Ray's left."""
    file = trial.error_file
    text = Path(file).read_text() if file and os.path.exists(file) else "the process that trained it was lost"
    return COLOURS.sub("", text)
