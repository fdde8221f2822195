"""What `RUN/slurm` remembers: how the run was submitted, and one record for each life of its job.

A life is the time from a job's start to its end, its requeueing, or its loss. The records say why each of them ended,
with and without the site's accounts.
"""

import json
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.slurm.settings import JobSettings, parse_settings
from minbert.trainer.checkpoint.format import newest_step

T = TypeVar("T")


class Ending(StrEnum):
    """Why a life ended."""

    FINISHED = "finished"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    REQUEUED = "requeued"  # by somebody's `scontrol requeue`, or by SLURM for a reason that it keeps
    STOPPED = "stopped"  # by a signal that nobody announced
    NODE_FAILURE = "node failure"
    KILLED = "process killed"  # one of ours, as by the system when memory runs out
    LOST = "lost"  # it never said why
    FAILED = "failed"
    CANCELLED = "cancelled"


# The batch script's exit code, and that of `minbert jobs RUN`. A failure has its own: 1, or 2 for a user's mistake.
EXIT_CODES = {
    Ending.FINISHED: 0,
    Ending.STOPPED: 75,
    Ending.REQUEUED: 75,
    Ending.TIME_LIMIT: 81,
    Ending.PREEMPTED: 82,
    Ending.NODE_FAILURE: 83,
    Ending.KILLED: 84,
    Ending.LOST: 85,
    Ending.CANCELLED: 86,
    Ending.FAILED: 1,
}
UNANNOUNCED = (Ending.NODE_FAILURE, Ending.KILLED, Ending.LOST)


@dataclass
class Life:
    """One life of a run's job."""

    job_id: str
    restart: int
    nodes: str
    started: float  # seconds since the epoch
    first_step: int  # of the checkpoint it goes on from
    ended: float | None = None
    ending: Ending | None = None
    detail: str = ""
    exit_code: int | None = None
    then: str = ""  # "requeued", "job 17", or nothing
    last_step: int | None = None
    code: int | None = None  # what rank 0 returned, and which signal it had received
    signal: int | None = None
    script: int | None = None  # the batch script's process, on the first node


@dataclass(frozen=True)
class Submission:
    """How a run was submitted last."""

    job_id: str  # empty as long as nobody has learned it
    folder: str  # submitit's
    code: str  # the snapshot that the job runs
    settings: Mapping[str, Any]
    host: str  # where `minbert submit` ran
    submitted: float
    total_steps: int | None = None
    earlier_lives: int = 0  # of jobs that were submitted before by hand
    cancelled: bool = False
    token: str = ""  # in the job's comment, by which it is found if sbatch's answer is lost
    element: int | None = None  # of the job array

    def job_settings(self) -> JobSettings:
        return JobSettings(**self.settings)


class Records:
    """The records of one run."""

    def __init__(self, run: Path):
        self.run = run
        self.folder = run / "slurm"
        self.file = self.folder / "submission.json"
        self.lives_folder = self.folder / "lives"

    def submission(self) -> Submission | None:
        """None if the run was never submitted. Raises UserError if the record is damaged."""
        try:
            submission = read_record(self.file, Submission)
        except FileNotFoundError:
            return None
        parse_settings(submission.settings, str(self.file))
        return submission

    def write_submission(self, submission: Submission | None) -> None:
        """None takes an earlier record back."""
        if submission is None:
            self.file.unlink(missing_ok=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary:
            temporary.write_text(to_json(asdict(submission), indent=2) + "\n")

    def change(self, token: str, **changes: Any) -> None:
        """Change the record of the submission `token`, unless another has taken its place."""
        submission = self.submission()
        if submission and submission.token == token:
            self.write_submission(replace(submission, **changes))

    def lives(self) -> list[Life]:
        """The oldest first, without damaged records."""
        return self.read_lives()[0]

    def read_lives(self) -> tuple[list[Life], list[str]]:
        """The lives, the oldest first, and a line for every record that is damaged."""
        lives, problems = [], []
        for path in self.lives_folder.glob("*.json"):
            if path.name.startswith("."):
                continue
            try:
                lives.append(read_record(path, Life))
            except (UserError, FileNotFoundError) as error:
                problems.append(str(error))
        return sorted(lives, key=lambda life: life.started), problems

    def life(self, job_id: str, restart: int) -> Life | None:
        path = self._path(job_id, restart)
        return read_record(path, Life) if path.exists() else None

    def begin(self, job_id: str, restart: int, nodes: str, script: int | None = None) -> Life:
        """Record that a life begins."""
        life = Life(job_id, restart, nodes, time.time(), self.newest_step(), script=script)
        self.write_life(life)
        return life

    def end(self, life: Life, ending: Ending, detail: str = "", exit_code: int | None = None, then: str = "") -> None:
        """Record how it ended; `exit_code` is the ending's own unless given."""
        life.ended, life.ending, life.detail, life.then = time.time(), ending, detail, then
        life.exit_code = EXIT_CODES[ending] if exit_code is None else exit_code
        life.last_step = self.newest_step()
        self.write_life(life)

    def write_life(self, life: Life) -> None:
        self.lives_folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(life.job_id, life.restart)) as temporary:
            temporary.write_text(to_json(asdict(life), indent=2) + "\n")

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return newest_step(self.run / "checkpoints")

    def _path(self, job_id: str, restart: int) -> Path:
        return self.lives_folder / f"{job_id}-{restart}.json"


def read_record(path: Path, kind: type[T]) -> T:
    """A small JSON file as a `kind`. Raises UserError naming the file if it holds anything else, FileNotFoundError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no file")
        return TypeAdapter(kind).validate_python(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {where + ': ' if where else ''}{first['msg'].lower()[:200]}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is no JSON") from None
