"""A trial: a run folder with, beside the run's own files, what the search knows of it (`trial.json`).

These files are the truth about a search: whoever starts it again reads them, whatever became of the processes that ran
it before. Only the process that runs the search writes them.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from minbert.data.files import replacing, to_json
from minbert.trainer.run_folder import RunFolder

Status = Literal["pending", "running", "finished", "stopped", "failed"]
METRIC = "dev/overall"


@dataclass
class Trial:
    """Status `stopped` means by the scheduler, for good; a trial that was interrupted is pending."""

    folder: Path
    name: str
    number: int
    parameters: dict[str, Any]
    status: Status = "pending"
    score: float | None = None  # the best dev/overall so far
    step: int = 0  # of the newest evaluation
    steps: int | None = None  # the budget
    started: float | None = None  # seconds since the epoch
    ended: float | None = None
    error: str | None = None  # its last line
    stopped_by: str | None = None
    taken_over: list[dict[str, Any]] = field(default_factory=list)  # in population-based training: from whom, and when
    variant: str | None = None  # of an ablation
    seed: int | None = None

    @property
    def over(self) -> bool:
        return self.status in ("finished", "stopped", "failed")

    def write(self) -> None:
        RunFolder(self.folder).logs.mkdir(parents=True, exist_ok=True)  # by which a run's folder is known
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        with replacing(self.folder / "trial.json") as temporary:
            temporary.write_text(to_json(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Trial":
        content = json.loads((folder / "trial.json").read_text())
        known = {known.name for known in fields(cls)}
        return cls(folder, **{name: value for name, value in content.items() if name in known})

    def evaluations(self) -> list[dict[str, Any]]:
        """The run's evaluations, the oldest first."""
        return [record for record in RunFolder(self.folder).read_metrics() if METRIC in record]


def read_trials(folder: Path, pattern: str = "*") -> list[Trial]:
    """The trials below `folder`, by number."""
    trials = [Trial.read(path.parent) for path in folder.glob(f"{pattern}/trial.json")]
    return sorted(trials, key=lambda trial: trial.number)


def best(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the best score, the earliest of equals; None if none has a score."""
    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    return max(scored, key=lambda trial: (trial.score, -trial.number), default=None)
