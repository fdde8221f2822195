"""Engine and step of a run, built from its configuration and its folder, the same on every process."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from minbert.data.batches.plan import BatchPlan
from minbert.data.sequences.split import TokenisedSplit
from minbert.trainer.config import RunConfig
from minbert.trainer.engine.base import Engine, build_accelerator, build_engine
from minbert.trainer.engine.copies import copies_of
from minbert.trainer.engine.optimizer import build_optimizer, rates
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.model.weights import find_checkpoint, load_weights
from minbert.trainer.objectives.choice import build_objective
from minbert.trainer.processes.random_state import seed_everything, stream
from minbert.trainer.processes.world import World
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import build_model
from minbert.trainer.step import TrainingStep

log = logging.getLogger(__name__)


def assemble_engine(config: RunConfig, run: RunFolder, world: World, pretrained: bool) -> Engine:
    """Model and optimizer, in training mode; then random numbers of each process's own.

    `pretrained`: whether to load the weights that the configuration names, which a checkpoint would replace.
    """
    with _prints_to_log():
        accelerator = build_accelerator(config, world, log_with=list(config.trackers), project_dir=str(run.trackers))
        seed_everything(stream(config.seed, "weights"))
        model = build_model(config, run)
        if pretrained and config.encoder.model != "tiny":
            _load_pretrained(model, config, world)
        model.to(world.device)
        engine = build_engine(accelerator, model, build_optimizer(model, config.optimizer))
    seed_everything(stream(config.seed, "dropout", world.rank))
    engine.train()
    return engine


def assemble_step(
    config: RunConfig,
    engine: Engine,
    plan: BatchPlan,
    splits: Mapping[str, TokenisedSplit],
    world: World,
    taught: Mapping[str, Tensor] | None = None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> TrainingStep:
    """The training step over the plan's batches of the training splits, with what teachers say of their rows."""
    planned = Budget(config.budget, plan.steps_per_epoch).planned_steps
    step = TrainingStep(
        engine,
        plan,
        splits,
        world,
        aggregator=config.batch.aggregator,
        accumulation=config.batch.accumulation,
        task_weights=dict(zip(config.corpus.names, config.batch.task_weights or ())),
        clip=config.optimizer.clip,
        per_layer=config.batch.surgery_scope == "layer",
        rates=lambda step: rates(step, planned, config.optimizer, engine.peak_rates),
        objective=build_objective(config, planned),
        copies=copies_of(config, planned),
        taught=taught,
        is_asked_to_stop=is_asked_to_stop,
    )
    if not step.layers and step.aggregator.source != "losses":
        log.warning("the encoder is frozen, so the tasks share nothing: %s is a plain sum", config.batch.aggregator)
    return step


def _load_pretrained(model: MultitaskModel, config: RunConfig, world: World) -> None:
    folder = find_checkpoint(config.encoder.model, config.encoder.revision)
    missing = load_weights(model.bert, folder, list(model.decoders.values()))
    if missing and world.is_main:
        log.warning("%s has no weights for %s: they start at random", config.encoder.model, ", ".join(missing))


@contextlib.contextmanager
def _prints_to_log() -> Iterator[None]:
    """DeepSpeed prints what it builds and sets up; that belongs into the log, not onto the terminal."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
            log.info("%s", line)
