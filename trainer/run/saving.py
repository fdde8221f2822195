"""A run's checkpoints and its best model: which checkpoint it goes on from, and what it writes on the way."""

import logging
from copy import deepcopy
from functools import partial
from typing import Any

from minbert.data.batches.plan import BatchPlan
from minbert.trainer.checkpoint.format import Manifest, TrainingState, damaged, remember
from minbert.trainer.checkpoint.resuming import newest_intact, refuse_another, restore
from minbert.trainer.checkpoint.saving import CheckpointWriter, now
from minbert.trainer.config import RunConfig
from minbert.trainer.engine.base import Engine
from minbert.trainer.processes.world import World
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import save_best
from minbert.trainer.surgery.methods import Aggregator

log = logging.getLogger(__name__)


class RunSaving:
    """Looks for the checkpoint to go on from (`found`), restores it once there is an engine, and saves.

    Raises UserError if what is found is damaged, or of another run and not `force`d. Every process has one and calls it
    at the same steps.
    """

    def __init__(
        self, config: RunConfig, run: RunFolder, world: World, plan: BatchPlan, identity: dict[str, Any], force: bool
    ):
        self.config, self.folder, self.world, self.plan, self.identity = config, run, world, plan, identity
        self.budget, self.code = Budget(config.budget, plan.steps_per_epoch), run.code_state()
        self.found = newest_intact(run.checkpoints, world)
        overridden = refuse_another(*self.found, identity, force) if self.found else []
        if world.is_main:
            for line in overridden:
                log.warning("overridden by --force: %s", line)

    def restore(self, engine: Engine, aggregator: Aggregator) -> TrainingState:
        """Where the run stands: at the beginning, or as the checkpoint says, which engine and aggregator get back."""
        self.engine = engine
        self.writer = CheckpointWriter(
            self.folder.checkpoints, engine, aggregator, self.world, self.config.budget, self._describe
        )
        if self.found is None:
            return TrainingState(epochs=self.config.budget.passes)
        checkpoint, manifest = self.found
        saved, here = manifest.identity["settings"], self.identity["settings"]
        same = all(saved.get(name) == here[name] for name in ("aggregator", "surgery_scope"))
        restore(checkpoint, manifest, engine, aggregator if same else None, self.world, self.config.seed)
        self.writer.loaded(manifest)
        if self.world.is_main:
            if damaged(self.folder.checkpoints):
                remember(self.folder.checkpoints, manifest.step)  # newer ones do not count any more
            if not same:
                log.warning("%s starts with a fresh state", here["aggregator"])
        state = deepcopy(manifest.state)
        state.epochs = max(state.epochs, self.config.budget.passes)
        return state

    def save(self, state: TrainingState, wait: bool = False) -> bool:
        """As `CheckpointWriter.save`."""
        state.updates = self.engine.updates()
        return self.writer.save(state, wait)

    def save_best(self, state: TrainingState, scores: dict[str, float]) -> None:
        """Write the model to its file; if the disk does not take it, no checkpoint may say that it is there."""
        parameters = self.engine.full_state()
        if self.world.is_main:
            self.writer.first = partial(save_best, self.folder, self.config, parameters, state.step, scores)
            try:
                self.writer.first()
                self.writer.first = None
            except OSError as error:
                log.warning("%s could not be written (%s); the next save tries again", error.filename, error.strerror)

    def abandon(self) -> None:
        """The run has failed: give the checkpoint being written a last chance."""
        self.writer.abandon()

    def _describe(self, state: TrainingState) -> Manifest:
        return Manifest(
            step=state.step,
            written=now(),
            processes=self.world.size,
            zero_stage=self.config.parallel.zero_stage,
            state=state,
            positions={name: self.plan.position(name, state.step) for name in self.plan.names},
            identity=self.identity,
            config=self.config.model_dump(mode="json"),
            code=self.code,
            shapes=self.engine.shapes,
            files={},
            copies=list(self.engine.copies),
            total_steps=self.budget.total_steps(state),
        )
