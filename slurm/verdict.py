"""Why a job's processes ended, and what follows: go on, be submitted anew, leave it to SLURM, or nothing.

SLURM sends SIGTERM for a preemption, a user's `scancel`, a requeueing and the end of the time limit alike. What tells
them apart (seen with 22.05): while the job is still RUNNING, the end is only announced, and PreemptTime is set if it is
a preemption. Afterwards the job is COMPLETING: SLURM has decided. If it will start the job again, `Restarts` is higher
than the SLURM_RESTART_COUNT the job was started with; otherwise PreemptTime means that the site cancels what it
preempts, an end after the whole time limit is a timeout, and what remains is a cancelled job. That one must not go on,
although `scontrol requeue` would take it. Where a site gives no grace, a preempted job is requeued at once, without a
PreemptTime: then the job's output says so.
"""

import re
import signal
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path

from minbert.slurm.controller import Job
from minbert.slurm.endings import Ending
from minbert.trainer.processes.exit_codes import ExitCode

BEFORE_TRAINING = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
SCRIPT_KILLED = "the batch script was killed"

TOLD = (ExitCode.USER_MISTAKE, ExitCode.OUT_OF_MEMORY)  # of which there is a message, not a traceback

# What a process says when the other side of a connection is gone: a consequence, never the cause.
LOST_PEER = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|LostProcess|[Rr]emote process exited|Broken pipe"
    r"|Connection timed out|recvValue failed|sendBytes failed|Socket Timeout|Read timeout"
    r"|Read error|Socket (unexpectedly )?closed|Remote peer closed|caused pair closure"  # gloo
)


class Next(Enum):
    """What is to be done."""

    NOTHING = "nothing"
    GO_ON = "go on"  # requeue the job
    SUBMIT_ANEW = "submit anew"  # SLURM has ended this job for good, the run is to go on
    LEFT_TO_SLURM = "left to SLURM"  # it starts the job again by itself


@dataclass(frozen=True)
class Error:
    """What a rank left in its error file: an exit code, and a message or a traceback."""

    rank: int
    code: int
    text: str

    @classmethod
    def read(cls, path: Path) -> "Error | None":
        """None if there is no such file."""
        try:
            code, _, text = path.read_text().partition("\n")
        except FileNotFoundError:
            return None
        return cls(int(path.stem.removeprefix("rank-")), int(code), text)

    @property
    def summary(self) -> str:
        """The line that says most: of a message the first, of a traceback the last."""
        lines = self.text.strip().splitlines() or [f"exit code {self.code}"]
        return lines[0] if self.code in TOLD else f"rank {self.rank}: {lines[-1]}"

    @property
    def lost_peer(self) -> bool:
        return self.code not in TOLD and LOST_PEER.search(self.text) is not None


@dataclass(frozen=True)
class Evidence:
    """All that is known when the processes have ended."""

    status: int  # srun's exit code
    job: Job | None  # None if SLURM does not answer
    restart: int
    code: int | None = None  # what rank 0 returned, if it did: FINISHED or INTERRUPTED
    signal: int | None = None  # the first that rank 0 received
    cancelled: bool = False  # by `minbert cancel`
    errors: list[Error] = field(default_factory=list)  # the earliest first
    killed: str = ""  # what srun says of the first task that a signal ended
    complaint: str = ""  # of srun, when it is not about a task
    preempted: bool = False  # says the job's output
    script_killed: bool = False  # the batch script: rank 0 judges in its place
    down: list[str] = field(default_factory=list)  # nodes
    signal_before: int = 0
    now: datetime = field(default_factory=datetime.now)


@dataclass(frozen=True)
class Verdict:
    ending: Ending
    next: Next
    detail: str = ""
    exit_code: int | None = None


def judge(evidence: Evidence) -> Verdict:
    """The one place that decides whether a job goes on."""
    if evidence.code == ExitCode.FINISHED:
        return Verdict(Ending.FINISHED, Next.NOTHING)
    if evidence.job is not None and evidence.job.state != "RUNNING":
        return _ended_by_slurm(evidence, evidence.job)
    if evidence.cancelled:
        return Verdict(Ending.CANCELLED, Next.NOTHING)
    if evidence.script_killed:
        return Verdict(Ending.KILLED, Next.GO_ON, SCRIPT_KILLED)
    if evidence.code == ExitCode.INTERRUPTED or (not evidence.errors and evidence.status in BEFORE_TRAINING):
        return Verdict(_announced(evidence), Next.GO_ON)
    return _failed(evidence)


def _ended_by_slurm(evidence: Evidence, job: Job) -> Verdict:
    if job.restarts > evidence.restart:
        preempted = job.preempted or evidence.preempted
        ending = Ending.NODE_FAILURE if evidence.down else Ending.PREEMPTED if preempted else Ending.REQUEUED
        return Verdict(ending, Next.LEFT_TO_SLURM, ", ".join(evidence.down))
    if evidence.cancelled:
        return Verdict(Ending.CANCELLED, Next.NOTHING)
    if job.preempted:
        return Verdict(Ending.PREEMPTED, Next.SUBMIT_ANEW)
    if evidence.down:
        return Verdict(Ending.NODE_FAILURE, Next.SUBMIT_ANEW, ", ".join(evidence.down))
    if job.overtime:
        return Verdict(Ending.TIME_LIMIT, Next.SUBMIT_ANEW)
    if evidence.script_killed:
        return Verdict(Ending.KILLED, Next.GO_ON, SCRIPT_KILLED)
    return Verdict(Ending.CANCELLED, Next.NOTHING)


def _announced(evidence: Evidence) -> Ending:
    job = evidence.job
    if job is not None and job.preempted:
        return Ending.PREEMPTED
    warning = timedelta(seconds=evidence.signal_before + 5)
    nearly_over = job is not None and job.ends is not None and job.ends - evidence.now <= warning
    if evidence.signal == signal.SIGUSR2 or nearly_over:
        return Ending.TIME_LIMIT
    return Ending.STOPPED


def _failed(evidence: Evidence) -> Verdict:
    """An error that is not just the loss of another process is the cause; else somebody was killed from outside."""
    causes = [error for error in evidence.errors if not error.lost_peer]
    if causes:
        first = causes[0]
        if first.code == ExitCode.OUT_OF_MEMORY:
            return Verdict(Ending.OUT_OF_MEMORY, Next.GO_ON, first.summary)
        return Verdict(Ending.FAILED, Next.NOTHING, first.summary, first.code)
    if evidence.down:
        return Verdict(Ending.NODE_FAILURE, Next.GO_ON, ", ".join(evidence.down))
    if evidence.killed or evidence.errors:
        return Verdict(Ending.KILLED, Next.GO_ON, evidence.killed or "the processes lost contact")
    if 128 < evidence.status <= 128 + signal.SIGRTMAX:
        return Verdict(Ending.KILLED, Next.GO_ON, f"signal {evidence.status - 128}")
    if evidence.complaint:
        return Verdict(Ending.FAILED, Next.NOTHING, f"srun: {evidence.complaint}", ExitCode.USER_MISTAKE)
    return Verdict(Ending.FAILED, Next.NOTHING, f"exit code {evidence.status}", evidence.status or ExitCode.FAILED)
