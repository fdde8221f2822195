"""The exit codes of every command and every worker process.

They are what a launcher, a batch system's script and a search agree on: who may start the same command again, and
who has to look at it first.
"""

from enum import IntEnum


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
    LEFT_AT_ONCE = 130
    """Left at once on a second request; what was not saved by then is lost."""
