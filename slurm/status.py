"""How runs stand: from their own records, their logs, and what SLURM knows of their jobs.

Two questions to SLURM serve any number of runs, and without SLURM or its accounts the records alone must do.
"""

import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.files import is_locked
from minbert.slurm import controller
from minbert.slurm.controller import ACTIVE, Queued
from minbert.slurm.records import EXIT_CODES, Ending, Life, Records, Submission
from minbert.slurm.supervisor import ACCOUNTED

GOING_ON = 75  # exit code for a run that has not ended
WORDS = {"COMPLETING": "ending", "CONFIGURING": "starting"}


@dataclass(frozen=True)
class Report:
    """A run's line in the table."""

    run: Path
    state: str  # pending, running, ..., or an ending
    detail: str  # why it waits or ended
    job_id: str
    nodes: str
    step: int | None
    total: int | None
    score: float | None  # best overall dev score
    seconds_left: float | None
    requeues: int
    active: bool
    exit_code: int

    @property
    def finished(self) -> bool:
        return self.state == Ending.FINISHED

    @property
    def summary(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.state}{detail}{f', job {self.job_id}' if self.job_id else ''}"


def look(runs: Sequence[Path]) -> list[Report]:
    """How each of the runs stands."""
    records = [Records(run) for run in runs]
    submissions = [record.submission() for record in records]
    lives = [record.lives() for record in records]
    on_cluster = {s.job_id for s in submissions if s and s.job_id and s.job_settings().executor == "slurm"}
    queued: Mapping[str, Queued] = {}
    if on_cluster and controller.available():
        try:
            queued = controller.queue()
        except UserError:  # the controller does not answer; the records do
            queued = {}
    unclear = [
        submission.job_id
        for submission, past in zip(submissions, lives)
        if submission and submission.job_id in on_cluster - _active(queued) and _open(submission, past)
    ]
    accounted = controller.accounts(unclear)
    return [
        _report(run, submission, past, queued, accounted) for run, submission, past in zip(runs, submissions, lives)
    ]


def is_active(run: Path) -> bool:
    """Whether the run has a job that waits or runs."""
    return (run / "slurm").exists() and look([run])[0].active


def find_runs(folders: Iterable[Path], depth: int = 3) -> list[Path]:
    """Run folders, and those of searches with a job, among `folders` and below them, each before what lies in it.

    Raises UserError for a folder that is not there.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        if (folder / "config.yaml").exists():
            found.append(folder)
            continue
        if Records(folder).file.exists():
            found.append(folder)
        if depth:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in ("code", "slurm"))
            found += find_runs(below, depth - 1)
    return found


def _report(
    run: Path,
    submission: Submission | None,
    lives: list[Life],
    queued: Mapping[str, Queued],
    accounted: Mapping[str, list[Queued]],
) -> Report:
    life = lives[-1] if lives else None
    state, detail, nodes, active = _state(submission, lives, queued, accounted)
    step, score, when = _progress(run)
    trial = _trial(run) if submission is None else {}
    if trial:
        state, detail = trial["status"], trial["error"] or "trial"
    earlier = submission.earlier_lives if submission else 0
    total = submission.total_steps if submission else trial.get("steps")
    left = None
    if state == "running" and life and step is not None and total and when > life.started and step > life.first_step:
        left = max(0.0, (total - step) * (when - life.started) / (step - life.first_step) - (time.time() - when))
    if active or state == "not submitted" or (trial and state in ("pending", "running", "interrupted")):
        code = GOING_ON
    else:
        told = life is not None and life.ending == state and life.exit_code is not None
        code = life.exit_code if told else EXIT_CODES.get(state, 1)
    return Report(
        run=run,
        state=state,
        detail=detail,
        job_id=submission.job_id if submission else "",
        nodes=nodes,
        step=step,
        total=total,
        score=score,
        seconds_left=left,
        requeues=max(0, len(lives) - earlier - (state != "pending")),
        active=active,
        exit_code=code,
    )


def _state(
    submission: Submission | None,
    lives: list[Life],
    queued: Mapping[str, Queued],
    accounted: Mapping[str, list[Queued]],
) -> tuple[str, str, str, bool]:
    """State, detail, nodes, and whether there is a job that waits or runs."""
    life = lives[-1] if lives else None
    if submission is None:
        return "not submitted", "", "", False
    if submission.job_settings().executor != "slurm":
        return _state_here(submission, life)
    job = queued.get(submission.job_id)
    if job and job.state in ACTIVE:
        if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            after = f"{life.ending}, " if life and life.ending and life.then else ""
            return "pending", f"{after}{job.reason}", "", True
        if not (job.state == "COMPLETING" and life and life.ending and not life.then):
            return WORDS.get(job.state, job.state.lower()), "", job.nodes, True
    if life and life.ending and not _open(submission, lives):
        return life.ending, life.detail, life.nodes, False
    told = accounted.get(submission.job_id, [])[-1:] or ([job] if job else [])
    ending = ACCOUNTED.get(told[0].state) if told else None
    if ending is None:
        ending = Ending.CANCELLED if submission.cancelled else Ending.LOST
    return ending, "", life.nodes if life else "", False


def _state_here(submission: Submission, life: Life | None) -> tuple[str, str, str, bool]:
    """Of a job of the local or the debug executor."""
    if submission.host != socket.gethostname():
        return (life.ending if life and life.ending else "running"), f"on {submission.host}", submission.host, False
    if _controller_lives(submission):
        return "running", "", submission.host, True
    if life and life.ending:
        return life.ending, life.detail, life.nodes, False
    return Ending.CANCELLED if submission.cancelled else Ending.LOST, "", submission.host, False


def _controller_lives(submission: Submission) -> bool:
    """Whether the process that watches a local job's processes is still there."""
    import psutil

    if not submission.job_id.isdecimal():
        return False
    try:
        process = psutil.Process(int(submission.job_id))
        return submission.folder in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _open(submission: Submission, lives: list[Life]) -> bool:
    """Whether the records leave open how the job ended: it never began, or a life has no end or was to be followed."""
    if len(lives) <= submission.earlier_lives:
        return True
    return lives[-1].ending is None or bool(lives[-1].then)


def _active(queued: Mapping[str, Queued]) -> set[str]:
    return {job_id for job_id, job in queued.items() if job.state in ACTIVE}


def _trial(run: Path) -> dict[str, Any]:
    """What a search knows of the run, if it is a trial of one. The process that runs the search may be gone."""
    try:
        trial = json.loads((run / "trial.json").read_text())
    except FileNotFoundError:
        return {}
    above = list(run.absolute().parents)[:3]
    submitted = any((folder / "slurm").is_dir() for folder in above)  # its lock may be held on another machine
    if trial["status"] == "running" and not submitted and not any(is_locked(folder / ".lock") for folder in above):
        trial["status"] = "interrupted"
    return trial


def _progress(run: Path) -> tuple[int | None, float | None, float]:
    """The last logged step, the best overall score so far, and when the log was written last."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return None, None, 0.0
    lines: list[dict[str, Any]] = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a kill can tear a line
    scores = [line["dev/overall"] for line in lines if "dev/overall" in line]
    return (lines[-1]["step"] if lines else None), max(scores, default=None), file.stat().st_mtime
