"""Every task's own gradient from one backward pass.

Every row of a batch's matrix of tokens belongs to one task, and all that the model does but attention it does row by
row. So the gradient of the sum of the tasks' losses with respect to what a layer gave, dY, holds each task's own in
that task's rows, and the tasks' gradients of a weight are products of slices: dW_t = dY_t' X_t. Together they are the
arithmetic of the plain sum's dW.

While a `TaskGradients` is recording, the layers of `tokenwise` hand it these products in the place of a gradient: what
autograd knows of then leads to activations only, and no hook at a weight (DDP's, DeepSpeed's) fires.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.trainer.model.linear import multiply

TOGETHER = 1 << 24  # values of a sum that can wait for others; of more, the traffic costs what the call does not


class PerTask:
    """A module whose own parameters' gradients, in its forward pass, are a recording's to take if there is one."""


def covers(model: nn.Module) -> bool:
    """Whether one backward pass can tell the tasks' gradients of all that is trained of a model."""
    return all(
        isinstance(module, PerTask) or not any(p.requires_grad for p in module.parameters(recurse=False))
        for module in model.modules()
    )


@dataclass(frozen=True)
class Place:
    """Where a parameter's gradients lie: in the block of its part, from column `start` on. A head's has one row, that
    of its task, and others have one for each of the tasks."""

    part: str
    start: int
    shape: torch.Size
    is_shared: bool


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a matrix are: `counts[k]` consecutive ones are of the group of tasks number `tasks[k]`."""

    tasks: tuple[int, ...]
    counts: tuple[int, ...]
    ends: Tensor | None = None  # (tasks,) int32 on the device, the row behind each task's last

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        found, first = [], 0
        for task, count in zip(self.tasks, self.counts, strict=True):
            if count:
                found.append((task, slice(first, first + count)))
            first += count
        return found

    @cached_property
    def task(self) -> Tensor:
        """(N,) int64, for each row which of `tasks` it belongs to."""
        assert self.ends is not None
        places = torch.arange(sum(self.counts), device=self.ends.device)
        return torch.bucketize(places, self.ends, right=True)

    @cached_property
    def indicator(self) -> Tensor:
        """(tasks, N) fp32, 1 where a row is a task's."""
        return (self.task == torch.arange(len(self.tasks), device=self.task.device)[:, None]).float()


