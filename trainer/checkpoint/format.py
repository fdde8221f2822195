"""Checkpoints on disk: their format, their verification, and which of them exist.

A checkpoint is a folder `step-N`. Every process of the run wrote one file into it, `rank-K.safetensors`, with the
coordinates that it held: tensors named `KIND/PARAMETER[START:STOP]`, where KIND is `weight`, `exp_avg`, `exp_avg_sq` or
the name of a copy of the weights (`average`), and the range is of the flattened parameter. Nothing depends on how many
processes there were or how they shared the optimizer out, so a checkpoint loads at any number of processes and any ZeRO
stage. `manifest.json` says everything else about the run, and the size and SHA-256 of every file; it is written last,
and a folder without a valid one is no checkpoint. Nothing in a checkpoint can run code: tensors are safetensors, the
rest is JSON (and the aggregator's state, which `torch.load` reads with `weights_only`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # Python 3.11's own is not enough for pydantic

from minbert.data.errors import UserError, shown
from minbert.data.files import finite, flush_folder, naming, replacing, to_json
from minbert.data.reading import parse_json, read_small

FORMAT = 3
MANIFEST = "manifest.json"
AGGREGATOR = "aggregator.pt"
SAVED = "saved.json"  # beside the folder of the checkpoints
UNFINISHED, DAMAGED, DELETED = ".unfinished", ".damaged", ".deleted"  # suffixes of folders that are no checkpoints
_NAME = re.compile(r"step-(\d{8,})")  # of a checkpoint; `step-00000010 (copy)` is none
_SET_ASIDE = re.compile(rf"step-(\d{{8,}})(-\d+)?{re.escape(DAMAGED)}")


@dataclass
class TrainingState:
    """Where a run stands, between two steps."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: int = 0
    epochs: float = 0.0  # the budget, as far as it has been extended
    evaluated_at: int = 0
    best_score: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0  # since the best one
    skipped: int = 0  # steps in a row, up to now
    updates: dict[str, int] = field(default_factory=dict)  # of each of the optimizer's groups
    window: dict[str, Any] = field(default_factory=dict)  # what the next line of the log averages, so far
    trackers: dict[str, str] = field(default_factory=dict)  # each tracker's name for this run


