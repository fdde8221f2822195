"""The training step, as the method reads: batches, one loss per task, their aggregate, its gradient, one update."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert.data.batch import Batch, TokenisedSplit, make_batch
from minbert.data.plan import BatchPlan, share
from minbert.trainer.aggregation import AGGREGATORS
from minbert.trainer.distributed import World
from minbert.trainer.engine import Engine
from minbert.trainer.model import example_losses


@dataclass(frozen=True)
class StepResult:
    """Losses per task (means over the global batch, still on the device and this process's part of them only),
    gradient norm before clipping, tokens that this process handled."""

    losses: dict[str, Tensor]
    grad_norm: float | Tensor
    tokens: int


class TrainingStep:
    """Step s of the plan, carried out by all processes together."""

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        splits: Mapping[str, TokenisedSplit],
        world: World,
        aggregator: str,
        accumulation: int,
    ):
        self.engine, self.plan, self.splits, self.world = engine, plan, splits, world
        self.aggregate, self.accumulation = AGGREGATORS[aggregator], accumulation

    def __call__(self, step: int, rate_factor: float) -> StepResult:
        totals: dict[str, Tensor] = {}
        tokens = 0
        for batches, last in self.batches(step):
            with self.engine.accumulating(last):
                outputs = self.engine(batches)
                losses = {name: self._loss(name, outputs[name], batch) for name, batch in batches.items()}
                # Processes average their gradients; what they hold are parts of a sum.
                self.engine.backward(self.aggregate(losses) * self.world.size, last)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.detach()
            tokens += sum(len(batch.sentences.input_ids) for batch in batches.values())
        return StepResult(totals, self.engine.step(rate_factor), tokens)

    def batches(self, step: int) -> Iterator[tuple[dict[str, Batch], bool]]:
        """This process's slices of the step's batches, in `accumulation` parts; and whether a part is the last."""
        rows = {name: self.plan.rows(name, step) for name in self.plan.tasks(step)}
        for part in range(self.accumulation):
            batches = {}
            for name, all_rows in rows.items():
                mine = share(share(all_rows, part, self.accumulation), self.world.rank, self.world.size)
                batches[name] = make_batch(self.splits[name], mine, len(all_rows)).to(self.world.device)
            yield batches, part == self.accumulation - 1

    def _loss(self, name: str, outputs: Tensor, batch: Batch) -> Tensor:
        """This process's part of the mean loss over the global batch."""
        losses = example_losses(self.engine.module.tasks[name], outputs, batch.labels)
        return torch.dot(losses, batch.weights) / batch.global_size
