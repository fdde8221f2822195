"""DeepSpeed ZeRO: where its optimizers keep the reduced gradient of a backward pass, and how to hand one back.

At the accumulation boundary the optimizer holds this process's averaged shards in `averaged_gradients` (parameter
group -> list of tensors). Taking them out and clearing what else remembers the pass lets the next task's backward
start afresh; handing a combination back and stepping the engine updates with it. No full gradient is ever gathered.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from minbert.trainer.engine import Engine, Gradient, Shard
from minbert.trainer.optimizer import set_rate


class DeepSpeedEngine(Engine):
    """What all stages have in common."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.backward(loss)  # accelerator.backward would step the engine, too

    def _step(self) -> None:
        self.model.step()


class ZeroStage0Engine(DeepSpeedEngine):
    """Stage 0 shards nothing: gradients lie at the parameters, as in plain PyTorch."""


class ShardedEngine(DeepSpeedEngine):
    """Stages 1 to 3, whose optimizer holds the gradient in shards."""

    is_sharded = True

    @property
    def zero(self) -> Any:
        return self.model.optimizer


class ZeroEngine(ShardedEngine):
    """Stages 1 and 2: a parameter group is one flat vector, and each process owns a contiguous part of it."""

    def take(self) -> Gradient:
        gradient: Gradient = []
        for group, parameters in enumerate(self.zero.params_in_partition):
            # What follows the parameters' parts is padding.
            gradient += self.zero.averaged_gradients[group][: len(parameters)]
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None
        self.zero.zero_grad()
        self.zero.micro_step_id = -1  # the next pass starts a sum of its own
        return gradient

    def update(self, gradient: Gradient, rate_factor: float) -> None:
        set_rate(self.optimizer, rate_factor)
        parts = iter(gradient)
        for group, parameters in enumerate(self.zero.params_in_partition):
            own = [next(parts) for _ in parameters]
            padding = int(self.zero.partition_size[group]) - sum(part.numel() for part in own)
            self.zero.averaged_gradients[group] = [*own, torch.zeros(padding, device=self.accelerator.device)]
        self._step()

    def _shards(self) -> list[Shard]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        shards = []
        for group, parameters in enumerate(self.zero.params_in_partition):
            room, start = int(self.zero.partition_size[group]), int(self.zero.first_offset[group])
            for parameter in parameters:
                length = min(parameter.numel() - start, room)
                shards.append(Shard(names[id(parameter)], start, length))
                room, start = room - length, 0
        return shards


class Zero3Engine(ShardedEngine):
    """Stage 3: every parameter is cut into equal parts, one per process; the last may be padded."""

    def take(self) -> Gradient:
        gradient: Gradient = []
        for group in range(len(self.zero.fp16_groups)):
            gradient += [part.clone() for part in self.zero.averaged_gradients[group]]
        gradient = [part[: shard.length] for part, shard in zip(gradient, self.shards, strict=True)]
        self.zero.averaged_gradients = {}
        # A parameter that the next pass does not use would otherwise show this pass's gradient again.
        self.zero.grad_partitions_flat_buffer.zero_()
        self.zero.zero_grad()
        return gradient

    def update(self, gradient: Gradient, rate_factor: float) -> None:
        set_rate(self.optimizer, rate_factor)
        parts = iter(gradient)
        for group, parameters in enumerate(self.zero.fp16_groups):
            self.zero.averaged_gradients[group] = [
                _padded(next(parts), parameter.partition_numel()) for parameter in parameters
            ]
        self._step()

    def _shards(self) -> list[Shard]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        rank, shards = self.accelerator.process_index, []
        for parameters in self.zero.fp16_groups:
            for parameter in parameters:
                start = rank * parameter.partition_numel()
                length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
                shards.append(Shard(names[id(parameter)], start, length))
        return shards

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameter)


def _padded(part: Tensor, length: int) -> Tensor:
    return part if part.numel() == length else nn.functional.pad(part, (0, length - part.numel()))