class TaskGradients:
    """The gradients of T groups of tasks, as layers hand them over in backward passes: a block (T, width) for each part
    of the model, or (1, width) for a head. Mostly a group is one task; the gradient of a sum is that of one group.

    `places` says where those of a trained parameter (by its id) go; None: they aren't wanted. `memory` gives the block
    of a part, of any content but beyond its parameters.

    `at_once`: as few operations as possible, each for all tasks at once, as a GPU wants them; else one for each task,
    which on a CPU costs no more.
    """

    def __init__(
        self,
        groups: Sequence[Collection[str]],
        places: Mapping[int, Place | None],
        parts: Sequence[str],
        memory: Callable[[str], Tensor],
        at_once: bool,
    ):
        self.count, self.group = len(groups), {name: number for number, group in enumerate(groups) for name in group}
        self.places, self.parts, self.memory, self.at_once = places, parts, memory, at_once
        self._of_part = {part: [p for p in places.values() if p is not None and p.part == part] for part in parts}
        self.rows: Rows | None = None  # of the matrices that the model works on at present
        # Without it a layer whose input has no gradient would have none itself.
        self.anchor = torch.zeros((), requires_grad=True)
        self._blocks: dict[str, Tensor] = {}
        self._written: set[tuple[Place, int]] = set()
        self._unsummed: list[tuple[Place, Tensor, Rows]] = []  # to be summed together, and
        self._found: list[tuple[Tensor, Tensor, bool]] = []  # targets, what goes there, and whether nothing else has
        self._awaited: dict[str, int] = {}
        self._next = 0

    # --- the passes ---

    @contextmanager
    def recording(self, complete: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, forward passes are made whose backward pass is recorded.

        `complete` is called with each of `parts` and its block, always in their order, as soon as nothing more can come
        for it in this backward pass, and at the latest by `finish`.
        """
        global _recording
        assert _recording is None
        self._complete, self._next, self._awaited = complete, 0, {}
        _recording = self
        try:
            yield
        finally:
            _recording = None

    def finish(self) -> None:
        """Complete the parts that the backward pass has not."""
        self._awaited = {}
        self._go_on()

    def forget(self, part: str) -> None:
        """Begin anew with what comes for a part, in another block."""
        self._blocks.pop(part, None)
        self._written -= {(place, row) for place, row in self._written if place.part == part}

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """In a forward pass: each of these will be handed something."""
        for place in filter(None, (self._place(parameter) for parameter in parameters)):
            self._awaited[place.part] = self._awaited.get(place.part, 0) + 1

    def done(self, *parameters: nn.Parameter | None) -> None:
        for place in filter(None, (self._place(parameter) for parameter in parameters)):
            self._awaited[place.part] -= 1
            if not self._awaited[place.part]:
                self._go_on()

    def _go_on(self) -> None:
        while self._next < len(self.parts) and not self._awaited.get(self.parts[self._next]):
            part = self.parts[self._next]
            self._next += 1
            self._complete(part, self._filled(part))

    # --- what layers hand over ---

    def products(self, parameter: nn.Parameter, dy: Tensor, x: Tensor, rows: Rows) -> None:
        """dY_t' X_t, of (N, out) and (N, in)."""
        place = self._place(parameter)
        if place is None:
            return
        aligned = not (dy.shape[1] % 8 or x.shape[1] % 8)
        several = self.count > 1 and self._at_once(place, rows)
        if several and dy.dtype == torch.bfloat16 and aligned and _has_grouped_products(dy.device):
            # The last group may end with the matrix: "less" in the documentation is "at most" in PyTorch's own tests.
            self._add(place, F.grouped_mm(dy.contiguous().T, x.contiguous(), offs=rows.ends))
            return
        for task, own in rows.slices:
            if self.at_once and dy.dtype == torch.float32:
                target, first = self._claim(place, task)
                torch.addmm(target, dy[own].T, x[own], beta=0 if first else 1, out=target)
            else:
                self._put(place, task, multiply(dy[own].T, x[own].T))

    def take(self, parameter: nn.Parameter, gradient: Tensor, rows: Rows) -> None:
        """A gradient to which all rows, of one task, contribute."""
        (task,) = rows.tasks
        self._put(self._place(parameter), task, gradient)

    def sums(self, parameter: nn.Parameter | None, values: Tensor, rows: Rows) -> None:
        """The sum (n,) over each task's rows of (N, n)."""
        place = self._place(parameter)
        if place is None:
            return
        if self._at_once(place, rows):
            self._unsummed.append((place, values, rows))
            if values.numel() > TOGETHER:
                self._sum()
            return
        for task, own in rows.slices:
            target, first = self._claim(place, task)
            if first:
                torch.sum(values[own], 0, dtype=torch.float32, out=target)
            else:
                target.add_(values[own].sum(0, dtype=torch.float32))

    def lookups(self, parameter: nn.Parameter, dy: Tensor, ids: Tensor, padding: int | None, rows: Rows) -> None:
        """The sum of each task's rows of (N, n) that have an id (N,), by ids; but not of id `padding`."""
        place = self._place(parameter)
        if place is None:
            return
        if padding is not None:
            dy = dy.masked_fill((ids == padding)[:, None], 0.0)
        if self._at_once(place, rows):
            target, first = self._claim(place, None)
            if first:
                target.zero_()
            target.index_put_((rows.task, ids), dy.float(), accumulate=True)
            return
        for task, own in rows.slices:
            target, first = self._claim(place, task)
            if first:
                target.zero_()
            target.index_add_(0, ids[own], dy[own].float())

    def norms(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        rows: Rows,
    ) -> None:
        """Of a layer norm of (N, n), whose means and inverse deviations are (N, 1)."""
        place = self._place(weight)
        if place is None:
            return
        if self._at_once(place, rows):
            self.sums(weight, torch.native_layer_norm(x, weight.shape, None, None, eps)[0].mul_(dy), rows)
            self.sums(bias, dy, rows)
            return
        for task, own in rows.slices:
            arguments = dy[own], x[own], list(weight.shape), mean[own], rstd[own], weight, bias
            _, dw, db = torch.ops.aten.native_layer_norm_backward(*arguments, [False, True, True])
            self._put(place, task, dw)
            self._put(self._place(bias), task, db)

    # --- where it goes ---

    def _place(self, parameter: nn.Parameter | None) -> Place | None:
        return None if parameter is None else self.places.get(id(parameter))

    def _at_once(self, place: Place, rows: Rows) -> bool:
        """Whether one operation may do for all tasks."""
        return self.at_once and place.is_shared and rows.ends is not None and len(rows.tasks) == self.count

    def _sum(self) -> None:
        """The sums that wait, of as many as have the same rows in one product."""
        while self._unsummed:
            rows = self._unsummed[0][2]
            places, values, _ = zip(*(each for each in self._unsummed if each[2] is rows))
            self._unsummed = [each for each in self._unsummed if each[2] is not rows]
            found = rows.indicator @ (torch.cat(values, dim=1) if len(values) > 1 else values[0]).float()
            for place, sums in zip(places, found.split([each.shape[1] for each in values], dim=1)):
                self._add(place, sums)

    def _add(self, place: Place, found: Tensor) -> None:
        """All tasks' (T, ...) to a parameter's gradient, when the next are written down."""
        target, first = self._claim(place, None)
        self._found.append((target, found, first))

    def _put(self, place: Place | None, task: int, gradient: Tensor) -> None:
        if place is not None:
            target, first = self._claim(place, task)
            target.copy_(gradient) if first else target.add_(gradient)

    def _claim(self, place: Place, task: int | None) -> tuple[Tensor, bool]:
        """A parameter's gradient of a task, or (T, ...) those of all, and whether nothing is there yet."""
        if self._found and any((place, row) in self._written for row in range(self.count)):
            self._write()
        columns = self._block(place.part)[:, place.start : place.start + place.shape.numel()]
        if task is None:
            every = {(place, row) for row in range(len(columns))}
            missing, first = every - self._written, not every & self._written
            if not first:
                for _, row in missing:
                    columns[row].zero_()
            self._written |= every
            return columns.unflatten(1, place.shape), first
        row = task if place.is_shared else 0
        first = (place, row) not in self._written
        self._written.add((place, row))
        return columns[row].view(place.shape), first

    def _write(self) -> None:
        """What was found, into the blocks. A GPU takes together what is dense, as rows are, and of one type."""
        pairs: dict[tuple[bool, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for target, found, first in self._found:
            pairs.setdefault((first, found.dtype), []).extend(zip(target, found))
        self._found = []
        for (first, _), some in pairs.items():
            targets, rows = map(list, zip(*some))
            (torch._foreach_copy_ if first else torch._foreach_add_)(targets, rows)

    def _block(self, part: str) -> Tensor:
        if part not in self._blocks:
            self._blocks[part] = self.memory(part)
        return self._blocks[part]

    def _filled(self, part: str) -> Tensor:
        """A part's block, with zeros where nothing came."""
        self._sum()
        self._write()
        block = self._block(part)
        for place in self._of_part[part]:
            for row in range(len(block)):
                if (place, row) not in self._written:
                    self._written.add((place, row))
                    block[row, place.start : place.start + place.shape.numel()].zero_()
        return block


@cache
def _has_grouped_products(device: torch.device) -> bool:
    """Whether it multiplies groups in one call: GPUs before Ampere do not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


_recording: TaskGradients | None = None


def recording_of(parameter: Tensor) -> TaskGradients | None:
    """Who takes the gradients of a parameter at present; None: autograd does."""
    if _recording is None or not parameter.requires_grad or not torch.is_grad_enabled():
        return None
    if _recording.rows is None:
        raise RuntimeError("a layer was called whose rows nobody told apart by task: call it from within `Forward`")
    return _recording


@contextmanager
def rows_of(tasks: Mapping[str, int], ends: Tensor | None = None) -> Iterator[None]:
    """Inside, the model works on matrices that have so many rows of each task, one task after the other. `ends`: the
    same on the device, if it is there: (tasks,) int32, the row behind each task's last."""
    if _recording is None:
        yield
        return
    before, numbers, counts = _recording.rows, tuple(_recording.group[name] for name in tasks), tuple(tasks.values())
    if len(set(numbers)) == 1:
        numbers, counts, ends = numbers[:1], (sum(counts),), None if ends is None else ends[-1:]
    _recording.rows = Rows(numbers, counts, ends)
    try:
        yield
    finally:
        _recording.rows = before
