"""Reading what DeepSpeed's `save_checkpoint` wrote, at any ZeRO stage, and its universal checkpoints.

The result is whole fp32 weights and AdamW moments by parameter name, from which a checkpoint of our own can be written.
The files are pickles; they are read with PyTorch's restricted unpickler, which admits tensors, containers, and the few
harmless classes that DeepSpeed puts beside them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from minbert.data.errors import UserError
from minbert.trainer.engine.optimizer import MOMENTS


@dataclass
class TrainingTensors:
    """`tensors`: kind (`weight`, `exp_avg`, `exp_avg_sq`) -> parameter -> fp32 tensor, flat or whole. `step`: steps of
    the run. `updates`: how many of them moved each parameter."""

    tensors: dict[str, dict[str, Tensor]]
    step: int
    updates: dict[str, int]


def read(source: Path, groups: list[list[str]]) -> TrainingTensors:
    """Read the folder that was given to `save_checkpoint`, one of its tags, or a universal checkpoint.

    `groups`: names of the parameters of each of the optimizer's groups, which a checkpoint of stage 0 knows by number
    only. Raises UserError where the folder is none of these, or a file is damaged or holds anything else.
    """
    folder = source
    if (source / "latest").exists():
        folder = source / (source / "latest").read_text().strip()
    states = sorted(folder.glob("*model_states.pt"), key=_rank)
    if not states:
        raise UserError(f"{source} is no DeepSpeed checkpoint: there is no *model_states.pt in {folder}")
    model = _load(states[0])
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    if model.get("frozen_param_fragments"):
        _join_frozen(tensors["weight"], [model, *map(_load, states[1:])])
    else:
        tensors["weight"] |= model["module"]
    shards = sorted(folder.glob("*optim_states.pt"), key=_rank)
    if (folder / "zero").is_dir():
        updates = _read_universal(folder / "zero", model.get("param_shapes", ()), tensors)
    elif not shards:
        updates = _read_stage_0(model["optimizer"], groups, tensors)
    else:
        optimizers = [_load(shard)["optimizer_state_dict"] for shard in shards]
        partitions = optimizers[0]["partition_count"]
        expected = max(partitions) if isinstance(partitions, list) else partitions
        if len(optimizers) != expected:
            raise UserError(f"{folder} holds the optimizer shards of {len(optimizers)} processes out of {expected}")
        if "fp32_flat_groups" in optimizers[0]:
            updates = _join_stage_3(model["param_shapes"], optimizers, tensors)
        else:
            updates = _join_stage_1_and_2(optimizers, tensors)
    return TrainingTensors(dict(tensors), int(model["global_steps"]), updates)


def _load(path: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the class {unknown[1]}" if unknown else "something"
        raise UserError(f"{path} holds {what} that could run code when loaded; it is not read") from None
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _rank(path: Path) -> int:
    numbers = re.search(r"pp_rank_(\d+)", path.name)
    return int(numbers[1]) if numbers else 0


def _join_frozen(weights: dict[str, Tensor], models: list[Mapping[str, Any]]) -> None:
    """Stage 3 cuts parameters that are not trained like the others; whole they are in no file."""
    for name, shape in models[0]["frozen_param_shapes"].items():
        whole = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        weights[name] = whole[: shape.numel()]


def _read_universal(
    folder: Path, shapes: Sequence[Mapping[str, torch.Size]], tensors: dict[str, dict[str, Tensor]]
) -> dict[str, int]:
    updates = {}
    for parameter in (path for path in folder.iterdir() if path.is_dir()):
        for kind, file in (("weight", "fp32.pt"), *((kind, f"{kind}.pt") for kind in MOMENTS)):
            if (parameter / file).exists():  # a frozen parameter has no moments
                content = _load(parameter / file)
                tensors[kind][parameter.name] = content["param"] if isinstance(content, dict) else content
        if (parameter / "step.pt").exists():
            updates[parameter.name] = int(_load(parameter / "step.pt"))
    if not updates:  # stage 3 leaves it where it was
        state = _load(folder / "optimizer_state.pt")["optimizer_state_dict"]["state"]
        updates = _by_parameter(shapes, state)
    return updates


def _by_parameter(groups: Sequence[Iterable[str]], states: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
    """The updates of each parameter, where the optimizer has one state, and one count, for a group."""
    return {name: int(states[number]["step"]) for number, group in enumerate(groups) for name in group}


def _read_stage_0(
    optimizer: Mapping[str, Any], groups: list[list[str]], tensors: dict[str, dict[str, Tensor]]
) -> dict[str, int]:
    numbers = [group["params"] for group in optimizer["param_groups"]]
    if list(map(len, numbers)) != list(map(len, groups)):
        raise UserError(
            f"the checkpoint's optimizer has groups of {list(map(len, numbers))} parameters, "
            f"this run's has {list(map(len, groups))}"
        )
    updates = {}
    for names, own in zip(groups, numbers):
        for name, number in zip(names, own):
            state = optimizer["state"][number]
            updates[name] = int(state["step"])
            for kind in MOMENTS:
                tensors[kind][name] = state[kind]
    return updates


def _join_stage_1_and_2(optimizers: list[Mapping[str, Any]], tensors: dict[str, dict[str, Tensor]]) -> dict[str, int]:
    """Each process's flat vectors hold consecutive fragments of some parameters; `param_slice_mappings` says where."""
    pieces: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    updates: dict[str, int] = {}
    for optimizer in optimizers:
        states = optimizer["base_optimizer_state"]["state"]
        updates |= _by_parameter(optimizer["param_slice_mappings"], states)
        for group, fragments in enumerate(optimizer["param_slice_mappings"]):
            flat = {"weight": optimizer["single_partition_of_fp32_groups"][group]}
            flat |= {kind: states[group][kind] for kind in MOMENTS}
            for name, place in fragments.items():
                for kind, vector in flat.items():
                    pieces[kind][name].append(vector[place.start : place.start + place.numel])
    for kind, parameters in pieces.items():
        tensors[kind] |= {name: torch.cat(fragments) for name, fragments in parameters.items()}
    return updates


def _join_stage_3(
    shapes: list[Mapping[str, torch.Size]], optimizers: list[Mapping[str, Any]], tensors: dict[str, dict[str, Tensor]]
) -> dict[str, int]:
    """Each process holds an equal part of every parameter, one after the other; the last part may be padded."""
    processes = len(optimizers)
    vectors = {"weight": [torch.cat(optimizer["fp32_flat_groups"]) for optimizer in optimizers]}
    states = [optimizer["optimizer_state_dict"]["state"] for optimizer in optimizers]
    for kind in MOMENTS:
        vectors[kind] = [torch.cat([state[group][kind] for group in sorted(state)]) for state in states]
    named = [(name, shape.numel()) for group in shapes for name, shape in group.items()]
    edges = [0]
    for _, size in named:
        edges.append(edges[-1] + -(-size // processes))
    for (name, size), (start, stop) in zip(named, pairwise(edges)):
        for kind, parts in vectors.items():
            tensors[kind][name] = torch.cat([part[start:stop] for part in parts])[:size]
    return _by_parameter(shapes, states[0])
