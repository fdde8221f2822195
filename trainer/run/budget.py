"""How far a run goes, and when it is scored and saved on the way: pure functions of options, data and state."""

from dataclasses import dataclass

from minbert.trainer.checkpoint.format import TrainingState
from minbert.trainer.options import BudgetConfig


@dataclass(frozen=True)
class Budget:
    """The budget that `config` gives over data of which an epoch has `steps_per_epoch` steps."""

    config: BudgetConfig
    steps_per_epoch: int

    @property
    def planned_steps(self) -> int:
        """Steps of the configured budget, which shape the learning rate; an extension goes on at its end."""
        return self._steps(self.config.passes)

    def total_steps(self, state: TrainingState) -> int:
        """Steps of the budget as far as it has been extended."""
        return self._steps(state.epochs)

    def _steps(self, epochs: float) -> int:
        return self.config.steps or max(1, round(epochs * self.steps_per_epoch))

    @property
    def eval_every(self) -> int:
        if self.config.evaluations is not None:
            return max(1, round(self.planned_steps / self.config.evaluations))
        return self.config.eval_every or self.steps_per_epoch

    def is_spent(self, state: TrainingState) -> bool:
        """Whether there is nothing left to train."""
        return state.step >= self.total_steps(state) or self._out_of_patience(state)

    def _out_of_patience(self, state: TrainingState) -> bool:
        return self.config.patience is not None and state.stale_evaluations >= self.config.patience

    def evaluation_is_due(self, state: TrainingState) -> bool:
        return state.step > state.evaluated_at and (self.is_spent(state) or state.step % self.eval_every == 0)

    def checkpoint_is_due(self, state: TrainingState) -> bool:
        every = self.config.save_every or self.eval_every
        return self.is_spent(state) or (state.step > 0 and state.step % every == 0)

    def enter_score(self, state: TrainingState, overall: float) -> bool:
        """Write the score of the state's step into it; whether it is the best so far.

        A best score at the end of the budget extends that by as many epochs as were asked for, up to `extend_to`.
        """
        ends = state.step >= self.total_steps(state)
        state.evaluated_at = state.step
        if state.best_score is not None and not overall > state.best_score:
            state.stale_evaluations += 1
            return False
        state.best_score, state.best_step, state.stale_evaluations = overall, state.step, 0
        if ends and self.config.extend_to is not None:
            state.epochs = min(self.config.extend_to, state.epochs + self.config.passes)
        return True

    def ending(self, state: TrainingState) -> str:
        """Why the run ended, for a person, and by which option it would go on."""
        text = f"{state.step} of {self.total_steps(state)} steps, the best score at step {state.best_step}."
        option = "--epochs" if self.config.steps is None else "--steps"
        if self._out_of_patience(state):
            text += f" No better one in {state.stale_evaluations} evaluations (patience={self.config.patience})."
            option = "--patience"
        return f"{text} A larger {option} trains on."
