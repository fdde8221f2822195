"""A trial: a run folder with, beside the run's own files, what the search knows of it (`trial.json`).

These files are the truth about a search: whoever starts it again reads them, whatever became of the processes that ran
it before. Only the process that runs the search writes them.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from minbert.data.files import is_locked, replacing, to_json
from minbert.trainer.run.folder import RunFolder

Status = Literal["pending", "running", "finished", "stopped", "failed"]
METRIC = "dev/overall"
LOCK = ".lock"  # in the folder of a search or ablation; held by the process that runs it
SCHEDULE_FILE = "taken-over.json"  # written by the worker that takes over, with the checkpoint that it takes


@dataclass
class Trial:
    """Status `stopped` means by the scheduler, for good; a trial that was interrupted is pending."""

    folder: Path
    name: str
    number: int
    parameters: dict[str, Any]
    status: Status = "pending"
    score: float | None = None  # the best dev/overall so far that its parameters have earned: since the last take-over
    step: int = 0  # of the newest evaluation
    steps: int | None = None  # the budget
    started: float | None = None  # seconds since the epoch
    ended: float | None = None
    error: str | None = None  # its last line
    stopped_by: str | None = None
    # When it was trained: [from, to] of every turn, in seconds since the epoch, and what it took of the machine.
    turns: list[list[float]] = field(default_factory=list)
    takes: dict[str, float] = field(default_factory=dict)  # "cpu": cores, "gpu": GPUs
    # In population-based training: from whom, and when; what the trial had reached itself, which it left.
    taken_over: list[dict[str, Any]] = field(default_factory=list)
    variant: str | None = None  # of an ablation
    seed: int | None = None

    @property
    def over(self) -> bool:
        return self.status in ("finished", "stopped", "failed")

    @property
    def first_parameters(self) -> dict[str, Any]:
        """Before it took over from others."""
        return self.taken_over[0]["left"]["parameters"] if self.taken_over else self.parameters

    @property
    def seconds(self) -> float:
        """In which it was trained, over all its turns."""
        return sum(end - begin for begin, end in self.turns)

    @property
    def done(self) -> bool:
        """Over for good: not even tried again on request."""
        return self.status in ("finished", "stopped")

    def forget_checkpoints(self) -> None:
        """Of a trial that is done the best model stays. The checkpoints, which are larger, go: nobody resumes it."""
        shutil.rmtree(RunFolder(self.folder).checkpoints, ignore_errors=True)

    def write(self) -> None:
        RunFolder(self.folder).logs.mkdir(parents=True, exist_ok=True)  # by which a run's folder is known
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        with replacing(self.folder / "trial.json") as temporary:
            temporary.write_text(to_json(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Trial":
        content = json.loads((folder / "trial.json").read_text())
        known = {known.name for known in fields(cls)}
        content["score"] = score_of({METRIC: content.get("score")})
        return cls(folder, **{name: value for name, value in content.items() if name in known})

    def evaluations(self, scored: bool = True) -> list[dict[str, Any]]:
        """The run's evaluations, the oldest first; `scored`: those whose score is a number."""
        records = [record for record in RunFolder(self.folder).read_metrics() if METRIC in record]
        return [record for record in records if score_of(record) is not None] if scored else records

    def earned(self) -> list[dict[str, Any]]:
        """Those of its own parameters: after the last take-over."""
        schedule = self.schedule() if self.taken_over else []
        since = schedule[-1]["from_step"] if schedule else 0
        return [record for record in self.evaluations() if record["step"] > since]

    def schedule(self) -> list[dict[str, Any]]:
        """By what options the run's weights came about: {"from_step", "options"} of each part, the oldest first; empty
        if it never took over another's."""
        file = self.folder / SCHEDULE_FILE
        return json.loads(file.read_text())["schedule"] if file.exists() else []


def read_trials(folder: Path, pattern: str = "*") -> list[Trial]:
    """The trials below `folder`, by number."""
    trials = [Trial.read(path.parent) for path in folder.glob(f"{pattern}/trial.json")]
    return sorted(trials, key=lambda trial: trial.number)


def interrupted(trials: Iterable[Trial], folder: Path) -> None:
    """Make those pending whose file says that they run, though nobody runs the search or ablation in `folder`."""
    if not is_locked(folder / LOCK):
        for trial in trials:
            if trial.status == "running":
                trial.status = "pending"


def score_of(record: Mapping[str, Any]) -> float | None:
    """An evaluation's score; None if it has none, or one that is no number and compares with nothing."""
    score = record.get(METRIC)
    return score if isinstance(score, int | float) and math.isfinite(score) else None


def better(score: float | None, other: float | None) -> float | None:
    """The larger of two scores, of which either may be missing."""
    return max((value for value in (score, other) if value is not None), default=None)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that have a score and did not fail, the best first, the earliest of equals."""
    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    return sorted(scored, key=lambda trial: (-trial.score, trial.number))


def best(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the best score, the earliest of equals; None if none has a score."""
    return next(iter(ranked(trials)), None)
