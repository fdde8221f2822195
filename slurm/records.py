"""What `RUN/slurm` remembers: how the run was submitted, and one record for each attempt of its job.

An attempt is the time from a job's start to its end, its requeueing, or its loss. The records say why each of them
ended, with and without the site's accounts.
"""

import json
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.data.reading import read_json_lines
from minbert.slurm.endings import Ending
from minbert.slurm.settings import JobSettings, parse_settings
from minbert.trainer.checkpoint.format import newest_step
from minbert.trainer.run.standing import read_standing

T = TypeVar("T")


@dataclass
class Attempt:
    """One attempt of a run's job."""

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
    reached: int | None = None  # the last step that was trained, saved or not


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
    earlier_attempts: int = 0  # of jobs that were submitted before by hand
    cancelled: bool = False
    token: str = ""  # in the job's comment, by which it is found if sbatch's answer is lost
    element: int | None = None  # of the job array
    run: str = ""  # the folder that the job trains in

    def job_settings(self) -> JobSettings:
        return JobSettings(**self.settings)


class Records:
    """The records of one run."""

    def __init__(self, run: Path):
        self.run = run
        self.folder = run / "slurm"
        self.file = self.folder / "submission.json"
        self.attempts_folder = self.folder / "attempts"

    def submission(self) -> Submission | None:
        """None if the run was never submitted. Raises UserError if the record is damaged."""
        try:
            submission = read_record(self.file, Submission)
        except FileNotFoundError:
            return None
        parse_settings(submission.settings, str(self.file))
        return submission

    def is_copy(self, submission: Submission | None) -> bool:
        """Whether the folder, which has this `submission`, is a copy of the one that was submitted, and that is still
        there: the job is not the copy's. Raises UserError if the other's record is damaged."""
        if submission is None or not submission.run:
            return False
        original = Records(Path(submission.run))
        try:
            if self.folder.samefile(original.folder):
                return False
        except OSError:
            return False  # it was moved, or is called otherwise here
        theirs = original.submission()
        return theirs is not None and theirs.token == submission.token

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

    def attempts(self) -> list[Attempt]:
        """The oldest first, without damaged records."""
        return self.read_attempts()[0]

    def read_attempts(self) -> tuple[list[Attempt], list[str]]:
        """The attempts, the oldest first, and a line for every record that is damaged."""
        attempts, problems = [], []
        for path in self.attempts_folder.glob("*.json"):
            if path.name.startswith("."):
                continue
            try:
                attempts.append(read_record(path, Attempt))
            except (UserError, FileNotFoundError) as error:
                problems.append(str(error))
        return sorted(attempts, key=lambda attempt: attempt.started), problems

    def attempt(self, job_id: str, restart: int) -> Attempt | None:
        path = self._path(job_id, restart)
        return read_record(path, Attempt) if path.exists() else None

    def begin(self, job_id: str, restart: int, nodes: str, script: int | None = None) -> Attempt:
        """Record that an attempt begins."""
        attempt = Attempt(job_id, restart, nodes, time.time(), self.newest_step(), script=script)
        self.write_attempt(attempt)
        return attempt

    def end(
        self, attempt: Attempt, ending: Ending, detail: str = "", exit_code: int | None = None, then: str = ""
    ) -> None:
        """Record how it ended; `exit_code` is the ending's own unless given."""
        attempt.ended, attempt.ending, attempt.detail, attempt.then = time.time(), ending, detail, then
        attempt.exit_code = ending.exit_code if exit_code is None else exit_code
        attempt.last_step = self.newest_step()
        attempt.reached = max(attempt.last_step, self._trained(attempt))
        self.write_attempt(attempt)

    def _trained(self, attempt: Attempt) -> int:
        """The last step of which rank 0 has told, or that it has logged, since the attempt began."""
        standing, log = read_standing(self.run / "logs" / "rank-0.json"), self.run / "metrics.jsonl"
        told = standing.step if standing and standing.began >= attempt.started else 0
        if not log.is_file() or log.stat().st_mtime < attempt.started:
            return told
        return max([told, *(record["step"] for record in read_json_lines(log))])

    def note_return(self, job_id: str, restart: int, code: int, signal: int | None) -> None:
        """Record what rank 0 returns, and the signal it got: the supervisor sees the exit codes of all processes only
        as one. Without a supervisor there is no record, and nobody to tell."""
        if attempt := self.attempt(job_id, restart):
            attempt.code, attempt.signal = code, signal
            self.write_attempt(attempt)

    def write_attempt(self, attempt: Attempt) -> None:
        self.attempts_folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(attempt.job_id, attempt.restart)) as temporary:
            temporary.write_text(to_json(asdict(attempt), indent=2) + "\n")

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return newest_step(self.run / "checkpoints")

    def _path(self, job_id: str, restart: int) -> Path:
        return self.attempts_folder / f"{job_id}-{restart}.json"


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
