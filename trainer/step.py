"""The training step, as the method reads: batches, one loss per task, one gradient per task, aggregate, step.

Methods that need only the losses (the plain sum, learned or random weights) take the gradient of one weighted sum, in
one backward pass. Gradient surgery takes one gradient per task, each reduced over the processes, and combines them:
these too come from one backward pass (`trainer/engine/one_backward.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.batches.plan import BatchPlan, share
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.split import TokenisedSplit
from minbert.trainer.engine.base import Engine, gradient_norm
from minbert.trainer.engine.copies import TEACHER, Decays
from minbert.trainer.engine.parts import Block, Gradient, blocks_of
from minbert.trainer.feed import Feed
from minbert.trainer.model.multitask import Objective, Targets, head_part
from minbert.trainer.model.task_gradients import covers
from minbert.trainer.objectives.distillation import TEACHERS
from minbert.trainer.objectives.supervised import supervised
from minbert.trainer.processes.random_state import stream
from minbert.trainer.processes.world import World
from minbert.trainer.result import StepResult
from minbert.trainer.surgery.combination import Gramians, combine, drop_signs, gramians
from minbert.trainer.surgery.methods import Aggregator

BatchKey = tuple[tuple[str, ...], int, int]  # tasks, step, part

_NOTHING = torch.zeros(())  # of which a sum starts; on the CPU, it adds to what is on any device


class TrainingStep:
    """Step s of the plan, carried out by all processes together."""

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        splits: Mapping[str, TokenisedSplit],
        world: World,
        aggregator: str = "sum",
        accumulation: int = 1,
        task_weights: Mapping[str, float] | None = None,
        clip: float = 0.0,
        per_layer: bool = False,
        objective: Objective = supervised,
        rates: Callable[[int], Mapping[str, float]] | None = None,
        copies: Decays | None = None,
        taught: Mapping[str, Tensor] | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        self.engine, self.plan, self.splits, self.world = engine, plan, splits, world
        self.accumulation, self.clip, self.per_layer = accumulation, clip, per_layer
        self.objective = objective
        self.rates = rates or (lambda step: engine.peak_rates)
        self.copies = copies or {}
        self.taught = taught or {}  # what teachers say of the rows of a task's training split, (n, outputs)
        self.is_asked_to_stop = is_asked_to_stop  # this process, of several
        self._targets: list[dict[str, Tensor]] = []  # of the step under way, by its parts
        for name in self.copies:
            engine.keep_copy(name)
        self.task_weights = task_weights or {}
        self.layers = engine.shared_parts
        self.in_one_backward = covers(engine.module)
        groups = max(1, len(self.layers)) if per_layer else 1
        self.aggregator = Aggregator(aggregator, len(plan.names), plan.seed, groups)
        self.feed = Feed(self._make_batch, world.device)
        self._batches: dict[BatchKey, Batch] = {}

    def __call__(self, step: int, measure: bool = False) -> StepResult:
        """Train on step `step`'s batches. `measure` asks for the Gramian though the method may not need it."""
        started = perf_counter()
        if TEACHER in self.copies:
            self._targets = self._ask_teacher(step)
        if self.aggregator.source == "losses" and not measure:
            result, gradient = self._weighted_losses(step)
        else:
            result, gradient = self._surgery(step)
        self._update(gradient, step, result)
        if self.aggregator.wants_losses_after and not result.skipped:
            self.aggregator.observe(self._losses_without_gradient(step))
        result.seconds = perf_counter() - started
        return result

    @torch.no_grad()
    def _ask_teacher(self, step: int) -> list[dict[str, Tensor]]:
        """What the teacher, without dropout, says of each part of this process's slice of the step's batches."""
        names, engine = self.plan.tasks(step), self.engine
        with engine.exchanged(TEACHER):
            engine.eval()
            said = [engine(self.batch(names, step, part)) for part in range(self.accumulation)]
            engine.train()
        return said

    def _weighted_losses(self, step: int) -> tuple[StepResult, Gradient]:
        """The gradient of the weighted sum of losses."""
        names = self.plan.tasks(step)
        weights = None if self.aggregator.name == "sum" else self._weigh_losses(step)
        totals, tokens = dict.fromkeys(names, _NOTHING), 0

        def loss(part: int) -> Tensor:
            nonlocal weights, totals, tokens
            batch = self.batch(names, step, part)
            losses = self._losses(batch, step, part)
            if weights is None and self.aggregator.name != "sum":  # one part: its losses are the step's
                weights = self._agree(self.aggregator.from_losses(self._global(losses).cpu(), step))
            totals = {name: totals[name] + losses[name].detach() for name in names}
            tokens += batch.tokens
            return sum((losses[name] * self._weight(weights, name) for name in names), _NOTHING)

        gradient = self._gradient(step, names, loss)
        result = StepResult(step, names, self._global(totals, asks=True), tokens)
        shares = torch.ones(len(names), dtype=torch.float64) if weights is None else weights
        result.weigh(shares, self.task_weights)
        return result, gradient

    def _surgery(self, step: int) -> tuple[StepResult, Gradient]:
        """One gradient per task, and their combination."""
        names = self.plan.tasks(step)
        totals, tokens = dict.fromkeys(names, _NOTHING), 0

        def losses_of(part: int, names: tuple[str, ...] = names) -> dict[str, Tensor]:
            nonlocal totals, tokens
            batch = self.batch(names, step, part)
            found = self._losses(batch, step, part)
            totals = totals | {name: totals[name] + found[name].detach() for name in names}
            tokens += batch.tokens
            return {name: found[name] * self.task_weights.get(name, 1.0) for name in names}

        blocks = self._task_gradients(step, names, losses_of)
        losses = self._global(totals, asks=True)
        products = gramians(self.engine, blocks, self.layers, len(names))
        result = StepResult(step, names, losses, tokens, products)
        if self.aggregator.source == "coordinates":
            return result, drop_signs(self.engine.shards, blocks, stream(self.plan.seed, "graddrop", step))
        weights = self._agree(self._weights(products, losses[: len(names)], step))
        by_layer = weights if weights.ndim == 2 else weights.expand(len(self.layers), -1)
        heads = torch.ones(len(names))  # surgery is for what the tasks share
        if self.aggregator.source == "losses":
            heads = weights
        rates = self._rates(step)
        trained = [index for index, layer in enumerate(self.layers) if rates.get(layer)]
        mean = weights if weights.ndim == 1 else weights[trained or ...].mean(0)
        result.weigh(mean, self.task_weights)
        of_rows = dict(zip(self.layers, by_layer.float()))
        of_rows |= {head_part(name): weight[None] for name, weight in zip(names, heads)}
        return result, combine(self.engine.shards, blocks, of_rows)

    def _gradient(self, step: int, names: tuple[str, ...], loss: Callable[[int], Tensor]) -> Gradient:
        """The gradient of one loss. Between processes it goes the way of the tasks' gradients, part by part while the
        backward pass runs; DeepSpeed's own reduction comes after that."""
        if self.world.size == 1 or not self.in_one_backward:
            return self._gradients(step, [loss])[0]
        blocks = self._blocks(step, [names], lambda part: {"sum": loss(part)})
        return combine(self.engine.shards, blocks, {block.part: torch.ones(1) for block in blocks})

    def _task_gradients(
        self, step: int, names: tuple[str, ...], losses: Callable[..., Mapping[str, Tensor]]
    ) -> list[Block]:
        """The gradients of the tasks' losses: in one backward pass, or in one for each task, which is the reference."""
        if self.in_one_backward:
            return self._blocks(step, [(name,) for name in names], losses)

        def alone(name: str, part: int) -> Tensor:
            return losses(part, (name,))[name]

        found = self._gradients(step, [partial(alone, name) for name in names])
        return blocks_of(self.engine.shards, found, [head_part(name) for name in names])

    def _blocks(
        self, step: int, groups: Sequence[tuple[str, ...]], losses: Callable[[int], Mapping[str, Tensor]]
    ) -> list[Block]:
        """The gradients of the losses of groups of tasks, from one backward pass."""
        rates = self._rates(step)
        self.engine.fix_below(rates)
        trained = [part for part, rate in rates.items() if rate]
        return self.engine.task_gradients(groups, losses, self.accumulation, trained)

    def _rates(self, step: int) -> dict[str, float]:
        """The learning rates of the parts that the step trains; other tasks' heads have none."""
        heads = {head_part(name) for name in self.plan.tasks(step)}
        return {part: rate for part, rate in self.rates(step).items() if part in self.layers or part in heads}

    def _gradients(self, step: int, losses: Sequence[Callable[[int], Tensor]]) -> list[Gradient]:
        """The gradient of each loss, a function of the part of the batch, without the parts of the model that are
        frozen at this step: they have no say in surgery, nor in the norm."""
        rates, shards = self._rates(step), self.engine.shards
        self.engine.fix_below(rates)
        found = self.engine.gradients(losses, self.accumulation)
        return [[part if rates.get(shard.part) else None for shard, part in zip(shards, each)] for each in found]

    def _weights(self, products: Gramians, losses: Tensor, step: int) -> Tensor:
        """Weights (T,), or (L, T) with surgery per layer."""
        if len(losses) == 1 or self.aggregator.name == "sum":
            return torch.ones(len(losses), dtype=torch.float64)
        if self.aggregator.source == "losses":
            return self.aggregator.from_losses(losses.cpu(), step)
        if not self.layers:  # a frozen encoder: the tasks share nothing
            return torch.ones(len(losses), dtype=torch.float64)
        return self.aggregator.from_gramian(products.by_layer if self.per_layer else products.encoder, step)

    def _update(self, gradient: Gradient, step: int, result: StepResult) -> None:
        """Clip, step, and let the copies of the weights follow. A gradient that is not finite leaves all of them as
        they are, without the host's knowing; `result` tells who asks."""
        norm = gradient_norm(self.engine, gradient)
        finite = result.measure(norm)
        if self.clip:
            self._clip(gradient, norm)
        self.engine.update(gradient, self._rates(step), finite)
        for name, decay in self.copies.items():
            self.engine.move_copy(name, decay(step), finite)

    def _clip(self, gradient: Gradient, norm: Tensor) -> None:
        # On a CPU it costs nothing to look, and something to multiply by one.
        if norm.device.type != "cpu" or norm > self.clip:
            scale = torch.where(norm > self.clip, self.clip / (norm + 1e-6), 1.0)
            torch._foreach_mul_([part for part in gradient if part is not None], scale)

    def batch(self, names: tuple[str, ...], step: int, part: int) -> Batch:
        """This process's slice of part `part` of the tasks' batches of the step, of which it keeps those it has."""
        key = names, step, part
        if key not in self._batches:
            self._batches = {other: batch for other, batch in self._batches.items() if other[1] == step}
            self._batches[key] = self.feed(key, self._following(*key))
        return self._batches[key]

    def _following(self, names: tuple[str, ...], step: int, part: int) -> Iterator[BatchKey]:
        """What is asked for after that: the other parts, then the other tasks where each has a batch of its own, and
        the next steps alike."""
        while True:
            tasks = self.plan.tasks(step)
            together = names == tasks
            if part + 1 < self.accumulation:
                part += 1
            elif not together and names[0] != tasks[-1]:
                names, part = (tasks[tasks.index(names[0]) + 1],), 0
            else:
                step, part = step + 1, 0
                names = self.plan.tasks(step)[: None if together else 1]
            yield names, step, part

    def _make_batch(self, key: BatchKey) -> Batch:
        names, step, part = key
        portions = {}
        for name in names:
            rows = self.plan.rows(name, step)
            places = share(share(np.arange(len(rows)), part, self.accumulation), self.world.rank, self.world.size)
            size = self.splits[name].total(rows, Draw(self.plan.seed, name, step, np.arange(len(rows))))
            portions[name] = Portion(rows[places], places, size)
        return make_batch(self.splits, portions, draw=(self.plan.seed, step))

    def _losses(self, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
        """This process's part of each task's mean loss over the global batch."""
        losses = self.engine(batch, self.objective, step, self.said(batch, step, part))
        return {name: torch.dot(losses[name], part.weights) / part.global_size for name, part in batch.tasks.items()}

    def said(self, batch: Batch, step: int, part: int) -> Targets:
        """What teachers say of the examples of a part of this process's slice."""
        said: dict[str, Mapping[str, Tensor]] = {}
        if self._targets:
            said[TEACHER] = self._targets[part]
        if self.taught:
            known = [name for name in batch.tasks if name in self.taught]
            said[TEACHERS] = {name: self.taught[name][batch.tasks[name].numbers] for name in known}
        return said

    def _weigh_losses(self, step: int) -> Tensor | None:
        """The weights of an accumulated step, whose losses must be known before the first part's backward pass."""
        if self.accumulation == 1:
            return None
        return self._agree(self.aggregator.from_losses(self._losses_without_gradient(step), step))

    @torch.no_grad()
    def _losses_without_gradient(self, step: int) -> Tensor:
        names = self.plan.tasks(step)
        totals = dict.fromkeys(names, _NOTHING)
        for part in range(self.accumulation):
            losses = self._losses(self.batch(names, step, part), step, part)
            totals = {name: totals[name] + losses[name] for name in names}
        return self._global(totals).cpu()

    def _global(self, losses: Mapping[str, Tensor], asks: bool = False) -> Tensor:
        """The tasks' losses (T,) over all processes, float64; of several that are `asks`ed, and then how many of them
        are to stop (T + 1,): that goes along with what must be summed up anyway."""
        values = torch.stack([loss.detach() for loss in losses.values()]).double()
        if asks and self.world.size > 1:
            values = torch.cat([values, values.new_full((1,), self.is_asked_to_stop())])
        return self.world.sum(values)

    def _weight(self, weights: Tensor | None, name: str) -> float:
        own = 1.0 if weights is None else float(weights[self.plan.names.index(name)])
        return own * self.task_weights.get(name, 1.0)

    def _agree(self, weights: Tensor) -> Tensor:
        """Rank 0's weights: solvers on other machines may differ in the last digit, and the model must not."""
        if self.world.size == 1:
            return weights
        agreed = weights.to(self.world.device)
        torch.distributed.broadcast(agreed, src=0)
        return agreed.to(weights.device)
