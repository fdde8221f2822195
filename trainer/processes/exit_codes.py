"""The exit codes of every command, every worker process and every job.

They are what a launcher, a batch system's script and a search agree on: who may start the same command again, and
who has to look at it first.
"""

import os
import sys
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """How a process ended; any other code, and a death by signal, counts as a failure."""

    FINISHED = 0
    """The work is done."""
    FAILED = 1
    """An unexpected error; its traceback was shown."""
    USER_MISTAKE = 2
    """Something the user can put right (`UserError`, a wrong option); the message says what."""
    INTERRUPTED = 75
    """Stopped on request with everything saved (EX_TEMPFAIL): the same command, run again, goes on."""
    TIME_LIMIT = 81
    """A job at its time limit, which has saved."""
    PREEMPTED = 82
    """A job that made room for another, and has saved."""
    NODE_FAILURE = 83
    """A job of which a node failed."""
    KILLED = 84
    """A job of which a process was killed, as by the system when memory runs out."""
    LOST = 85
    """A job that never said why it ended."""
    CANCELLED = 86
    """A job that a user cancelled."""
    UNKNOWN = 87
    """How a job stands, SLURM does not tell."""
    OUT_OF_MEMORY = 88
    """A step did not fit into memory; in smaller parts it may."""
    LEFT_AT_ONCE = 130
    """Left at once on a second request; what was not saved by then is lost."""


def leave(code: int) -> NoReturn:
    """End the process. When it was asked to stop and has saved, without the interpreter's long farewell, in which
    another signal would replace the exit code that says so."""
    if code == ExitCode.INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
