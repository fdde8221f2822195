"""What Ray Tune runs: a worker that stays warm and trains one trial after another, reporting each evaluation."""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from ray import tune

from minbert.data.machine import free_memory
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.background import BackgroundTraining, Train, line_on_disk
from minbert.tuning.scheduler import REACHED, WORST
from minbert.tuning.take_over import take_over
from minbert.tuning.trial import METRIC, Trial, better, score_of

PATIENCE = 300.0  # seconds in which the worker that had a trial before saves and leaves
HEARTBEAT = 1.0  # seconds after which Ray hears of a trial that has nothing to report: only then can it be ended


class TrialWorker(tune.Trainable):
    """Ray calls `step` again and again; between two calls it may end the trial, or give this worker another one."""

    def setup(self, config: dict[str, Any], train: Train | None = None) -> None:
        self.train_run = train
        if not config["gpus"]:  # device=auto must not take one that nobody set aside
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        free_memory()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        """Start or go on; the run's folder says from where, and evaluations that were told are not told again."""
        folder = Path(config["folder"])
        self.lock = FileLock(folder / ".trial.lock", timeout=PATIENCE, thread_local=False)
        self.lock.acquire()  # another worker may not have left yet
        self.trial = Trial.read(folder)
        self.best, self.taken_over, known = self.trial.score, len(config["taken_over"]), self.trial.step
        if self.taken_over:
            donor = RunFolder(folder.parent / config["taken_over"][-1]["donor"])
            since = take_over(RunFolder(folder), donor, config["options"], self.taken_over)
            if self.best is None:  # what the donor has evaluated is not its own
                known = since
        self.training = BackgroundTraining(self.train_run, folder, config["options"], known)

    def _end(self) -> None:
        self.training.end()
        if not self.taken_over and Trial.read(self.trial.folder).done:
            self.trial.forget_checkpoints()
        self.lock.release()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """The run has checkpoints of its own; Ray asks for one when the trial makes room, and may go on elsewhere."""
        self._end()
        return {"best": self.best}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """The run's folder says from where it goes on."""

    def step(self) -> dict[str, Any]:
        """An evaluation, nothing new, or the end. Raises RuntimeError for a failure that may not repeat itself."""
        training = self.training
        evaluation = training.next(HEARTBEAT)
        result: dict[str, Any] = {"steps": training.steps, "taken_over": self.taken_over, "process": os.getpid()}
        if evaluation is not None:
            score, step = score_of(evaluation), evaluation["step"]
            self.best = better(self.best, score)
            result |= {METRIC: score, "best": self.best, REACHED: WORST if self.best is None else self.best}
            return result | {"at": step, "progress": step / training.steps}
        if not training.over:
            return result
        code, error = training.ending
        if code == ExitCode.FINISHED:
            return result | {"done": True, "ending": "finished"}
        if line_on_disk(error):
            return result | {"done": True, "ending": "no room", "error": error}
        if code == ExitCode.USER_MISTAKE:
            return result | {"done": True, "ending": "failed", "error": error}
        raise RuntimeError(f"the trial ended with exit code {code}\n{error}")
