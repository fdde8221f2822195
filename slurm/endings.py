"""The words for how a run's job stands and why it ended, and the exit codes that say the same."""

from enum import StrEnum

from minbert.trainer.processes.exit_codes import ExitCode


class Ending(StrEnum):
    """Why an attempt of a job ended, with the exit code of the batch script and of `minbert jobs RUN`. A failure may
    have another one: 2 for a user's mistake."""

    exit_code: ExitCode

    def __new__(cls, word: str, code: ExitCode) -> "Ending":
        ending = str.__new__(cls, word)
        ending._value_, ending.exit_code = word, code
        return ending

    FINISHED = "finished", ExitCode.FINISHED
    TIME_LIMIT = "time limit", ExitCode.TIME_LIMIT
    PREEMPTED = "preempted", ExitCode.PREEMPTED
    REQUEUED = "requeued", ExitCode.INTERRUPTED  # by somebody's `scontrol requeue`, or by SLURM for a reason it keeps
    STOPPED = "stopped", ExitCode.INTERRUPTED  # by a signal that nobody announced
    NODE_FAILURE = "node failure", ExitCode.NODE_FAILURE
    KILLED = "process killed", ExitCode.KILLED  # one of ours, as by the system when memory runs out
    OUT_OF_MEMORY = "out of memory", ExitCode.OUT_OF_MEMORY  # says a process that wanted more
    LOST = "lost", ExitCode.LOST  # it never said why
    FAILED = "failed", ExitCode.FAILED
    CANCELLED = "cancelled", ExitCode.CANCELLED


UNANNOUNCED = (Ending.NODE_FAILURE, Ending.KILLED, Ending.LOST)
TROUBLE = (*UNANNOUNCED, Ending.FAILED, Ending.OUT_OF_MEMORY)  # after which somebody has to look


class State(StrEnum):
    """How a run stands that has not ended; other words are SLURM's own."""

    PENDING = "pending"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # without a job
    NOT_STARTED = "not started"
    NOT_SUBMITTED = "not submitted"
    UNKNOWN = "unknown"  # SLURM does not answer
    DAMAGED = "damaged"  # a record that nobody can read
