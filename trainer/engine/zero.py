"""DeepSpeed ZeRO: where its optimizers keep the reduced gradient of a backward pass, and how to hand one back.

At the accumulation boundary the optimizer holds this process's averaged shards in `averaged_gradients` (parameter
group -> list of tensors). Taking them out and clearing what else remembers the pass lets the next task's backward
start afresh; handing a combination back and stepping the engine updates with it. No full gradient is ever gathered.
"""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from minbert.trainer.engine.base import Engine
from minbert.trainer.engine.parts import Gradient, Part, Shard


class DeepSpeedEngine(Engine):
    """What all stages have in common."""

    model: Any  # DeepSpeed's engine

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.backward(loss)  # accelerator.backward would step the engine, too

    def update(self, gradient: Gradient, rates: Mapping[str, float], finite: Tensor) -> None:
        if finite:  # DeepSpeed waits for its gradients' norms in any case
            super().update(gradient, rates, finite)

    def _step(self) -> None:
        self.model.step()


class ZeroStage0Engine(DeepSpeedEngine):
    """Stage 0 shards nothing: gradients lie at the parameters, as in plain PyTorch."""


class ShardedEngine(DeepSpeedEngine):
    """Stages 1 to 3, whose optimizer holds gradient, fp32 weights and moments in shards."""

    is_sharded = True

    def _hand_back(self, gradient: Gradient) -> None:
        filled = [
            torch.zeros(shard.length, device=self.accelerator.device) if part is None else part
            for shard, part in zip(self.shards, gradient, strict=True)
        ]
        self._hand_back_filled(filled)

    def _hand_back_filled(self, gradient: Sequence[Tensor]) -> None:
        raise NotImplementedError

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def _cut(self, flat: Tensor, lengths: Sequence[tuple[Shard, int]]) -> list[Part]:
        """The parts in a flat vector of the optimizer, where each shard takes up so many places, padding included."""
        tensors, parts, position = self._flat(flat), [], 0
        for shard, length in lengths:
            own = {kind: tensor[position : position + shard.length] for kind, tensor in tensors.items()}
            parts.append(Part(shard.name, shard.start, own, replicated=False))
            position += length
        return parts

    @property
    def zero(self) -> Any:
        return self.model.optimizer


class ZeroEngine(ShardedEngine):
    """Stages 1 and 2: a parameter group is one flat vector, and each process owns a contiguous part of it."""

    @property
    def adds_up_whole(self) -> bool:  # type: ignore[override]
        return not self.zero.partition_gradients  # stage 1

    def collect_gradient(self) -> Gradient:
        gradient: Gradient = []
        for group, parameters in enumerate(self.zero.params_in_partition):
            # What follows the parameters' parts is padding.
            gradient += self.zero.averaged_gradients[group][: len(parameters)]
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None
        self.zero.zero_grad()
        self.zero.micro_step_id = -1  # the next pass starts a sum of its own
        return gradient

    def _hand_back_filled(self, gradient: Sequence[Tensor]) -> None:
        parts = iter(gradient)
        for group, parameters in enumerate(self.zero.params_in_partition):
            own = [next(parts) for _ in parameters]
            padding = int(self.zero.partition_size[group]) - sum(part.numel() for part in own)
            self.zero.averaged_gradients[group] = [*own, torch.zeros(padding, device=self.accelerator.device)]

    def parts(self) -> list[Part]:
        frozen = {name: p for name, p in self.module.named_parameters() if name not in self.parameters}
        parts = [Part(name, 0, self._flat(parameter), replicated=True) for name, parameter in frozen.items()]
        shards = iter(self.shards)
        for group, parameters in enumerate(self.zero.params_in_partition):
            own = [(shard, shard.length) for shard in islice(shards, len(parameters))]
            parts += self._cut(self.zero.single_partition_of_fp32_groups[group], own)
        return parts

    def _refresh_parameters(self) -> None:
        self.zero.update_lp_params()

    def _shards(self) -> list[Shard]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        shards = []
        for group, parameters in enumerate(self.zero.params_in_partition):
            room, start = int(self.zero.partition_size[group]), int(self.zero.first_offset[group])
            for parameter in parameters:
                length = min(parameter.numel() - start, room)
                shards.append(self._shard(names[id(parameter)], start, length))
                room, start = room - length, 0
        return shards


