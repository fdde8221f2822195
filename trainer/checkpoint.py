"""Checkpoints: everything that makes a resumed run go on where it stopped.

Every rank writes its own part through Accelerate (weights, optimizer shards, random states); `state.json` holds the
step, which also is the position in the data and the schedule, and the state of early stopping. A checkpoint is written
under a temporary name and appears by one rename, so a folder `step-N` is always complete.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.trainer.aggregators import Aggregator
from minbert.trainer.distributed import World
from minbert.trainer.engine import Engine

STATE = "state.json"


@dataclass
class TrainingState:
    """Where a run stands, between two steps."""

    step: int = 0
    epochs: float = 0.0  # the budget, as far as it has been extended
    evaluated_at: int = 0
    best_score: float = float("-inf")
    best_step: int = 0
    stale_evaluations: int = 0  # since the best one
    skipped: int = 0  # steps in a row, up to now
    window: dict[str, Any] = field(default_factory=dict)  # what the next line of the log averages, so far


@dataclass(frozen=True)
class Topology:
    """What the shards of a checkpoint are cut for."""

    processes: int
    zero_stage: int | None


def save(
    folder: Path,
    engine: Engine,
    aggregator: Aggregator,
    state: TrainingState,
    topology: Topology,
    world: World,
    keep: int,
) -> None:
    """Write checkpoint `step-N`; then remove all but the newest `keep`. Collective."""
    final, temporary = folder / f"step-{state.step:08d}", folder / f"step-{state.step:08d}.tmp"
    described = json.dumps({"state": asdict(state), "topology": asdict(topology)}, indent=2) + "\n"
    if final.exists():  # by the stop before an evaluation that has come since: only the state is another
        if world.is_main:
            with replacing(final / STATE) as file:
                file.write_text(described)
        return
    if world.is_main:
        for unfinished in folder.glob("*.tmp"):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    world.barrier()
    engine.accelerator.save_state(str(temporary))
    world.barrier()
    if world.is_main:
        torch.save(aggregator.state_dict(), temporary / "aggregator.pt")  # the same on all processes
        (temporary / STATE).write_text(described)
        os.replace(temporary, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(
    folder: Path, engine: Engine, aggregator: Aggregator, topology: Topology, world: World
) -> TrainingState | None:
    """Restore the newest checkpoint into the engine, or return None where there is none. Collective."""
    newest = world.broadcast(checkpoints(folder)[-1] if world.is_main and checkpoints(folder) else None)
    if newest is None:
        return None
    described = json.loads((newest / STATE).read_text())
    saved = Topology(**described["topology"])
    if saved != topology:
        raise UserError(f"{newest} was written by {_name(saved)}; resume it so, not with {_name(topology)}")
    engine.accelerator.load_state(str(newest))
    aggregator.load_state_dict(torch.load(newest / "aggregator.pt", weights_only=True))
    return TrainingState(**described["state"])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


def _name(topology: Topology) -> str:
    stage = "no ZeRO stage" if topology.zero_stage is None else f"ZeRO stage {topology.zero_stage}"
    return f"{topology.processes} process(es) and {stage}"
