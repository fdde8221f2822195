"""How runs stand: from their own records, their logs, and what SLURM knows of their jobs.

A few questions to SLURM serve any number of runs. A run whose job the controller does not tell about is `unknown`,
which counts as active: nothing is submitted from it. What is wrong with one folder is said in that folder's line.
"""

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.slurm import controller, waiting
from minbert.slurm.controller import Queued
from minbert.slurm.endings import Ending, State
from minbert.slurm.records import Attempt, Records, Submission
from minbert.slurm.run_files import has_advanced, progress, read_trial, state_without_job
from minbert.slurm.submission import job_id_of
from minbert.slurm.supervisor import ACCOUNTED
from minbert.slurm.verdict import SCRIPT_KILLED
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.standing import read_standing

UNFINISHED = (State.RUNNING, State.INTERRUPTED, State.NOT_STARTED, State.NOT_SUBMITTED)  # without a job
SETTLED = 300.0  # seconds after which a submission that SLURM does not know was none
WORDS = {"COMPLETING": "ending", "CONFIGURING": "starting"}
# Why a job waits, where SLURM's word does not say what to do; `minbert why` tells more.
REASONS = {reason: waiting.REASONS[reason] for reason in (*waiting.NEVER, "PartitionDown", "PartitionInactive")} | {
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "JobHeldUser": "held: scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "until its begin time, which SLURM sets after a requeue",
}


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


@dataclass(frozen=True)
class _Known:
    """What a run's folder tells."""

    run: Path
    submission: Submission | None = None
    attempts: list[Attempt] = field(default_factory=list)
    trial: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # damaged records
    unreadable: bool = False  # the one that matters most is damaged

    @classmethod
    def read(cls, run: Path) -> "_Known":
        records = Records(run)
        attempts, problems = records.read_attempts()
        try:
            submission = records.submission()
            if records.is_copy(submission):
                return cls(run, trial=read_trial(run))
            trial = read_trial(run) if submission is None else {}
        except (UserError, OSError) as error:
            return cls(run, attempts=attempts, problems=[str(error)], unreadable=True)
        return cls(run, submission, attempts, trial, problems)

    @property
    def on_cluster(self) -> bool:
        return self.submission is not None and self.submission.job_settings().executor == "slurm"

    @property
    def open(self) -> bool:
        """Whether the records leave open how the job ended: it never began, or its last attempt is open or went on."""
        if not self.submission.job_id or len(self.attempts) <= self.submission.earlier_attempts:
            return True
        return self.attempts[-1].ending is None or bool(self.attempts[-1].then)


@dataclass(frozen=True)
class _Told:
    """What SLURM tells."""

    queued: Mapping[str, Queued] = field(default_factory=dict)
    accounted: Mapping[str, list[Queued]] = field(default_factory=dict)
    silence: str = ""  # why it does not


def inspect_runs(runs: Sequence[Path]) -> list[Report]:
    """How each of the runs stands."""
    known = [_Known.read(run) for run in runs]
    try:
        known = _with_job_ids(known)
        jobs = {each.submission.job_id for each in known if each.on_cluster and each.submission.job_id}
        told = _Told(controller.jobs(jobs) if jobs else {})
    except UserError as error:
        told = _Told(silence=str(error).rpartition("error: ")[2])
    unclear = [
        each.submission.job_id
        for each in known
        if each.on_cluster and each.open and not _is_active(told.queued, each.submission.job_id)
    ]
    if not told.silence:
        told = replace(told, accounted=controller.accounts(filter(None, unclear)))
    return [_report(each, told) for each in known]


def _with_job_ids(known: Sequence[_Known]) -> list[_Known]:
    """Jobs whose id sbatch did not tell are asked for by their tokens. Raises UserError if SLURM does not answer."""
    tokens = {each.submission.token for each in known if each.on_cluster and not each.submission.job_id}
    found = controller.find(tokens) if tokens else {}
    return [
        replace(each, submission=replace(each.submission, job_id=job_id_of(each.submission, found[token])))
        if each.submission and not each.submission.job_id and (token := each.submission.token) in found
        else each
        for each in known
    ]


def is_active(run: Path) -> bool:
    """Whether the run has a job that waits or runs."""
    return (run / "slurm").exists() and inspect_runs([run])[0].active


DEEPEST = 4  # folders below another in which runs are looked for: ABLATION/runs/VARIANT/seed-0


def find_runs(folders: Iterable[Path], depth: int = DEEPEST) -> list[Path]:
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


