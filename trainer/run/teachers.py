"""What teachers say of a run's training rows: asked once, and kept in the cache by model and row.

A teacher is the best model of another run, in its own encoding: single-task or multitask, joint or siamese. Its raw
outputs lie under `teachers/` in the cache, one folder for each model and task, in shards that are named by their
content and never changed, so that a start that dies keeps what it has, and runs beside each other do no harm.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.data.sources.examples import Examples
from minbert.data.task import Task
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.averaging import in_scale
from minbert.trainer.evaluation.scoring import outputs
from minbert.trainer.processes.stop import Stopped
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import load_examples_of, tokenise_as
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import say
from minbert.trainer.run.saved_model import load_model
from minbert.trainer.run.soup import require_same_labels

log = logging.getLogger(__name__)

SHARD = 8192  # rows of which a teacher is asked between two shards
KEY = 16  # bytes


def require_teachers(config: RunConfig) -> None:
    """Raises UserError for a teacher that has no model, knows none of the tasks, or has other labels."""
    for path in config.objective.teachers:
        run = RunFolder.existing(path)
        if not run.best_model.exists():
            raise UserError(f"{path} has no best.safetensors: as a teacher it must have been trained")
        if not (known := _tasks(run, config)):
            theirs, ours = ", ".join(run.read_config().corpus.names), ", ".join(config.corpus.names)
            raise UserError(f"{path} can teach nothing: it was trained on {theirs}, and this run is on {ours}")
        for task in known:
            require_same_labels(task, run.read_config().corpus.task(task.name), "of this run", f"of {path}")


def model_digest(run: RunFolder) -> str:
    """The SHA-256 that the best model's file gives itself, which is checked when it is read. Raises UserError."""
    try:
        with safe_open(run.best_model, "pt") as file:
            return str(file.metadata()["sha256"])
    except (OSError, KeyError, TypeError, SafetensorError):
        raise UserError(f"{run.best_model} is no model that a teacher could have") from None


def ask_teachers(config: RunConfig, world: World, stop: Callable[[], bool]) -> dict[str, Tensor]:
    """For each task that a teacher knows (n, outputs), on this process's device: the mean of what they say of the n
    training rows, in the scale of predictions at the configured temperature. Collective.

    Raises UserError as `require_teachers` does, and Stopped if `stop`, on which the processes agree, says so.
    """
    require_teachers(config)
    said: dict[str, list[Tensor]] = {}
    for path in config.objective.teachers:
        run = RunFolder(path)
        for task in _tasks(run, config):
            raw = _outputs(run, config, task, world, stop)
            said.setdefault(task.name, []).append(
                in_scale(task_of(run, task), raw, config.objective.distill_temperature)
            )
    return {name: torch.stack(each).mean(0).to(world.device) for name, each in said.items()}


def task_of(run: RunFolder, task: Task) -> Task:
    """The task as the run declares it: its loss may make its outputs others."""
    return run.read_config().corpus.task(task.name)


def _tasks(run: RunFolder, config: RunConfig) -> list[Task]:
    known = run.read_config().corpus.names
    return [task for task in config.corpus.tasks if task.name in known and task.kind != "masked_lm"]


def _outputs(run: RunFolder, config: RunConfig, task: Task, world: World, stop: Callable[[], bool]) -> Tensor:
    """Raw outputs (n, outputs) of one teacher for the training rows of a task, from the cache as far as they are there.

    Rank 0 reads and writes the cache, and tells the others what is there, so that all ask the teacher of the same rows.
    """
    examples = load_examples_of(config, task.name, "train")
    assert config.corpus.cache is not None, "the run is not prepared"
    cache = OutputCache(config.corpus.cache / "teachers", run, task)
    keys = [_key(row) for row in zip(*examples.sentences)]
    table, there = torch.zeros(len(keys), task.outputs), torch.zeros(len(keys))
    if world.is_main:
        known = cache.read()
        for number, key in enumerate(keys):
            if key in known:
                table[number], there[number] = torch.from_numpy(known[key]), 1.0
    table, there = (world.sum(part.to(world.device)).cpu() for part in (table, there))
    missing = np.flatnonzero(there.numpy() == 0)
    if not len(missing):
        return table
    model, tokenizer, _ = load_model(run, world.device)
    own = run.read_config()
    own = own.model_copy(update={"corpus": own.corpus.model_copy(update={"cache": config.corpus.cache})})
    split = tokenise_as(own, _some(examples, missing, task), tokenizer)
    for start in range(0, len(missing), SHARD):
        if world.is_main:  # on a CPU it takes minutes
            done = f", {start:,} done" if start else ""
            say(f"Asking {run.path} about {len(missing):,} rows of {task.name}{done}", config)
        some = np.arange(start, min(start + SHARD, len(missing)))
        columns = tuple(column.take(some) for column in split.columns)
        part = replace(split, ids=[str(row) for row in some], columns=columns, labels=None)
        if (raw := outputs(model, task, part, world, stop)) is None:
            raise Stopped
        table[torch.from_numpy(missing[some])] = raw
        if world.is_main:
            cache.add([keys[row] for row in missing[some]], raw)
    return table


def _some(examples: Examples, rows: np.ndarray, task: Task) -> Examples:
    columns = tuple([column[row] for row in rows] for column in examples.sentences)
    return replace(examples, task=task, ids=[examples.ids[row] for row in rows], sentences=columns, labels=None)


def _key(sentences: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(sentences).encode(), digest_size=KEY).digest()


class OutputCache:
    """The raw outputs of one model for rows of one task, under `root`."""

    def __init__(self, root: Path, run: RunFolder, task: Task):
        config = run.read_config()
        self.about: dict[str, Any] = {
            "model": model_digest(run),
            "vocabulary": run.vocabulary,
            "task": task.name,
            "max_length": config.corpus.max_length,
            "symmetric": task.symmetric,
            "heads": config.heads.model_dump(mode="json"),
            "pooling": config.encoder.pooling,
            "precision": config.parallel.precision,
        }
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.folder, self.outputs = root / digest[:32], task.outputs

    def read(self) -> dict[bytes, np.ndarray]:
        """What is there, (outputs,) float32 by row. A shard that is damaged is removed, with a warning."""
        found: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("[0-9a-f]*.safetensors")):
            try:
                content = path.read_bytes()
                shard = load(content) if hashlib.sha256(content).hexdigest() == path.stem else {}
            except FileNotFoundError:
                continue  # damaged, and another reader has removed it
            except SafetensorError:
                shard = {}
            if not shard or shard["outputs"].shape[1:] != (self.outputs,):
                log.warning("%s is not as it was written: the teacher is asked again", path)
                path.unlink(missing_ok=True)
                continue
            rows = [bytes(row) for row in shard["rows"].numpy()]
            found |= zip(rows, shard["outputs"].numpy())
        return found

    def add(self, keys: Sequence[bytes], raw: Tensor) -> None:
        """Keep outputs (n, outputs) of n rows as one shard. Raises OSError."""
        rows = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY).copy())
        content = save({"rows": rows, "outputs": raw.float().contiguous()})
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (about := self.folder / "about.json").exists():
            with replacing(about) as temporary:
                temporary.write_text(json.dumps(self.about, indent=2) + "\n")
        with replacing(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors") as temporary:
            temporary.write_bytes(content)
