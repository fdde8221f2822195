"""What a training step did, told without waiting for it: its numbers stay on the device until somebody reads them.

A GPU works through what the host has ordered. To look at a number of it makes the host wait until that is there, and
then the GPU until it is given something to do again. So the numbers of many steps are read together, in one copy.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minbert.trainer.surgery.conflicts import summary

if TYPE_CHECKING:
    from minbert.trainer.surgery.combination import Gramians


class StepResult:
    """What step `step` (from 0) did with `tasks`. Its properties read; what is given to it may be on any device.

    `tokens`: that this process trained on. `seconds`: that the host was busy with the step. `gramians` are there if
    the step looked at them.
    """

    def __init__(
        self, step: int, tasks: tuple[str, ...], losses: Tensor, tokens: int, gramians: "Gramians | None" = None
    ):
        """`losses` (T,): each task's mean over the global batch; behind them may stand how many processes were asked
        to stop before that was summed up."""
        self.step, self.tasks, self.tokens, self.gramians = step, tasks, tokens, gramians
        self.seconds = 0.0
        self._numbers = {"losses": losses}
        if gramians is not None:
            self._numbers["squares"] = gramians.encoder.diagonal()
        self._read: dict[str, list[float]] = {}
        self._arrived: torch.cuda.Event | None = None  # of a copy to the host, which `_numbers` then are
        self._factors: Mapping[str, float] = {}

    def weigh(self, weights: Tensor, factors: Mapping[str, float]) -> None:
        """The method's `weights` (T,) of the tasks in the update, and the configured factors."""
        self._numbers["weights"], self._factors = weights, factors

    def measure(self, grad_norm: Tensor) -> Tensor:
        """Take the gradient's norm (), before clipping. Returns whether the gradient is finite, () bool, which needs no
        look at it: where it is not, the model must not be updated, and `skipped` says so."""
        self._numbers["norm"] = grad_norm[None]
        squares = self._numbers.get("squares")
        return (grad_norm if squares is None else torch.cat([squares, grad_norm[None]])).isfinite().all()

    @property
    def losses(self) -> dict[str, float]:
        """Each task's mean over the global batch."""
        return dict(zip(self.tasks, self._values("losses")))

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self._values("norm")[0]

    @property
    def stops(self) -> bool:
        """Whether some process was asked to stop; the same on all of them."""
        return any(self._values("losses")[len(self.tasks) :])

    @property
    def weights(self) -> dict[str, float]:
        """Each task's share in the update of the encoder: the method's weight times the configured one. Empty if the
        step did not look at it."""
        weights = self._values("weights")
        return {name: weight * self._factors.get(name, 1.0) for name, weight in zip(self.tasks, weights)}

    @property
    def skipped(self) -> str | None:
        """Why the model was not updated, if so."""
        squares = self._values("squares")
        if isfinite(self.grad_norm) and all(map(isfinite, squares)):
            return None
        lost = [name for name, loss in self.losses.items() if not isfinite(loss)]
        if broken := [name for name, square in zip(self.tasks, squares) if not isfinite(square)]:
            # Sums for all tasks at once may carry one's NaN to the others, but not to their losses.
            return f"the gradient of {' and '.join([name for name in broken if name in lost] or broken)} is not finite"
        return f"the gradient is not finite{', nor the loss of ' if lost else ''}{' and '.join(lost)}"

    @property
    def measurements(self) -> dict[str, float]:
        """What the step looked at, as metrics: the tasks' weights, and how their gradients conflict."""
        record = {f"weight/{name}": weight for name, weight in self.weights.items()}
        return record if self.gramians is None else record | summary(self.tasks, self.gramians)

    def send(self) -> None:
        """Begin to bring the numbers from a GPU to the host, which goes on: for who will read them a step later."""
        numbers = torch.cat(list(self._numbers.values()))
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        self._numbers = dict(zip(self._numbers, host.split([len(part) for part in self._numbers.values()])))

    def _values(self, name: str) -> list[float]:
        if not self._read:
            read([self])
        return self._read.get(name, [])


def read(results: Iterable[StepResult]) -> None:
    """Read the numbers of all of these steps, in one copy."""
    waiting: dict[torch.device, list[tuple[StepResult, str, Tensor]]] = defaultdict(list)
    for result in results:
        if not result._read:
            if result._arrived is not None:
                result._arrived.synchronize()
            for name, tensor in result._numbers.items():
                waiting[tensor.device].append((result, name, tensor))
    for entries in waiting.values():
        values = iter(torch.cat([tensor for _, _, tensor in entries]).tolist())
        for result, name, tensor in entries:
            result._read[name] = list(islice(values, len(tensor)))
