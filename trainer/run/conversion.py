"""Between checkpoints and other files: DeepSpeed's checkpoints into ours, ours into a plain safetensors model."""

from itertools import chain
from pathlib import Path

import torch

from minbert.data.errors import UserError
from minbert.trainer.checkpoint.deepspeed import read
from minbert.trainer.checkpoint.format import (
    UNFINISHED,
    Damaged,
    Manifest,
    TrainingState,
    folder_name,
    publish,
    published,
    remember,
    write_hashed,
)
from minbert.trainer.checkpoint.saving import now, shard_name
from minbert.trainer.checkpoint.shards import Snapshot
from minbert.trainer.engine.optimizer import MOMENTS, parameter_groups
from minbert.trainer.engine.parts import Part
from minbert.trainer.processes.random_state import seed_everything, stream
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import identity
from minbert.trainer.run.saved_model import build_model, read_weights, save_model


def from_deepspeed(source: Path, run: RunFolder) -> tuple[Path, list[str]]:
    """Write what DeepSpeed saved of the same model as a checkpoint of the prepared run.

    Returns the checkpoint and the names of frozen parameters that the source lacks, which keep the weights that the run
    would start with. Raises UserError if the source is no checkpoint of this model, or the run has one already.
    """
    if existing := published(run.checkpoints):
        raise UserError(f"{run.path} has checkpoints already ({existing[-1].name}); convert into a new run folder")
    config = run.read_config()
    seed_everything(stream(config.seed, "weights"))
    model = build_model(config, run)
    own = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    groups = parameter_groups(model, config.optimizer)
    trained_names = [[names[id(p)] for p in group["params"]] for group in groups]
    found = read(source, trained_names)
    trained = set(chain.from_iterable(trained_names))
    _refuse_other_parameters(source, found.tensors, {name: p.numel() for name, p in own.items()}, trained)
    weights = found.tensors["weight"]
    # Where another optimizer moved the parameters of a group different numbers of times, the largest is closest to all.
    updates = {
        group["name"]: max(found.updates[name] for name in members) for group, members in zip(groups, trained_names)
    }
    parts = []
    for name, parameter in own.items():
        tensors = {"weight": weights.get(name, parameter)}
        if name in trained:
            tensors |= {kind: found.tensors[kind][name] for kind in MOMENTS}
        flat = {kind: tensor.detach().float().flatten() for kind, tensor in tensors.items()}
        parts.append(Part(name, 0, flat, replicated=True))
    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    manifest = Manifest(
        step=found.step,
        written=now(),
        processes=0,  # nobody's random numbers are in it
        zero_stage=None,
        state=TrainingState(step=found.step, epochs=config.budget.passes, updates=updates),
        positions={name: plan.position(name, found.step) for name in plan.names},
        identity=identity(config, run, splits),
        config=config.model_dump(mode="json"),
        code=run.code_state(),
        shapes={name: list(parameter.shape) for name, parameter in own.items()},
        files={},
    )
    snapshot, unfinished = Snapshot(), run.checkpoints / f"{folder_name(found.step)}{UNFINISHED}"
    snapshot.take(parts, {})
    unfinished.mkdir(parents=True, exist_ok=True)
    manifest.files[shard_name(0)] = write_hashed(unfinished / shard_name(0), snapshot.content())
    checkpoint = publish(unfinished, manifest)
    remember(run.checkpoints, found.step)
    return checkpoint, sorted(own.keys() - weights.keys())


def to_safetensors(checkpoint: Path, target: Path) -> Manifest:
    """Write the weights of a checkpoint as one safetensors file, like a run's best.safetensors.

    Raises UserError if the checkpoint is damaged.
    """
    try:
        manifest, state = read_weights(checkpoint)
    except Damaged as damage:
        raise UserError(f"damaged checkpoint: {damage}") from None
    save_model(target, state, manifest.step, {})
    return manifest


def _refuse_other_parameters(
    source: Path, tensors: dict[str, dict[str, torch.Tensor]], sizes: dict[str, int], trained: set[str]
) -> None:
    """Raises UserError naming what does not fit; weights that are not trained may be missing."""
    wrong = []
    for kind, wanted in (("weight", sizes), *((kind, trained) for kind in MOMENTS)):
        found = tensors.get(kind, {})
        wrong += [
            f"{name}: {found[name].numel():,} values of {kind} in the checkpoint, {sizes[name]:,} here"
            for name in wanted
            if name in found and found[name].numel() != sizes[name]
        ]
        wrong += [f"{name}: not a parameter of this run's model" for name in sorted(found.keys() - sizes.keys())]
        wrong += [f"{name}: no {kind} in the checkpoint" for name in sorted(trained - found.keys())]
    if wrong:
        lines = list(dict.fromkeys(wrong))
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            f"{source} is not a checkpoint of this run's model:\n" + "\n".join(f"  {line}" for line in lines[:8]) + more
        )