class FileRecord(TypedDict):
    """What a file of a checkpoint was when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All about a checkpoint but its tensors.

    `identity`: what must be the same for the checkpoint to fit, as nested names and values. `shapes`: of every
    parameter. `positions`: examples of each task consumed. `copies`: names of the copies of the
    weights that it holds. `files`: {name: {"bytes", "sha256"}}.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: int
    written: str  # when, ISO 8601
    processes: int  # that wrote it, and whose random numbers it holds
    zero_stage: int | None
    state: TrainingState
    positions: dict[str, int]
    identity: dict[str, Any]
    config: dict[str, Any]
    code: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, FileRecord]
    copies: list[str] = field(default_factory=list)
    format: int = FORMAT
    total_steps: int | None = None  # of the budget, as far as it has been extended

    def write(self, folder: Path) -> None:
        """Write it into `folder`, whole or not at all."""
        content = finite(asdict(self))
        described = to_json({"sha256": _digest(content)} | content, indent=1)
        with replacing(folder / MANIFEST) as file:
            file.write_text(described + "\n")

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())

    @property
    def origin(self) -> str:
        """What wrote it."""
        if not self.processes:
            return "conversion"
        stage = "" if self.zero_stage is None else f", ZeRO {self.zero_stage}"
        return f"{self.processes} process{'' if self.processes == 1 else 'es'}{stage}"


class Damaged(Exception):
    """A checkpoint that is not as it was written; the message names the file and what is wrong with it."""


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises Damaged if it is missing, torn or altered, UserError if another version of the format wrote it."""
    path = checkpoint / MANIFEST
    try:
        content = parse_json(read_small(path))
        digest = content.pop("sha256")
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damaged(f"{path} is not whole") from None
    if digest != _digest(content):
        raise Damaged(f"{path} is not as it was written (its SHA-256 differs)")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint} has format {shown(content.get('format'))}; this version of minbert reads format {FORMAT}"
        )
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Damaged(f"{path} is no manifest: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if strangers := [name for name in manifest.files if Path(name).name != name]:
        raise Damaged(f"{path} names a file outside its folder: {shown(strangers[0])}")
    return manifest


def verify(checkpoint: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, one line for each; `names` limits it to some of them.

    Reads every byte. Raises UserError where a file may not be read by this user.
    """
    problems = []
    for name in manifest.files if names is None else names:
        path, expected = checkpoint / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{path} has {size:,} bytes instead of {expected['bytes']:,}")
                continue
            if not path.is_file():  # a pipe would never end
                problems.append(f"{path} is no regular file")
                continue
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    problems.append(f"{path} is not as it was written (its SHA-256 differs)")
        except PermissionError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return problems


def published(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, oldest first, whether or not they are still intact."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def damaged(folder: Path) -> list[Path]:
    """What was set aside in a run's `checkpoints` folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _SET_ASIDE.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """By the name of a checkpoint, or of what was set aside."""
    found = _NAME.match(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint in a run's `checkpoints` folder; 0 if there is none."""
    found = published(folder)
    return step_of(found[-1]) if found else 0


def remember(folder: Path, step: int) -> None:
    """Note beside a run's `checkpoints` folder that it has this step, so that a loss is noticed."""
    with replacing(folder.with_name(SAVED)) as file:
        file.write_text(to_json({"step": step}) + "\n")


def lost(folder: Path) -> int | None:
    """The remembered step, if neither its checkpoint nor a newer one is in the folder, not even damaged."""
    try:
        step = int(json.loads(folder.with_name(SAVED).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if step > max(map(step_of, published(folder) + damaged(folder)), default=0) else None


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file, flushed to the disk; its size and SHA-256, taken of the memory it came from."""
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb", buffering=0) as file:
        for content in chunks:
            chunk = memoryview(content)
            digest.update(chunk)
            size += len(chunk)
            while len(chunk):
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def publish(unfinished: Path, manifest: Manifest) -> Path:
    """Turn a folder, in which every file is written and flushed, into the checkpoint `step-N`.

    The manifest comes last, then one rename. A folder of that name from before is put aside: it is of a past that this
    run did not continue.
    """
    final = unfinished.with_name(folder_name(manifest.step))
    manifest.write(unfinished)
    flush_folder(unfinished)
    if final.exists():
        _put_aside(final, DELETED)
    os.replace(unfinished, final)
    flush_folder(final.parent)
    return final


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; what is left of it stays for inspection."""
    return _put_aside(checkpoint, DAMAGED)


def prune(folder: Path, keep: int, keep_every: int | None, protected: Iterable[int]) -> None:
    """Remove checkpoints but the newest `keep`, those at multiples of `keep_every`, and the `protected` steps.

    To be called after a checkpoint was published. A name goes before its files do, so that a kill between the two
    leaves no half of a checkpoint.
    """
    kept = set(protected)
    for old in published(folder)[:-keep]:
        step = step_of(old)
        if step not in kept and not (keep_every and step % keep_every == 0):
            _put_aside(old, DELETED)
    remove_leftovers(folder)


def remove_leftovers(folder: Path, but: Path | None = None) -> None:
    """Remove what was being deleted or written when a run was killed."""
    for suffix in (DELETED, UNFINISHED):
        for path in folder.glob(f"*{suffix}"):
            if path != but:
                shutil.rmtree(path, ignore_errors=True)


def _put_aside(checkpoint: Path, suffix: str) -> Path:
    names = chain([checkpoint.name + suffix], (f"{checkpoint.name}-{n}{suffix}" for n in count(2)))
    target = next(target for target in map(checkpoint.with_name, names) if not target.exists())
    os.replace(checkpoint, target)
    return target


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
