"""Finding the checkpoint from which a run goes on, and putting it into the engine.

Rank 0 picks a checkpoint, all processes verify their share of its files, and all learn what the others found. A
damaged checkpoint is named and set aside, and the one before it is tried.
"""

import logging
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from minbert.data.differences import differences, refuse
from minbert.data.errors import UserError
from minbert.trainer.checkpoint.format import (
    AGGREGATOR,
    Damaged,
    Manifest,
    damaged,
    published,
    read_manifest,
    remove_leftovers,
    set_aside,
    verify,
)
from minbert.trainer.checkpoint.shards import open_shards
from minbert.trainer.engine.base import Engine
from minbert.trainer.processes.random_state import seed_everything, set_random_state, stream
from minbert.trainer.processes.world import World
from minbert.trainer.surgery.methods import Aggregator

log = logging.getLogger(__name__)

VISIBLE_WITHIN = 30.0  # seconds in which a shared file system shows a folder to every node


def newest_intact(folder: Path, world: World) -> tuple[Path, Manifest] | None:
    """The newest checkpoint in `folder` that is as it was written; None if there never was one. Collective.

    Raises UserError if all are damaged, if a process does not see them, or may not read them.
    """
    candidates, found = [], []
    if world.is_main:
        remove_leftovers(folder)
        candidates = published(folder)
        found = [f"{path} was set aside before" for path in damaged(folder)] if not candidates else []
    found = world.messages.share("resume/aside", found)
    for attempt in range(1_000_000):
        topic = f"resume/{attempt}"
        name = world.messages.share(topic, candidates.pop().name if candidates else None)
        if name is None:
            break
        checkpoint = folder / name
        reports = world.messages.exchange(f"{topic}/verified", _inspect(checkpoint, world))
        if error := next((report["error"] for report in reports if report["error"]), None):
            raise UserError(error)
        damage = sorted({line for report in reports for line in report["damage"]})
        if not damage:
            return checkpoint, read_manifest(checkpoint)
        found += damage
        if world.is_main:
            _put_away(checkpoint, damage)
    if found:
        raise UserError(
            f"no checkpoint in {folder} is intact:\n" + "\n".join(f"  {line}" for line in found) + "\n"
            "Restore one from a copy. To start over, remove the folder, or give the run another one."
        )
    return None


def _inspect(checkpoint: Path, world: World) -> dict[str, Any]:
    """What this process finds at its share of a checkpoint's files."""
    report: dict[str, Any] = {"damage": [], "error": None}
    deadline = time.monotonic() + VISIBLE_WITHIN
    while world.rank and not checkpoint.is_dir() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not checkpoint.is_dir():
        report["error"] = f"rank {world.rank} does not see {checkpoint}, which rank 0 does; all nodes must share it"
        return report
    try:
        manifest = read_manifest(checkpoint)
        report["damage"] = verify(checkpoint, manifest, sorted(manifest.files)[world.rank :: world.size])
    except Damaged as damage:
        report["damage"] = [str(damage)]
    except UserError as error:
        report["error"] = str(error)
    return report


def _put_away(checkpoint: Path, damage: list[str]) -> None:
    for line in damage:
        log.warning("damaged checkpoint: %s", line)
    try:
        log.warning("%s is not used; it is kept as %s", checkpoint, set_aside(checkpoint).name)
    except OSError as error:
        log.warning("%s is not used; it could not be renamed (%s)", checkpoint, error.strerror)


def refuse_another(checkpoint: Path, manifest: Manifest, identity: dict[str, Any], force: bool) -> list[str]:
    """Compare what a checkpoint was trained on and with to what this run has.

    Returns the differences that `force` overrides, one line each. Raises UserError with them without `force`, and where
    the weights do not fit.
    """
    saved, here = _leaves(manifest.identity), _leaves(identity)
    different = differences(saved, here, "in the checkpoint", "here")
    model = any(line.startswith("model.") for line in different)
    if different and (model or not force):
        way = "Its weights do not fit this model." if model else "--force resumes all the same."
        refuse(f"{checkpoint} is of another run", different, way)
    return different


def restore(
    checkpoint: Path, manifest: Manifest, engine: Engine, aggregator: Aggregator | None, world: World, seed: int
) -> None:
    """Put a verified checkpoint into the engine and the aggregator, if the state is of that one, and set the random
    generators. Collective.

    Weights, moments, copies and everything on which all processes agree carry over exactly. A copy of the weights that
    the checkpoint lacks (it was converted, or --force changed what is kept) starts from the weights. Each process's
    random numbers carry over only to the same number of processes; otherwise they start from seed, step and rank.
    """
    with open_shards(checkpoint / name for name in manifest.files if name.endswith(".safetensors")) as shards:
        missing = [name for name in engine.copies if name not in manifest.copies]
        for part in engine.parts():
            shards.fill(part.without(missing))
        for name in missing:
            engine.keep_copy(name)
            if world.is_main:
                log.warning("%s has no %s of the weights: it starts from the weights of its step", checkpoint, name)
        engine.adopt_parts(manifest.state.updates)
        if manifest.processes == world.size:
            names = [f"random/{world.rank}/{name}" for name in ("torch", "python", "numpy", "cuda")]
            states = {name.rpartition("/")[2]: shards.small(name) for name in names}
            set_random_state({name: state for name, state in states.items() if state is not None})
        else:
            seed_everything(stream(seed, "dropout", world.rank, manifest.step))
            if world.is_main:
                log.warning(
                    "the checkpoint was written by %s, and %d go on: dropout's random numbers do not carry over",
                    manifest.origin,
                    world.size,
                )
    if aggregator is not None and (checkpoint / AGGREGATOR).exists():
        try:
            aggregator.load_state_dict(torch.load(checkpoint / AGGREGATOR, weights_only=True))
            deepcopy(aggregator).rehearse()
        except Exception as error:  # nothing says how a state of another shape fails
            raise UserError(
                f"{checkpoint / AGGREGATOR} does not fit the aggregator {aggregator.name}: {error!r}\n"
                "Remove this checkpoint to go on from the one before."
            ) from error


def _leaves(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
