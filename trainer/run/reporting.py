"""What a run tells: a person at the terminal, the logs in its folder, its trackers. Only rank 0 does."""

from accelerate import Accelerator

from minbert.trainer.checkpoint.format import TrainingState
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import Progress
from minbert.trainer.run.trackers import Trackers


class Reporter:
    """Tells of the run in `folder`; a context, in which the bar is shown, from `begin` on."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.is_main = folder, accelerator.is_main_process
        self.trackers = Trackers(accelerator)

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def begin(self, config: RunConfig, state: TrainingState, total_steps: int) -> Progress:
        """The bar, a context. What an earlier start logged beyond the step of `state` is dropped: it comes again."""
        if state.step:
            self.say(f"Resuming {self.folder.path} from step {state.step} of {total_steps}.")
        if self.is_main:
            self.folder.rewind_metrics(state.step)
            self.trackers.start(flatten(config), state.step, state.trackers)
        self.progress = Progress(total_steps, enabled=self.is_main, done=state.step)
        return self.progress

    def log(self, step: int, record: dict[str, float]) -> None:
        if self.is_main:
            self.folder.append_metrics({"step": step} | record)
            self.trackers.log(record, step)

    def scores(self, state: TrainingState, scores: dict[str, float], is_best: bool, total_steps: int) -> None:
        """The dev scores of the step of `state`, and that the run goes on longer, if so."""
        if total_steps > self.progress.total:
            self.progress.extend(total_steps)
        self.log(state.step, {f"dev/{name}": value for name, value in scores.items()})
        self.progress.scores(state.step, scores, is_best)

    def end(self) -> None:
        self.trackers.end()
