"""The training run: what every process executes, from the run folder to the last checkpoint."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from enum import Enum
from functools import partial
from math import nan
from pathlib import Path

from minbert.data.errors import UserError
from minbert.data.split import TokenisedSplit
from minbert.data.tokens import load_tokenizer
from minbert.trainer.checkpoint.format import Manifest, TrainingState, damaged, remember
from minbert.trainer.checkpoint.resuming import newest_intact, refuse_another, restore
from minbert.trainer.checkpoint.saving import CheckpointWriter, now
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.engine.base import Engine, build_accelerator, build_engine
from minbert.trainer.engine.optimizer import build_optimizer, rate_factor, rates
from minbert.trainer.evaluation.scoring import evaluate
from minbert.trainer.metrics import MetricsWindow
from minbert.trainer.model.weights import find_checkpoint, load_weights
from minbert.trainer.processes import world as distributed
from minbert.trainer.processes.random_state import seed_everything, stream
from minbert.trainer.processes.stop import Stopped, StopRequest
from minbert.trainer.processes.world import World
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import build_plan, identity, load_split
from minbert.trainer.run.progress import Progress
from minbert.trainer.run.saved_model import build_model, save_best
from minbert.trainer.run.trackers import Trackers
from minbert.trainer.step import StepResult, TrainingStep
from minbert.trainer.surgery.conflicts import gramian_record
from minbert.trainer.surgery.own_code import use_source

log = logging.getLogger(__name__)


class Outcome(Enum):
    FINISHED = "finished"
    INTERRUPTED = "interrupted"  # asked to stop; everything is saved
    WAS_FINISHED = "was finished"  # by an earlier start: there was nothing to do


def train(run: RunFolder, stop: StopRequest | None = None, force: bool = False) -> Outcome:
    """Train the prepared run in `run`, from its newest intact checkpoint if it has one. Every process calls this.

    `stop` tells when to save and leave before the end. `force` goes on from a checkpoint though the settings, the data
    or the vocabulary are others now.
    """
    config = run.read_config()
    use_source(run.own_code)
    stop = stop or StopRequest()
    world = distributed.start(config.parallel)
    try:
        # Where there are others, who leaves alone would leave them waiting: they agree when all are ready.
        with stop.at_once() if world.size == 1 else contextlib.nullcontext():
            training = Training(config, run, world, stop, force)
        outcome = Outcome.INTERRUPTED if stop.agreed(world) else training.run()
    except Stopped:
        outcome = Outcome.INTERRUPTED
    finally:
        distributed.stop()
    world.messages.farewell()
    return outcome


class Training:
    """A run in memory: data, engine and state; `run` is the loop over steps."""

    def __init__(self, config: RunConfig, run: RunFolder, world: World, stop: StopRequest, force: bool = False):
        self.config, self.folder, self.world, self.stop = config, run, world, stop
        tokenizer = load_tokenizer(run.encoder)
        load = partial(load_split, config, tokenizer=tokenizer)
        train_splits = {name: load(name, "train") for name in config.corpus.names}
        self.dev_splits: Mapping[str, TokenisedSplit] = {name: load(name, "dev") for name in config.corpus.names}
        self.plan = build_plan(config, train_splits)
        self.identity = identity(config, run, train_splits)
        resumed = newest_intact(run.checkpoints, world)
        overridden = refuse_another(*resumed, self.identity, force) if resumed else []
        with _prints_to_log():
            self.accelerator = build_accelerator(
                config, world, log_with=list(config.trackers), project_dir=str(run.trackers)
            )
            self.engine = self._build_engine(pretrained=config.encoder.model != "tiny" and not resumed)
        self.code = run.code_state()
        self.trackers = Trackers(self.accelerator)
        self.training_step = TrainingStep(
            self.engine,
            self.plan,
            train_splits,
            world,
            aggregator=config.batch.aggregator,
            accumulation=config.batch.accumulation,
            task_weights=dict(zip(config.corpus.names, config.batch.task_weights or ())),
            clip=config.optimizer.clip,
            per_layer=config.batch.surgery_scope == "layer",
            rates=self._rates,
        )
        if not self.training_step.layers and self.training_step.aggregator.source != "losses":
            log.warning("the encoder is frozen, so the tasks share nothing: %s is a plain sum", config.batch.aggregator)
        self._window = MetricsWindow(world)
        self.writer = CheckpointWriter(
            run.checkpoints, self.engine, self.training_step.aggregator, world, config.budget, self._describe
        )
        self.state = TrainingState(epochs=config.budget.passes)
        if resumed:
            self._restore(*resumed)
        if world.is_main:
            for line in overridden:
                log.warning("overridden by --force: %s", line)

    def run(self) -> Outcome:
        """Train until the budget, early stopping or a request to stop ends it."""
        state = self.state
        if self.finished and state.evaluated_at == state.step:
            self._say(f"{self.folder.path} was finished before: {self._ending()}")
            return Outcome.WAS_FINISHED
        if state.step:
            self._say(f"Resuming {self.folder.path} from step {state.step} of {self.total_steps}.")
        if self.world.is_main:
            self.folder.rewind_metrics(state.step)
            self.trackers.start(flatten(self.config), state.step, state.trackers)
        self.progress = Progress(self.total_steps, enabled=self.world.is_main, done=state.step)
        try:
            with self.progress:
                outcome = self._loop()
        except BaseException:
            self.writer.abandon()
            raise
        self.trackers.end()
        if outcome is Outcome.FINISHED:
            self._say(f"Finished: {self._ending()}")
        return outcome

    def _loop(self) -> Outcome:
        state, budget = self.state, self.config.budget
        while True:
            evaluation_due = state.step > state.evaluated_at and (self.finished or state.step % self.eval_every == 0)
            if evaluation_due and not self._evaluate():
                return self._interrupted()
            finished = self.finished  # the evaluation may have extended the budget
            if finished or (state.step and state.step % (budget.save_every or self.eval_every) == 0):
                self._save(wait=finished)
            if finished:
                return Outcome.FINISHED
            self._train_one_step()
            if self.stop.agreed(self.world):
                return self._interrupted()

    def _interrupted(self) -> Outcome:
        """Save before leaving. Raises UserError if that fails."""
        if not self._save(wait=True):
            raise UserError(
                f"stopped at step {self.state.step}, which could not be saved; resuming goes on from before"
            )
        return Outcome.INTERRUPTED

    def _train_one_step(self) -> None:
        state, batch = self.state, self.config.batch
        logged = (state.step + 1) % self.config.log_every == 0
        measured = batch.measure_every is not None and (state.step + 1) % batch.measure_every == 0
        result = self.training_step(state.step, measured)
        state.step += 1
        self._notice_skipped(result)
        self._window.add(result)
        if logged or measured:
            factor = rate_factor(state.step - 1, self.planned_steps, self.config.optimizer)
            peaks = dict(zip(("lr", "head_lr"), self.config.optimizer.peaks, strict=True))
            shown = {name: peak * factor for name, peak in peaks.items()}
            self._log({"step": state.step} | self._window.close() | shown | result.measurements)
            if self.world.is_main and result.gramians is not None:
                self.folder.append_gramians(gramian_record(state.step, list(result.losses), result.gramians))
        if state.step % self.plan.steps_per_epoch == 0:
            self.training_step.aggregator.end_epoch()
        self.progress.advance(state.step)

    def _notice_skipped(self, result: StepResult) -> None:
        """Log a skipped step; give up on a run that keeps skipping."""
        if not result.skipped:
            self.state.skipped = 0
            return
        self.state.skipped += 1
        losses = ", ".join(f"{name} {loss:g}" for name, loss in result.losses.items())
        log.warning("step %d skipped: %s (losses: %s)", self.state.step, result.skipped, losses)
        if self.state.skipped >= self.config.batch.max_skipped:
            raise UserError(
                f"the last {self.state.skipped} steps, up to step {self.state.step}, were skipped: {result.skipped}.\n"
                "The model cannot be updated any more. A smaller lr, a longer warmup, or precision=fp32 may help; the "
                f"checkpoints in {self.folder.checkpoints} are from before."
            )

    def _evaluate(self) -> bool:
        """Score the dev splits, remember the best model, extend the budget if that is wanted and deserved.

        Returns False, and leaves everything as it was, if the run was asked to stop meanwhile.
        """
        state, config = self.state, self.config
        budget = config.budget
        self.engine.eval()
        scores = evaluate(
            self.engine, config.corpus.tasks, self.dev_splits, self.world, stop=lambda: self.stop.agreed(self.world)
        )
        self.engine.train()
        if scores is None:
            return False
        state.evaluated_at = state.step
        state.stale_evaluations += 1
        if state.best_score is None or scores["overall"] > state.best_score:
            state.best_score, state.best_step, state.stale_evaluations = scores["overall"], state.step, 0
            self._save_best(scores)
            if budget.extend_to is not None and state.step >= self.total_steps:
                state.epochs = min(budget.extend_to, state.epochs + budget.passes)
                self.progress.extend(self.total_steps)
        self._log({"step": state.step} | {f"dev/{name}": value for name, value in scores.items()})
        self.progress.scores(state.step, scores, best=state.stale_evaluations == 0)
        return True

    def _save_best(self, scores: dict[str, float]) -> None:
        """Write the model to its file; if the disk does not take it, no checkpoint may say that it is there."""
        parameters = self.engine.full_state()
        if self.world.is_main:
            self.writer.first = partial(save_best, self.folder, self.config, parameters, self.state.step, scores)
            try:
                self.writer.first()
                self.writer.first = None
            except OSError as error:
                log.warning("%s could not be written (%s); the next save tries again", error.filename, error.strerror)

    def _save(self, wait: bool = False) -> bool:
        window = self._window
        self.state.window = {"losses": dict(window.losses), "norms": window.norms, "skipped": window.skipped}
        self.state.updates = self.engine.updates()
        return self.writer.save(self.state, wait)

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
            total_steps=self.total_steps,
        )

    def _log(self, record: dict[str, float]) -> None:
        if self.world.is_main:
            self.folder.append_metrics(record)
            self.trackers.log({key: value for key, value in record.items() if key != "step"}, self.state.step)

    def _build_engine(self, pretrained: bool) -> Engine:
        """Model and optimizer, the same on every process; then random numbers of each process's own."""
        seed_everything(stream(self.config.seed, "weights"))
        model = build_model(self.config, self.folder)
        if pretrained:
            encoder = self.config.encoder
            folder = find_checkpoint(encoder.model, encoder.revision)
            missing = load_weights(model.bert, folder, list(model.decoders.values()))
            if missing and self.world.is_main:
                log.warning("%s has no weights for %s: they start at random", encoder.model, ", ".join(missing))
        model.to(self.world.device)
        engine = build_engine(self.accelerator, model, build_optimizer(model, self.config.optimizer))
        seed_everything(stream(self.config.seed, "dropout", self.world.rank))
        engine.train()
        return engine

    def _restore(self, checkpoint: Path, manifest: Manifest) -> None:
        saved, here = manifest.identity["settings"], self.identity["settings"]
        same = all(saved.get(name) == here[name] for name in ("aggregator", "surgery_scope"))
        aggregator = self.training_step.aggregator if same else None
        restore(checkpoint, manifest, self.engine, aggregator, self.world, self.config.seed)
        self.writer.loaded(manifest)
        if self.world.is_main:
            if damaged(self.folder.checkpoints):
                remember(self.folder.checkpoints, manifest.step)  # newer ones do not count any more
            if not same:
                log.warning("%s starts with a fresh state", here["aggregator"])
        self.state = deepcopy(manifest.state)
        self.state.epochs = max(self.state.epochs, self.config.budget.passes)
        window = self.state.window
        for name, losses in window.get("losses", {}).items():
            self._window.losses[name] = [nan if loss is None else loss for loss in losses]  # JSON has no other word
        self._window.norms += window.get("norms", [])
        self._window.skipped = window.get("skipped", 0)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _ending(self) -> str:
        state, budget = self.state, self.config.budget
        text = f"{state.step} of {self.total_steps} steps, the best score at step {state.best_step}."
        if self._out_of_patience:
            text += f" No better one in {state.stale_evaluations} evaluations (patience={budget.patience})."
        option = "--patience" if self._out_of_patience else "--epochs" if budget.steps is None else "--steps"
        return f"{text} A larger {option} trains on."

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total_steps or self._out_of_patience

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.budget.patience
        return patience is not None and self.state.stale_evaluations >= patience

    @property
    def eval_every(self) -> int:
        budget = self.config.budget
        if budget.evaluations is not None:
            return max(1, round(self.planned_steps / budget.evaluations))
        return budget.eval_every or self.plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.budget.steps or max(1, round(self.state.epochs * self.plan.steps_per_epoch))

    def _rates(self, step: int) -> dict[str, float]:
        return rates(step, self.planned_steps, self.config.optimizer, self.engine.peak_rates)

    @property
    def planned_steps(self) -> int:
        """Steps of the configured budget, which shape the learning rate; an extension goes on at its end."""
        return self.config.budget.steps or max(1, round(self.config.budget.passes * self.plan.steps_per_epoch))


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