def _report(known: _Known, told: _Told) -> Report:
    run, submission, attempts, trial = known.run, known.submission, known.attempts, known.trial
    attempt = attempts[-1] if attempts else None
    step, score = progress(run)
    total = submission.total_steps if submission else trial.get("steps")
    if known.unreadable:
        state, detail, nodes, active = State.DAMAGED, "", "", True
    elif trial:
        state, detail, nodes, active = trial["status"], trial["error"] or "", "", False
    else:
        state, detail, nodes, active = _state(known, told)
        if not active and state != Ending.FINISHED and (run / "config.yaml").exists():
            here, total_here = state_without_job(run)
            if submission is None or (here == Ending.FINISHED and has_advanced(run, attempt)):
                state, detail, total = here, "", total or total_here
    left, standing = None, read_standing(run / "logs" / "rank-0.json") if state == State.RUNNING else None
    if standing and not standing.ended and (attempt is None or standing.began >= attempt.started):
        total = total or standing.total_steps
        step = max(step or 0, standing.step) or None
        left = standing.seconds_left(total, standing.age)
        if standing.hangs():
            known.problems.append(f"no step for {standing.still / 60:.0f} min, see minbert why")
    detail = "; ".join(filter(None, [detail, *known.problems]))
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
        requeues=max(0, len(attempts) - (submission.earlier_attempts if submission else 0) - (state != State.PENDING)),
        active=active,
        exit_code=_exit_code(state, active, attempt, bool(trial)),
    )


def _exit_code(state: str, active: bool, attempt: Attempt | None, trial: bool) -> int:
    if state in (State.UNKNOWN, State.DAMAGED):
        return ExitCode.UNKNOWN if state == State.UNKNOWN else ExitCode.USER_MISTAKE
    if active or state in UNFINISHED or (trial and state == State.PENDING):
        return ExitCode.INTERRUPTED
    told = attempt is not None and attempt.ending == state and attempt.exit_code is not None
    return attempt.exit_code if told else Ending(state).exit_code if state in set(Ending) else ExitCode.FAILED


def _state(known: _Known, told: _Told) -> tuple[str, str, str, bool]:
    """State, detail, nodes, and whether there is a job that waits or runs."""
    submission, attempt = known.submission, known.attempts[-1] if known.attempts else None
    if submission is None:
        return State.NOT_SUBMITTED, "", "", False
    if submission.job_settings().executor != "slurm":
        return _state_here(submission, attempt)
    if not known.open and not _is_active(told.queued, submission.job_id):
        return attempt.ending, attempt.detail, attempt.nodes, False
    if told.silence:
        return State.UNKNOWN, f"the controller does not answer: {told.silence}", attempt.nodes if attempt else "", True
    if not submission.job_id:
        if time.time() - submission.submitted < SETTLED:
            return State.UNKNOWN, "being submitted, or sbatch has not said whether it was", "", True
        if attempt and attempt.ending:
            return attempt.ending, attempt.detail, attempt.nodes, False
        return State.NOT_SUBMITTED, "SLURM did not take the job", "", False
    job = told.queued.get(submission.job_id)
    if job and job.active:
        if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            after = f"{attempt.ending}, " if attempt and attempt.ending and attempt.then else ""
            return State.PENDING, f"{after}{REASONS.get(job.reason.partition(',')[0], job.reason)}", "", True
        if not (job.state == "COMPLETING" and attempt and attempt.ending and not attempt.then):
            return WORDS.get(job.state, job.state.lower()), "", job.nodes, True
    if attempt and attempt.ending and not known.open:
        return attempt.ending, attempt.detail, attempt.nodes, False
    return *_ended_in_silence(known, job, told), attempt.nodes if attempt else "", False


def _ended_in_silence(known: _Known, job: Queued | None, told: _Told) -> tuple[str, str]:
    """Ending and detail of a job of which the records do not tell how it ended."""
    submission = known.submission
    accounted = told.accounted.get(submission.job_id, [])[-1:] or ([job] if job else [])
    ending = ACCOUNTED.get(accounted[0].state) if accounted else None
    if ending is None:
        return Ending.CANCELLED if submission.cancelled else Ending.LOST, ""
    if ending is Ending.FAILED and len(known.attempts) > submission.earlier_attempts:
        return Ending.KILLED, f"{SCRIPT_KILLED}, and could not let the job go on: submit the run again"
    if ending is Ending.FAILED:
        return ending, f"before anything was recorded; minbert logs {known.run} may tell why"
    return ending, ""


def _state_here(submission: Submission, attempt: Attempt | None) -> tuple[str, str, str, bool]:
    """Of a job of the local or the debug executor."""
    if submission.host != socket.gethostname():
        state = attempt.ending if attempt and attempt.ending else State.RUNNING
        return state, f"on {submission.host}", submission.host, False
    if _controller_lives(submission):
        return State.RUNNING, "", submission.host, True
    if attempt and attempt.ending:
        return attempt.ending, attempt.detail, attempt.nodes, False
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


def _is_active(queued: Mapping[str, Queued], job_id: str) -> bool:
    return job_id in queued and queued[job_id].active
