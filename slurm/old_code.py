"""The code that a run was trained with, to be run again: the snapshot of its job, or the commit and the changes that
its folder remembers, put together from the checkout's history."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.data.reading import read_json, read_small
from minbert.slurm.records import Records
from minbert.slurm.snapshot import FRONT, PACKAGES


def code_of(run: Path, into: Path) -> Path:
    """What goes onto PYTHONPATH; made below `into` if it must be. Raises UserError where the code cannot be had."""
    submission = Records(run).submission()
    if submission is not None and (Path(submission.code) / "minbert").is_dir():
        return Path(submission.code)
    try:
        commit = read_json(run / "environment.json").get("commit")
        changes = read_small(run / "code.diff")
    except (OSError, UserError) as error:
        raise UserError(f"{run} does not say which code trained it: {error}") from None
    if not commit:
        raise UserError(f"{run} was trained by an installed minbert, not from a checkout: only --code today is there")
    checkout = Path(__file__).resolve().parents[1]
    digest = f"-{hashlib.sha256(changes).hexdigest()[:8]}" if changes.strip() else ""
    folder = into / f"{commit[:12]}{digest}"
    if folder.exists():
        return folder
    unfinished = into / f".{uuid4().hex}"
    try:
        _extract(checkout, commit, unfinished / "minbert")
        if changes.strip():
            _apply(changes, unfinished / "minbert", commit)
        if (front := unfinished / "minbert" / FRONT).is_dir():  # a commit from before there was one has none
            shutil.copytree(front, unfinished / "minbert", dirs_exist_ok=True)
        with suppress(OSError):  # somebody else was faster
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _extract(checkout: Path, commit: str, folder: Path) -> None:
    archive = _git(checkout, "archive", "--format=tar", commit)
    if archive is None:
        raise UserError(
            f"the commit {commit[:12]} that trained the run is not in {checkout}: fetch it, or take --code today"
        )
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            if member.name.partition("/")[0] in (FRONT, *PACKAGES) and member.isfile():
                files.extract(member, folder, filter="data")


def _apply(changes: bytes, folder: Path, commit: str) -> None:
    """Those of the packages; what else was changed does not train."""
    command = ["git", "apply", "--whitespace=nowarn", *(f"--include={name}/*" for name in (FRONT, *PACKAGES))]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, input=changes, capture_output=True, env=environment)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[:1]
        raise UserError(f"the changes in code.diff do not fit the commit {commit[:12]}: {' '.join(why)}")


def _git(checkout: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
