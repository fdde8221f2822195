"""The one exception for what a user can mend. Commands print its message without a traceback."""

import errno
import reprlib

MOST_LINES, LONGEST_LINE = 40, 1000  # of a message

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


class UserError(Exception):
    """Something the user can put right. The message says what happened, where, and what to do.

    What it quotes may be of any size; the message is not.
    """

    def __init__(self, message: object = ""):
        lines = str(message).split("\n")
        if len(lines) > MOST_LINES:
            lines[MOST_LINES - 1 :] = [f"and {len(lines) - MOST_LINES + 1:,} more lines"]
        super().__init__("\n".join(map(_cut, lines)))


class DataError(UserError):
    """A data set that cannot be read as declared: a missing file, a wrong column, a bad row."""


def shown(value: object) -> str:
    """A value as a message quotes it, however large it is."""
    return _short.repr(value)


def _cut(line: str) -> str:
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


# What the system says of a file that is not as it should be, and that its owner can mend.
_FILES = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_FILES += (errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL, errno.ENXIO)


def disk_trouble(error: OSError) -> UserError | None:
    """What to tell of a disk that is full or read-only, or a file that is something else than it should be, wherever it
    was noticed; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return UserError(f"{error.filename or 'a file'} could not be written: {error.strerror}")
    if error.filename is not None and error.errno in _FILES:
        return UserError(f"{error.filename}: {error.strerror}")
    return None
