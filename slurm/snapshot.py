"""A copy of the code that a job will run, made when it is submitted: what waits in the queue doesn't change under it.

The copy lies at `FOLDER/HASH/minbert/...` and comes first on the job's PYTHONPATH, before any installed `minbert`. It
is named by its content, so equal code is stored once, and a snapshot is never changed.
"""

import hashlib
import importlib.util
import shutil
import uuid
from pathlib import Path

PACKAGES = ("data", "trainer", "launch", "slurm", "tuning")
FRONT = "api"  # a checkout's folder that is the package `minbert` itself, in which those are


def take_snapshot(folder: Path) -> Path:
    """Copy the running code under `folder`, unless it is there already; returns what goes onto PYTHONPATH."""
    sources = {name: source for name in ("", *PACKAGES) if (source := _source(name)) is not None}
    files = {
        str(Path(name, path.relative_to(source))): path
        for name, source in sources.items()
        for path in sorted(source.rglob("*") if name else source.glob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    snapshot = folder / digest.hexdigest()[:12]
    if snapshot.exists():
        return snapshot
    unfinished = folder / f".{uuid.uuid4().hex}"
    for name, path in files.items():
        copy = unfinished / "minbert" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    try:
        unfinished.rename(snapshot)
    except OSError:  # somebody else was faster
        shutil.rmtree(unfinished)
    return snapshot


def _source(package: str) -> Path | None:
    """Where the running package comes from, `minbert` itself or one in it; None if there is none, or nothing in it."""
    spec = importlib.util.find_spec(f"minbert.{package}".rstrip("."))
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.origin else None
