"""Writing files so that nobody ever sees half of one.

Runs are killed, disks fill up, and several processes look at the same folder: whatever matters is written under another
name and takes its place at once.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written; it takes its place, flushed, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file `path`. The look itself is shared, and over at once."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, as far as its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems refuse it for folders
            raise
    finally:
        os.close(descriptor)


class LineFile:
    """A file that grows by lines. What a full disk refuses is kept and written with the next line that finds room."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting = b""
        self._begun = False

    def append(self, line: str) -> None:
        failed_before = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        try:
            with self.path.open("ab+", buffering=0) as file:
                if not self._begun and file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.write(b"\n")  # a kill tore the last line
                self._begun = True
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not failed_before:
                log.warning("%s cannot be written (%s); its lines wait in memory", self.path, error.strerror)
