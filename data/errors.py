"""The one exception for what a user can mend. Commands print its message without a traceback."""

import errno
import importlib.util
import os
import re
import reprlib
import shutil
from collections.abc import Mapping
from typing import Any

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


class OutOfMemory(UserError):
    """A step of training that does not fit into memory; in smaller parts it may."""


def require_package(module: str, extra: str, purpose: str) -> None:
    """Raises UserError, saying which of our extras brings it, unless a package can be imported; it is not."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs the package {module}: pip install 'minbert[{extra}]'")


def shown(value: object) -> str:
    """A value as a message quotes it, however large it is."""
    return _short.repr(value)


def explain(problem: Mapping[str, Any], place: str) -> str:
    """One line on what pydantic found wrong at `place`: what is allowed, and what stands there."""
    if problem["type"] == "value_error":  # a validator of ours, which names the place itself
        return problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] == "missing" else f", not {shown(problem['input'])}"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}{found}"


def _cut(line: str) -> str:
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


# What says that memory ran out among the errors that are not of a kind of their own: CUDA (and NCCL of it), its
# libraries, PyTorch on a CPU, and oneDNN.
_NO_MEMORY = re.compile(
    r"(CUDA|Cuda|HIP)\b[^.\n]{0,20}out of memory[^.\n]*|\w+_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: [^.\n]*|could not create a (primitive|memory object)"
)


def memory_trouble(error: BaseException) -> str | None:
    """What `error` says of memory that does not suffice; None if it is any other."""
    if found := _NO_MEMORY.search(str(error)):
        return found[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which we don't import
        return str(error).split("\n")[0] or "no memory is left"
    return None


# The user's to mend, wherever it is noticed.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WAY: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
_NO_WAY += (errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ENXIO)
# Libraries in Rust and C++ raise errors of their own.
_IN_WORDS = re.compile(r"(No space left on device|Disk quota exceeded|Read-only file system|File too large)")


def machine_trouble(error: BaseException) -> UserError | None:
    """What to tell of a disk or a memory that does not suffice, if that is what `error` comes of; None for any other
    error."""
    if not (memory := memory_trouble(error)):
        return disk_trouble(error)
    hint = "Fewer processes, --precision bf16, a smaller --max-length or model take less"
    return UserError(f"memory does not suffice: {memory}. {hint}")


def disk_trouble(error: BaseException | None) -> UserError | None:
    """What to tell of a disk that is full or read-only, or a file that may not be used, if that is what `error` comes
    of; None for any other error."""
    while error is not None:
        if isinstance(error, shutil.Error):
            error = _first(error)
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


def _first(error: shutil.Error) -> OSError:
    """What went wrong with the first file of a folder that was copied, of which `shutil` keeps the words."""
    problems = error.args[0] if error.args else ()
    for source, target, reason in problems if isinstance(problems, list) else ():
        if number := re.match(r"\[Errno (\d+)\]", str(reason)):
            return OSError(int(number[1]), os.strerror(int(number[1])), source, None, target)
    return error


def _disk(file: object) -> str:
    """Where the disk of a file is mounted."""
    if not isinstance(file, str | os.PathLike):
        return ""
    path = os.path.realpath(file)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return f" (the disk at {path})"
