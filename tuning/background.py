"""Training a trial in a thread of its own, and what its run folder says meanwhile.

The evaluations are read from the run's metrics, whoever writes them, so a trial of one process and one of many look
the same from here.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.trial import METRIC

POLL = 0.03  # seconds between two looks at the metrics
SPEAKS = "minbert: "  # before a command's message to a user

# (configuration, request to stop, what is told the steps of the budget) -> (exit code, error)
Train = Callable[[RunConfig, StopRequest, Callable[[int], None]], tuple[int, str]]


def line_on_disk(text: str) -> str | None:
    """Of an error, of which there is only the text, the line that says that a disk is full or read-only; None if it is
    another error."""
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
    return next((line.strip() for line in reversed(text.splitlines()) if any(word in line for word in words)), None)


def telling_line(text: str | None) -> str | None:
    """Of an error, the line that says what happened; None if there is none. It is the last of a traceback, and the
    first of a message to a user, which goes on with what to do, and before which processes of a trial's own may have
    said more."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not lines or any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1] if lines else None
    return next((line.removeprefix(SPEAKS) for line in lines if line.startswith(SPEAKS)), lines[0])


class BackgroundTraining:
    """Training under way. `options` without the run folder; evaluations up to step `known` are not told again."""

    def __init__(self, train: Train, folder: Path, options: Mapping[str, Any], known: int = 0):
        self.run = RunFolder(folder)
        self.known = known
        self.steps: int | None = None
        self.ending: tuple[int, str] | None = None
        self._size = -1
        self._waiting: list[dict[str, Any]] = []
        self._stop = StopRequest()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(train, dict(options)), daemon=True)
        self._thread.start()

    def _work(self, train: Train, options: dict[str, Any]) -> None:
        try:
            config = parse_config(options | {"run": self.run.path}, str(self.run.path))
            self.ending = train(config, self._stop, self._begin)
        except UserError as error:  # from the configuration
            self.ending = (ExitCode.USER_MISTAKE, str(error))
        except BaseException as error:  # what `train` lets through
            self.ending = (ExitCode.FAILED, f"{type(error).__name__}: {error}")
        finally:
            self._over.set()

    def _begin(self, steps: int) -> None:
        self.steps = steps

    def next(self, patience: float) -> dict[str, Any] | None:
        """The next evaluation that was not told yet; None after the last one, or after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            over = self._over.is_set()  # before the look at the metrics: nothing comes after it
            self._read_evaluations()
            if self._waiting:
                evaluation = self._waiting.pop(0)
                self.known = evaluation["step"]
                return evaluation
            if over or time.monotonic() >= deadline:
                return None
            self._over.wait(POLL)

    @property
    def over(self) -> bool:
        """Whether it has ended, and all evaluations were told."""
        return self._over.is_set() and not self._waiting

    def end(self) -> None:
        """Ask the training to save and leave, and wait until it has."""
        self._stop.signal = self._stop.signal or signal.SIGTERM
        self._thread.join()

    def _read_evaluations(self) -> None:
        file = self.run.metrics_file
        size = file.stat().st_size if file.exists() else -1
        if size == self._size or self.steps is None:  # before it begins, the file is of an earlier attempt
            return
        self._size = size
        last = self._waiting[-1]["step"] if self._waiting else self.known
        self._waiting += [r for r in self.run.read_metrics() if METRIC in r and r["step"] > last]
