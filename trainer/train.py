"""The training run: what every process executes, from the run folder to the last checkpoint."""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from functools import partial
from time import perf_counter

import numpy as np
import torch

from minbert.data.batch import TokenisedSplit
from minbert.data.plan import BatchPlan
from minbert.data.tokens import load_tokenizer
from minbert.trainer import checkpoint, distributed
from minbert.trainer.checkpoint import Topology, TrainingState
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.distributed import World
from minbert.trainer.engine import Engine, build_accelerator
from minbert.trainer.evaluation import evaluate
from minbert.trainer.optimizer import build_optimizer, rate_factor
from minbert.trainer.preparation import build_plan, load_split
from minbert.trainer.progress import Progress
from minbert.trainer.run_folder import RunFolder
from minbert.trainer.saved_model import build_model, save_model
from minbert.trainer.step import StepResult, TrainingStep
from minbert.trainer.stop import StopRequest
from minbert.trainer.weights import find_checkpoint, load_weights

log = logging.getLogger(__name__)


class Outcome(Enum):
    FINISHED = "finished"
    INTERRUPTED = "interrupted"  # asked to stop; everything is saved


def train(run: RunFolder) -> Outcome:
    """Train the prepared run in `run`, from its newest checkpoint if it has one. Every process calls this."""
    config = run.read_config()
    world = distributed.start(config.parallel)
    try:
        with StopRequest() as stop:
            return Training(config, run, world, stop).run()
    finally:
        distributed.stop()