class Zero3Engine(ShardedEngine):
    """Stage 3: every parameter is cut into equal parts, one per process; the last may be padded."""

    adds_up_whole = False
    needs_wrapper = True  # it gathers weights

    def backward_alone(self, loss: Tensor) -> None:
        self.model.set_gradient_accumulation_boundary(False)
        self.model.backward(loss)
        self.model.set_gradient_accumulation_boundary(True)
        self.zero.averaged_gradients = {}
        self.zero.zero_grad()

    def collect_gradient(self) -> Gradient:
        padded: list[Tensor] = []
        for group in range(len(self.zero.fp16_groups)):
            padded += [part.clone() for part in self.zero.averaged_gradients[group]]
        gradient: Gradient = [part[: shard.length] for part, shard in zip(padded, self.shards, strict=True)]
        self.zero.averaged_gradients = {}
        # A parameter that the next pass does not use would otherwise show this pass's gradient again.
        self.zero.grad_partitions_flat_buffer.zero_()
        self.zero.zero_grad()
        return gradient

    def _hand_back_filled(self, gradient: Sequence[Tensor]) -> None:
        parts = iter(gradient)
        for group, parameters in enumerate(self.zero.fp16_groups):
            self.zero.averaged_gradients[group] = [
                _padded(next(parts), parameter.partition_numel()) for parameter in parameters
            ]

    def _optimized(self) -> list[tuple[str, Tensor]]:
        # Between steps the optimizer's groups are empty here.
        groups = self.torch_optimizer.param_groups
        flat = self.zero.fp32_partitioned_groups_flat
        return [(groups[self.zero.sub_group_to_group_id[k]]["name"], tensor) for k, tensor in enumerate(flat)]

    def _shards(self) -> list[Shard]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        rank, shards = self.accelerator.process_index, []
        for parameters in self.zero.fp16_groups:
            for parameter in parameters:
                start = rank * parameter.partition_numel()
                length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
                shards.append(self._shard(names[id(parameter)], start, length))
        return shards

    def parts(self) -> list[Part]:
        rank, parts = self.accelerator.process_index, []
        parameter: Any  # with attributes of DeepSpeed's
        for name, parameter in self.module.named_parameters():
            if name not in self.parameters:
                size = parameter.partition_numel()
                length = max(0, min(size, parameter.ds_numel - rank * size))
                own = parameter.ds_tensor.detach().view(-1)[:length]
                parts.append(Part(name, rank * size, {"weight": own}, replicated=False))
        shards = iter(self.shards)
        for group, parameters in enumerate(self.zero.fp16_groups):
            own = [(next(shards), parameter.partition_numel()) for parameter in parameters]
            parts += self._cut(self.zero.fp32_partitioned_groups_flat[group], own)
        return parts

    def _refresh_parameters(self) -> None:
        kept_whole = self.zero.persistent_parameters
        if kept_whole:
            kept_whole[0].partition(kept_whole)
        for group, master in enumerate(self.zero.fp32_partitioned_groups_flat):
            shards = self.zero.fp16_partitioned_groups_flat[group]
            shards.data.copy_(master.data)
            partitions = self.zero.fp16_partitioned_groups[group]
            for partition, values in zip(partitions, self.zero.unflatten(shards, partitions), strict=True):
                partition.data = values.data
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameter)


def _padded(part: Tensor, length: int) -> Tensor:
    return part if part.numel() == length else nn.functional.pad(part, (0, length - part.numel()))
