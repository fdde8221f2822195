"""The one exception for what a user can mend. Commands print its message without a traceback."""

import errno


class UserError(Exception):
    """Something the user can put right. The message says what happened, where, and what to do."""


class DataError(UserError):
    """A data set that cannot be read as declared: a missing file, a wrong column, a bad row."""


def disk_trouble(error: OSError) -> UserError | None:
    """What to tell of a disk that is full or read-only, wherever it was noticed; None for any other error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return UserError(f"{error.filename or 'a file'} could not be written: {error.strerror}")