class Training:
    """A run in memory: data, engine and state; `run` is the loop over steps."""

    def __init__(self, config: RunConfig, run: RunFolder, world: World, stop: StopRequest):
        self.config, self.folder, self.world, self.stop = config, run, world, stop
        tokenizer = load_tokenizer(run.encoder)
        load = partial(load_split, config, tokenizer=tokenizer)
        train_splits = {name: load(name, "train") for name in config.corpus.tasks}
        self.dev_splits: Mapping[str, TokenisedSplit] = {name: load(name, "dev") for name in config.corpus.tasks}
        self.plan = build_plan(config, train_splits)
        self.accelerator = build_accelerator(
            config, world, log_with=list(config.trackers), project_dir=str(run.trackers)
        )
        self.engine = self._build_engine()
        self.topology = Topology(world.size, config.parallel.zero_stage)
        self.training_step = TrainingStep(
            self.engine, self.plan, train_splits, world, config.batch.aggregator, config.batch.accumulation
        )
        self.state = self._restore()
        self.progress = Progress(self.total_steps, enabled=world.is_main)
        self._window = LossWindow(config.corpus.tasks, world)

    def run(self) -> Outcome:
        """Train until the budget, early stopping or a request to stop ends it."""
        if self.world.is_main:
            self.accelerator.init_trackers("metrics", _flat_strings(self.config))
        with self.progress:
            outcome = self._loop()
        self.accelerator.end_training() if self.stop.signal is None else None
        return outcome

    def _loop(self) -> Outcome:
        state, budget = self.state, self.config.budget
        while True:
            finished = state.step >= self.total_steps
            evaluation_due = state.step > state.evaluated_at and (finished or state.step % self.eval_every == 0)
            if evaluation_due:
                self._evaluate()
                finished = state.step >= self.total_steps  # the evaluation may have extended the budget
                finished |= budget.patience is not None and state.stale_evaluations >= budget.patience
            if finished or (state.step and state.step % (budget.save_every or self.eval_every) == 0):
                self._save()
            if finished:
                return Outcome.FINISHED
            self._train_one_step()
            if self.stop.agreed(self.world):
                self._save()
                return Outcome.INTERRUPTED

    def _train_one_step(self) -> None:
        state = self.state
        result = self.training_step(state.step, self._rate_factor(state.step))
        state.step += 1
        self._window.add(result)
        if state.step % self.config.log_every == 0:
            self._log({"step": state.step} | self._window.close() | {"lr": self.config.optimizer.lr * self._rate_factor(state.step - 1)})
        self.progress.advance(state.step)

    def _evaluate(self) -> None:
        """Score the dev splits, remember the best model, extend the budget if that is wanted and deserved."""
        state, budget = self.state, self.config.budget
        self.engine.eval()
        scores = evaluate(self.engine, self.dev_splits, self.world)
        self.engine.train()
        state.evaluated_at = state.step
        state.stale_evaluations += 1
        if scores["overall"] > state.best_score:
            state.best_score, state.best_step, state.stale_evaluations = scores["overall"], state.step, 0
            parameters = self.engine.full_state()
            if self.world.is_main:
                save_model(self.folder.best_model, parameters, state.step, scores)
            if budget.extend_to is not None and state.step >= self.total_steps:
                state.epochs = min(budget.extend_to, state.epochs + budget.epochs)
                self.progress.extend(self.total_steps)
        self._log({"step": state.step} | {f"dev/{name}": value for name, value in scores.items()})
        self.progress.scores(state.step, scores, best=state.stale_evaluations == 0)

    def _save(self) -> None:
        checkpoint.save(
            self.folder.checkpoints, self.engine, self.state, self.topology, self.world, self.config.budget.keep
        )

    def _log(self, record: dict[str, float]) -> None:
        if self.world.is_main:
            self.folder.append_metrics(record)
            self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def _build_engine(self) -> Engine:
        """Model and optimizer, the same on every process; then random numbers of each process's own."""
        seed_everything(self.config.seed)
        model = build_model(self.config, self.folder)
        if self.config.encoder.model != "tiny" and not checkpoint.checkpoints(self.folder.checkpoints):
            missing = load_weights(model.bert, find_checkpoint(self.config.encoder.model))
            if missing and self.world.is_main:
                log.warning("%s has no weights for %s: they start at random", self.config.encoder.model, missing)
        model.to(self.world.device)
        engine = Engine(self.accelerator, model, build_optimizer(model, self.config.optimizer), self.config.optimizer.clip)
        seed_everything(self.config.seed + 1 + self.world.rank)
        engine.train()
        return engine

    def _restore(self) -> TrainingState:
        state = checkpoint.load(self.folder.checkpoints, self.engine, self.topology, self.world)
        if state is None:
            return TrainingState(epochs=self.config.budget.epochs)
        state.epochs = max(state.epochs, self.config.budget.epochs)
        if self.world.is_main:
            self.folder.rewind_metrics(state.step)
            print(f"Resuming {self.folder.path} from step {state.step}.")
        return state

    @property
    def eval_every(self) -> int:
        return self.config.budget.eval_every or self.plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.budget.steps or max(1, round(self.state.epochs * self.plan.steps_per_epoch))

    def _rate_factor(self, step: int) -> float:
        return rate_factor(step, self.planned_steps, self.config.optimizer)

    @property
    def planned_steps(self) -> int:
        """Steps of the configured budget, which shape the learning rate; an extension goes on at its end."""
        return self.config.budget.steps or max(1, round(self.config.budget.epochs * self.plan.steps_per_epoch))


class LossWindow:
    """Means of the losses, gradient norms and token rates since the last line of the log."""

    def __init__(self, tasks: tuple[str, ...], world: World):
        self.tasks, self.world = tasks, world
        self._reset()

    def _reset(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.norms: list[float | torch.Tensor] = []
        self.tokens, self.started = 0, perf_counter()

    def add(self, result: StepResult) -> None:
        for name, loss in result.losses.items():
            self.losses[name].append(loss)
        self.norms.append(result.grad_norm)
        self.tokens += result.tokens

    def close(self) -> dict[str, float]:
        """The means over all processes; collective. Tasks without a step in the window are left out."""
        sums = [torch.stack(self.losses[name]).mean() if self.losses[name] else torch.zeros(()) for name in self.tasks]
        device = self.world.device
        totals = self.world.sum(torch.stack([value.to(device) for value in sums] + [torch.tensor(float(self.tokens), device=device)]))
        *losses, tokens = totals.tolist()
        record = {f"loss/{name}": loss for name, loss in zip(self.tasks, losses) if self.losses[name]}
        record |= {
            "grad_norm": float(np.mean([float(norm) for norm in self.norms])),
            "tokens_per_second": tokens / (perf_counter() - self.started),
        }
        self._reset()
        return record


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _flat_strings(config: RunConfig) -> dict[str, str]:
    return {name: str(value) for name, value in flatten(config).items()}
