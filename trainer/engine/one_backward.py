"""The gradients of all tasks, or of their sum, from one forward and one backward pass, reduced over the processes while
that runs.

What layers hand over goes into one block for each part of the model (`minbert.trainer.model.task_gradients`). As soon
as a part is complete, its block is summed over the processes: whole where every process holds whole gradients, else
each process's coordinates to that process alone. So under ZeRO 1 to 3 no process ever holds whole gradients of more
than the parts that the backward pass is at (but for stage 1, between the parts of an accumulated batch, which are
summed once); and no process group, hook or bucket of DDP's or DeepSpeed's has a part in it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from minbert.trainer.engine.parts import Block, padded
from minbert.trainer.model.multitask import head_part
from minbert.trainer.model.task_gradients import Place, TaskGradients

if TYPE_CHECKING:
    from minbert.trainer.engine.base import Engine


class OneBackward:
    """Where an engine's gradients per task lie, and how they come together."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self.at_once = engine.accelerator.device.type != "cpu"
        self.widths: dict[str, int] = {}
        self.places: dict[int, Place] = {}
        columns: dict[str, tuple[str, int]] = {}  # where each parameter begins
        shapes = engine.shapes
        for name, parameter in engine.parameters.items():
            part, shape = engine.part_of[name], torch.Size(shapes[name])
            columns[name] = part, self.widths.get(part, 0)
            self.places[id(parameter)] = Place(*columns[name], shape, part in engine.shared_parts)
            self.widths[part] = columns[name][1] + shape.numel()
        self._owned = self._ranges(columns) if engine.is_sharded else {}
        self._kept: dict[str, Tensor] = {}  # blocks, from step to step: fresh memory costs a CPU more than the products
        self._works: list[Any] = []
        self._received: list[tuple[str, Tensor]] = []  # what is added to the shares when the works are done
        self._shares: dict[str, Tensor] = {}

    def __call__(
        self,
        groups: Sequence[Collection[str]],
        losses: Callable[[int], Mapping[str, Tensor]],
        parts: int,
        trained: Collection[str],
    ) -> list[Block]:
        """The blocks of the parts that are `trained`, without those of other tasks' heads, in the order of the shards:
        a row for each of the groups of tasks, whose gradient is that of the sum of their losses.

        A loss is the sum over `parts` of what `losses` makes of each, in forward passes of the model over a batch of
        all the groups' tasks, and over the processes.
        """
        engine, heads = self.engine, {head_part(name) for group in groups for name in group}
        wanted = [p for p in self.widths if p in trained and (p in engine.shared_parts or p in heads)]
        places = {key: place if place.part in wanted else None for key, place in self.places.items()}
        counts = {part: len(groups) if part in engine.shared_parts else 1 for part in wanted}
        self._shares = {}

        def memory(part: str) -> Tensor:
            return self._memory(part, counts[part])

        recorder = TaskGradients(groups, places, wanted[::-1], memory, self.at_once)

        def complete(part: str, block: Tensor) -> None:
            if engine.adds_up_whole and not last:
                return
            if engine.is_sharded:
                self._distribute(part, block)
                recorder.forget(part)
            else:
                self._shares[part] = block
                if engine.accelerator.num_processes > 1:
                    self._works.append(dist.all_reduce(block, async_op=True))

        for number in range(parts):
            last = number == parts - 1
            with engine.unwrapped():
                with recorder.recording(complete):
                    total = torch.stack(list(losses(number).values())).sum()
                engine.backward_alone(total)
            recorder.finish()
        self._wait()
        return self._blocks()

    def _memory(self, part: str, count: int) -> Tensor:
        device, width = self.engine.accelerator.device, self.widths[part]
        if self.engine.is_sharded:
            return torch.empty(count, width, device=device)
        if part not in self._kept or len(self._kept[part]) < count:
            self._kept[part] = torch.zeros(count, padded(width), device=device)
        return self._kept[part][:count]

    def _distribute(self, part: str, block: Tensor) -> None:
        """Add the sum over the processes of this process's coordinates to its share."""
        self._wait()
        processes, own = self.engine.accelerator.num_processes, self.engine.accelerator.process_index
        pieces = []
        for ranges in self._owned[part]:
            width = sum(stop - start for start, stop in ranges)
            empty = block.new_zeros(len(block), padded(width) - width)
            pieces.append(torch.cat([*(block[:, start:stop] for start, stop in ranges), empty], dim=1))
        # Straight to their owners: gloo's reduction to one process takes more than twice as long.
        others = [process for process in range(processes) if process != own]
        calls = [dist.P2POp(dist.isend, pieces[process], process) for process in others if pieces[process].numel()]
        received = [torch.empty_like(pieces[own]) for _ in others if pieces[own].numel()]
        calls += [dist.P2POp(dist.irecv, *of) for of in zip(received, others)]
        self._works = dist.batch_isend_irecv(calls) if calls else []
        self._received = [(part, piece) for piece in [pieces[own], *received]]

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        for part, piece in self._received:
            self._shares[part] = self._shares[part].add_(piece) if part in self._shares else piece
        self._works, self._received = [], []

    def _blocks(self) -> list[Block]:
        blocks, last = list[Block](), 0
        for part, shards in groupby(self.engine.shards, key=lambda shard: shard.part):
            first, last = last, last + len(list(shards))
            if part in self._shares:
                blocks.append(Block(part, self._shares[part], first, last, part in self.engine.shared_parts))
        self._shares = {}
        return blocks

    def _ranges(self, columns: Mapping[str, tuple[str, int]]) -> dict[str, list[list[tuple[int, int]]]]:
        """For each part and process the columns that are the process's, in the order of its shards. Collective."""
        own = [(shard.name, shard.start, shard.length) for shard in self.engine.shards]
        everyones = [own]
        if self.engine.accelerator.num_processes > 1:
            everyones = [own] * self.engine.accelerator.num_processes
            dist.all_gather_object(everyones, own)
        found: dict[str, list[list[tuple[int, int]]]] = {part: [[] for _ in everyones] for part in self.widths}
        for process, shards in enumerate(everyones):
            for name, start, length in shards:
                part, column = columns[name]
                if length:
                    found[part][process].append((column + start, column + start + length))
        return found
