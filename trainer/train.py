"""The training run: what every process executes, from the run folder to the last checkpoint."""

import contextlib
import gc
import logging
from collections import deque
from enum import Enum

from minbert.data.errors import UserError
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.scoring import evaluate
from minbert.trainer.metrics import MetricsWindow
from minbert.trainer.processes import world as distributed
from minbert.trainer.processes.stop import Stopped, StopRequest
from minbert.trainer.processes.world import World
from minbert.trainer.result import StepResult
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.out_of_memory import telling
from minbert.trainer.run.preparation import identity
from minbert.trainer.run.reporting import Reporter
from minbert.trainer.run.saving import RunSaving
from minbert.trainer.run.teachers import ask_teachers
from minbert.trainer.surgery.conflicts import gramian_record
from minbert.trainer.surgery.own_code import use_source

log = logging.getLogger(__name__)

WARM_UP = 3  # steps


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
        outcome = Outcome.INTERRUPTED if stop.reached_any(world) else training.run()
    except Stopped:
        outcome = Outcome.INTERRUPTED
    finally:
        distributed.stop()
    world.messages.farewell()
    return outcome


class Training:
    """A run in memory. `run` is the loop over steps; what it calls by name does the rest."""

    def __init__(self, config: RunConfig, run: RunFolder, world: World, stop: StopRequest, force: bool = False):
        self.config, self.folder, self.world, self.stop = config, run, world, stop
        train, self.dev = load_splits(config, run, "train"), load_splits(config, run, "dev")
        self.plan = build_plan(config, train)
        self.budget = Budget(config.budget, self.plan.steps_per_epoch)
        taught = ask_teachers(config, world, lambda: stop.reached_any(world))
        self.saving = RunSaving(config, run, world, self.plan, identity(config, run, train), force)
        self.engine = assemble_engine(config, run, world, pretrained=self.saving.found is None)
        is_asked_to_stop = lambda: stop.signal is not None  # noqa: E731
        self.training_step = assemble_step(config, self.engine, self.plan, train, world, taught, is_asked_to_stop)
        self.reporter = Reporter(run, self.engine.accelerator)
        self.state = self.saving.restore(self.engine, self.training_step.aggregator)
        self.window = MetricsWindow(world, self.state.window)
        self.waits = world.device.type != "cpu"  # whether a look at a number makes the host wait
        self.latest: deque[StepResult] = deque(maxlen=2 if self.waits else 1)

    def run(self) -> Outcome:
        """Train until the budget, early stopping or a request to stop ends it."""
        state, say = self.state, self.reporter.say
        if self.budget.is_spent(state) and state.evaluated_at == state.step:
            say(f"{self.folder.path} was finished before: {self.budget.ending(state)}")
            return Outcome.WAS_FINISHED
        try:
            with self.reporter.begin(self.config, state, self.budget.total_steps(state)):
                outcome = self._loop()
        except BaseException:
            self.saving.abandon()
            raise
        finally:
            self.training_step.feed.close()
            gc.unfreeze()
        self.reporter.end()
        if outcome is Outcome.FINISHED:
            say(f"Finished: {self.budget.ending(state)}")
        return outcome

    def _loop(self) -> Outcome:
        state, budget = self.state, self.budget
        warm = state.step + WARM_UP
        while True:
            if budget.evaluation_is_due(state) and not self._evaluate():
                return self._interrupted()
            finished = budget.is_spent(state)  # unless the evaluation has extended it
            if budget.checkpoint_is_due(state):
                self._save(wait=finished)
            if finished:
                return Outcome.FINISHED
            self._train_one_step()
            if self._is_to_stop():
                return self._interrupted()
            if state.step == warm:
                # What is there now stays to the end of the run, and is so much that going through it stops the step for
                # tenths of a second each time. What comes later is looked at as ever.
                gc.collect()
                gc.freeze()
                self.reporter.measure_peak()

    def _interrupted(self) -> Outcome:
        """Save before leaving. Raises UserError if that fails."""
        if not self._save(wait=True):
            raise UserError(
                f"stopped at step {self.state.step}, which could not be saved; resuming goes on from before"
            )
        return Outcome.INTERRUPTED

    def _train_one_step(self) -> None:
        state, every = self.state, self.config.batch.measure_every
        if self.config.unfreezes:
            rates, layers = self.training_step.rates(state.step), self.training_step.layers
            self.reporter.progress.trains(state.step, tuple(part for part in layers if rates[part]), layers)
        measured = every is not None and (state.step + 1) % every == 0
        with telling(state.step + 1, self.world):
            result = self.training_step(state.step, measured)
        state.step += 1
        self.window.add(result)
        self.latest.append(result)
        if self.waits and self.world.size > 1:
            result.send()
        is_logged = measured or state.step % self.config.log_every == 0
        if is_logged or not self.waits:
            self._look()
        if is_logged:
            self._log(result)
        if state.step % self.plan.steps_per_epoch == 0:
            self.training_step.aggregator.end_epoch()
        self.reporter.progress.advance(state.step)

    def _is_to_stop(self) -> bool:
        """Whether some process was asked to stop, which all of them learn after the same step.

        Of several, each tells the others along with a step's losses; on a GPU that is read when the next step is on its
        way, which then is the last.
        """
        if self.world.size == 1:
            return self.stop.signal is not None
        return len(self.latest) == self.latest.maxlen and self.latest[0].stops

    def _log(self, result: StepResult) -> None:
        step, layers = self.state.step, self.training_step.layers
        rates = self.training_step.rates(step - 1)
        shown = {"lr": max((rates[part] for part in layers), default=0.0)}
        shown["head_lr"] = max((rate for part, rate in rates.items() if part not in layers), default=0.0)
        if self.config.unfreezes:
            shown["trained_parts"] = sum(rates[part] > 0 for part in layers)
        self.reporter.log(step, self.window.close() | shown | result.measurements)
        if self.world.is_main and result.gramians is not None:
            self.folder.append_gramians(gramian_record(step, list(result.losses), result.gramians))

    def _look(self) -> None:
        """Read what the steps did since the last look. Log those that were skipped; give up on a run that keeps
        skipping."""
        for result in self.window.read():
            if not result.skipped:
                self.state.skipped = 0
                continue
            self.state.skipped += 1
            losses = ", ".join(f"{name} {loss:g}" for name, loss in result.losses.items())
            log.warning("step %d skipped: %s (losses: %s)", result.step + 1, result.skipped, losses)
            if self.state.skipped >= self.config.batch.max_skipped:
                raise UserError(
                    f"the last {self.state.skipped} steps, up to step {result.step + 1}, were skipped: "
                    f"{result.skipped}.\nThe model cannot be updated any more. A smaller lr, a longer warmup, or "
                    f"precision=fp32 may help; the checkpoints in {self.folder.checkpoints} are from before."
                )

    def _evaluate(self) -> bool:
        """Score the dev splits and keep the model if it is the best so far.

        Returns False, and leaves everything as it was, if the run was asked to stop meanwhile.
        """
        state, tasks = self.state, self.config.corpus.tasks
        self._look()  # so that the steps' time has what the device has left to do
        with self.engine.evaluating():
            found = evaluate(self.engine, tasks, self.dev, self.world, stop=lambda: self.stop.reached_any(self.world))
            if found is None:
                return False
            is_best = self.budget.enter_score(state, found.scores["overall"])
            if is_best:
                self.saving.save_best(state, found.scores)
        self.reporter.evaluated(state, found, is_best, self.budget.total_steps(state))
        return True

    def _save(self, wait: bool = False) -> bool:
        self._look()
        self.state.window = self.window.content()
        return self.saving.save(self.state, wait)
