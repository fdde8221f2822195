"""Files and folders that a command writes where the user said: refused before the work, and whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minbert.data.errors import UserError, disk_trouble
from minbert.data.files import alone, replacing

LOCK = ".lock"  # in a folder that a command fills, as long as it does
# What nobody writes but the run itself.
OF_A_RUN = {"config.yaml", "best.safetensors", "metrics.jsonl", "gramians.jsonl", "environment.json"}


def require_place(path: Path) -> None:
    """Raises UserError unless a file may be written at `path`."""
    folder = path.parent
    if (folder / "manifest.json").exists() or (path.name in OF_A_RUN and (folder / "config.yaml").exists()):
        raise UserError(f"cannot write {path}: it belongs to a run; choose another name or folder")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {folder} may not be written to")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`replacing`, for a file that the user named. Raises UserError where it cannot be written."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise disk_trouble(error) or UserError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def whole_or_gone(folder: Path, new: bool = False) -> Iterator[None]:
    """Make a folder, unless it is there, and keep other commands out of it. If the block fails that fills it, it is as
    it was: empty, or gone with the parents made for it; files that lay there before stay. `new`: there must be none.

    Raises UserError where it cannot be made or may not be written to, and where another command writes there.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {folder}: it may not be written to")
        with alone(folder / LOCK, f"another command writes into {folder}; wait for it, or name another folder"):
            was_empty = not _content(folder)
            if new and not was_empty:
                raise UserError(f"{folder} exists and is not an empty folder; name a new one")
            try:
                yield
            except BaseException:
                for path in _content(folder) if was_empty else ():
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                raise
    except BaseException as error:
        for path in missing:
            with suppress(OSError):  # not empty, or never made
                path.rmdir()
        if isinstance(error, OSError) and error.filename in (str(path) for path in (folder, *folder.parents)):
            raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder") from None
        raise


def _content(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK]
