"""Saving a checkpoint while the run goes on.

The step waits for one copy of this process's shard in memory. A thread writes it, and rank 0's thread publishes the
checkpoint once every process reported its file written. What became of it is known to all processes when the next one
is saved, or on `finish`. A checkpoint that cannot be written costs a warning, not the run, until it happens too often.
"""

import io
import logging
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from uuid import uuid4

import torch

from minbert.data.errors import UserError
from minbert.trainer.checkpoint.format import (
    AGGREGATOR,
    UNFINISHED,
    Manifest,
    TrainingState,
    folder_name,
    prune,
    publish,
    published,
    remember,
    write_hashed,
)
from minbert.trainer.checkpoint.shards import Snapshot, owned
from minbert.trainer.engine.base import Engine
from minbert.trainer.options import BudgetConfig
from minbert.trainer.processes.random_state import random_state
from minbert.trainer.processes.world import World
from minbert.trainer.surgery.methods import Aggregator

log = logging.getLogger(__name__)

LAST_CHANCE = 20.0  # seconds


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class CheckpointWriter:
    """Writes the checkpoints of a run into `folder`. Every process has one and calls it at the same steps.

    `describe` makes the manifest of a state; its files are filled in here.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        aggregator: Aggregator,
        world: World,
        budget: BudgetConfig,
        describe: Callable[[TrainingState], Manifest],
    ):
        self.folder, self.engine, self.aggregator = folder, engine, aggregator
        self.world, self.budget, self.describe = world, budget, describe
        self._messages = world.messages.clone()
        # Two lives of a run may overlap, if a node is lost and comes back: each has folders of its own.
        self._life = world.messages.share("save/life", uuid4().hex[:8])
        self._snapshot = Snapshot()
        self._thread: Thread | None = None
        self._saves = self._failures = 0
        self._error: str | Exception | None = None
        self._newest: Manifest | None = None  # of the last checkpoint written or loaded; its files on rank 0
        self.first: Callable[[], None] | None = None  # what rank 0 has to write before anything else

    def save(self, state: TrainingState, wait: bool = False) -> bool:
        """Save `state` with what engine and aggregator hold; with `wait`, return when it is published.

        Returns False if it could not be written, or, without `wait`, the one before. Collective. Raises UserError
        after `failed_saves` failures in a row, and LostProcess if a process does not report.
        """
        succeeded = self.finish()
        manifest = replace(self.describe(state), state=deepcopy(state))
        self._saves += 1
        topic = f"save/{self._saves}"
        if self._newest is not None and self._newest.step == state.step:
            # Saved by a stop just before an evaluation: the tensors are the same.
            self._start(self._describe_again, manifest, topic)
        else:
            random = {f"random/{self.world.rank}/{name}": values for name, values in random_state().items()}
            self._snapshot.take(owned(self.engine.parts(), self.world.rank, self.world.size), random)
            extra = io.BytesIO()
            if self.world.is_main:
                torch.save(self.aggregator.state_dict(), extra)  # the same on all processes
            self._start(self._write, manifest, topic, extra.getbuffer())
        return self.finish() if wait or self.budget.save_in_step else succeeded

    def finish(self) -> bool:
        """Wait for the checkpoint being written, if there is one; whether it was published. Collective."""
        if self._thread is None:
            return True
        self._thread.join()
        self._thread = None
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is None:
            self._failures = 0
            return True
        self._failures += 1
        if self._failures >= self.budget.failed_saves:
            raise UserError(
                f"{self._error}\nThis was failure {self._failures} in a row to save, so the run stops "
                f"(failed_saves={self.budget.failed_saves}). {self._what_there_is()} Make room, then resume."
            )
        return False

    def abandon(self) -> None:
        """The run has failed: give the checkpoint being written a last chance, if the others are still there."""
        if self._thread is not None:
            self._thread.join(LAST_CHANCE)

    def loaded(self, manifest: Manifest) -> None:
        """Say that the run goes on from this checkpoint."""
        self._newest = manifest

    def _start(self, work: Callable, *arguments: object) -> None:
        self._error = None

        def guarded() -> None:
            try:
                self._error = work(*arguments)
            except Exception as error:
                self._error = error

        self._thread = Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, manifest: Manifest, topic: str, extra: memoryview) -> str | None:
        """Write this process's files and have rank 0 publish; the reason if that failed."""
        self._messages.announce_checkpoint(topic)
        unfinished = self.folder / f"{folder_name(manifest.step)}.{self._life}{UNFINISHED}"
        files, error = {}, None
        try:
            if self.first is not None:
                self.first()
                self.first = None
            unfinished.mkdir(parents=True, exist_ok=True)
            name = shard_name(self.world.rank)
            files[name] = write_hashed(unfinished / name, self._snapshot.content())
            if self.world.is_main:
                files[AGGREGATOR] = write_hashed(unfinished / AGGREGATOR, [extra])
        except OSError as problem:
            error = self._explain(manifest, problem)
        reports = self._messages.gather(topic, [files, error])
        if reports is not None:
            error = next((error for _, error in reports if error), None)
            if error is None:
                complete = replace(manifest, files={name: one for files, _ in reports for name, one in files.items()})
                error = self._publish(unfinished, complete)
            if error is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
                log.warning("%s %s", error, self._what_there_is())
        self._messages.announce_checkpoint("")
        error = self._messages.share(topic, error)
        if error is None and not self.world.is_main:
            self._newest = manifest
        return error

    def _publish(self, unfinished: Path, manifest: Manifest) -> str | None:
        try:
            publish(unfinished, manifest)
        except OSError as problem:
            return self._explain(manifest, problem)
        self._newest = manifest
        best = [manifest.state.best_step] if self.budget.keep_best else []
        try:
            remember(self.folder, manifest.step)
            prune(self.folder, self.budget.keep, self.budget.keep_every, best)
        except OSError as problem:
            log.warning("%s could not be tidied up: %s", self.folder, problem)
        return None

    def _describe_again(self, manifest: Manifest, topic: str) -> str | None:
        """Replace the manifest of the checkpoint that was written or loaded last."""
        error = None
        if self.world.is_main:
            try:
                # Its files stay, and so does what they hold: other processes may have written them.
                same = ("files", "processes", "zero_stage", "copies")
                manifest = replace(manifest, **{name: getattr(self._newest, name) for name in same})
                manifest.write(self.folder / folder_name(manifest.step))
            except OSError as problem:
                error = self._explain(manifest, problem)
                log.warning("%s %s", error, self._what_there_is())
        return self._messages.share(topic, error)

    def _explain(self, manifest: Manifest, problem: OSError) -> str:
        where = f" on rank {self.world.rank}" if self.world.size > 1 else ""
        return (
            f"The checkpoint of step {manifest.step} could not be written{where}: "
            f"{problem.strerror} ({problem.filename or self.folder})."
        )

    def _what_there_is(self) -> str:
        kept = published(self.folder)
        return f"The newest checkpoint is {kept[-1].name}." if kept else "There is no checkpoint yet."


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
