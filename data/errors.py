"""The one exception for what a user can mend. Commands print its message without a traceback."""

import errno
import os
import re


class UserError(Exception):
    """Something the user can put right. The message says what happened, where, and what to do."""


class DataError(UserError):
    """A data set that cannot be read as declared: a missing file, a wrong column, a bad row."""


# The user's to mend, wherever it is noticed.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WAY = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
# Libraries in Rust and C++ raise errors of their own.
_IN_WORDS = re.compile(r"(No space left on device|Disk quota exceeded|Read-only file system|File too large)")


def disk_trouble(error: BaseException | None) -> UserError | None:
    """What to tell of a disk that is full or read-only, or a file that may not be used, if that is what `error` comes
    of; None for any other error."""
    while error is not None:
        if isinstance(error, OSError):
            file = error.filename2 or error.filename  # of a copy: the second is what was written
            if error.errno in _NO_ROOM:
                return UserError(
                    f"{file or 'the output'} could not be written: {error.strerror}{_disk(file)}. "
                    f"Make room, then run the command again"
                )
            if error.errno == errno.EROFS:
                return UserError(f"{file or 'the output'} could not be written: {error.strerror}{_disk(file)}")
            if error.errno in _NO_WAY and file:
                return UserError(f"{file} cannot be used: {error.strerror}")
        elif found := _IN_WORDS.search(str(error)):
            return UserError(f"a file could not be written: {found[1]} ({error})")
        error = error.__cause__
    return None


def _disk(file: object) -> str:
    """Where the disk of a file is mounted."""
    if not isinstance(file, str | os.PathLike):
        return ""
    path = os.path.realpath(file)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return f" (the disk at {path})"
