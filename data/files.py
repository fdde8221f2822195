"""Writing files so that nobody ever sees half of one.

Runs are killed, disks fill up, and several processes look at the same folder: whatever matters is written under another
name and takes its place at once.
"""

import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from uuid import uuid4

from minbert.data.errors import UserError

LOOK = 0.02  # seconds between two tries to take a lock

log = logging.getLogger(__name__)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a system's error name `path` if it names no file, as a full disk's does, or the one that `replacing` made."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | os.PathLike) else None
        if error.errno is not None and (named is None or os.path.basename(named).startswith(f".{path.name}.")):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written; it takes its place, flushed, when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with naming(path):
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


def lock(path: Path, patience: float = 0.0) -> int:
    """Take the lock that the file `path` stands for. It lasts until every process that has the descriptor, which is
    returned, has closed it or ended. Raises BlockingIOError if somebody has it for longer than a look at it takes and
    `patience` seconds."""
    pauses = chain(repeat(LOOK, 10 + round(patience / LOOK)), repeat(0.0))
    while True:
        pause = next(pauses)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # its last owner has removed the file: another one counts now
        except BlockingIOError:
            if not pause:
                os.close(descriptor)
                raise
            time.sleep(pause)
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def holding(path: Path, patience: float = 0.0) -> Iterator[None]:
    """`lock(path)` to the end of the block, with which the file goes; a file system without locks does without. Raises
    BlockingIOError if somebody else has it, after `patience` seconds."""
    descriptor = None
    try:
        descriptor = lock(path, patience)
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.filename is not None:
            raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def alone(path: Path, told: str, patience: float = 0.0) -> Iterator[None]:
    """`holding(path, patience)`; what a user is `told` where somebody else has it. Raises UserError."""
    with ExitStack() as ours:
        try:
            ours.enter_context(holding(path, patience))
        except BlockingIOError:
            raise UserError(told) from None
        yield


def to_json(value: Any, indent: int | None = None) -> str:
    """As JSON, which has no word for what is not finite: that becomes null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Nested mappings and sequences with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


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
