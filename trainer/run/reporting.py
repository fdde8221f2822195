"""What a run tells: a person at the terminal, the logs in its folder, its trackers. Only rank 0 does; but every process
says where it stands."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from minbert.trainer.checkpoint.format import TrainingState
from minbert.trainer.config import RunConfig, flatten
from minbert.trainer.evaluation.scoring import Evaluation
from minbert.trainer.model.weights import read_config
from minbert.trainer.run.display import View
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import Progress, say
from minbert.trainer.run.speed import arithmetic, flops_per_token, matmul_peak
from minbert.trainer.run.standing import EVERY, Heartbeat, here, read_standings
from minbert.trainer.run.trackers import Trackers


class Reporter:
    """Tells of the run in `folder`; `begin` is a context, in which its progress is shown."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.config = folder.read_config()
        self.folder, self.is_main, self.accelerator = folder, accelerator.is_main_process, accelerator
        self.trackers = Trackers(accelerator, folder.path)

    def say(self, text: str) -> None:
        if self.is_main:
            say(text, self.config)

    @contextmanager
    def begin(self, config: RunConfig, state: TrainingState, total_steps: int) -> Iterator[Progress]:
        """What an earlier start logged beyond the step of `state` is dropped: it comes again."""
        if state.step:
            self.say(f"Resuming {self.folder.path} from step {state.step} of {total_steps}.")
        view = View.of(
            str(self.folder.path), config, total_steps, flops_per_token(config, read_config(self.folder.encoder))
        )
        if self.is_main:
            self.folder.rewind(state.step)
            for record in self.folder.read_metrics():
                view.take(record)
            self.trackers.start(flatten(config), state.step, state.trackers)
        process = here(self.accelerator.process_index, self.accelerator.num_processes, state.step, total_steps)
        with Heartbeat(self.folder.logs, process) as self.heartbeat:
            look = _looking_at(view, self.folder, self.heartbeat)
            self.progress = Progress(view, self.is_main, config.progress, self.heartbeat.moved, look)
            try:
                with self.progress:
                    yield self.progress
            except BaseException:
                self.trackers.end(patience=5.0)
                raise

    def measure_peak(self) -> None:
        """Learn what this process's part of the machine can do, of which a run is told its share."""
        dtype = arithmetic(self.config.parallel)
        self.heartbeat.standing.peak = matmul_peak(self.accelerator.device, dtype)

    def log(self, step: int, record: dict[str, float]) -> None:
        if self.is_main:
            self.folder.append_metrics({"step": step} | record)
            self.progress.logged({"step": step} | record)
            self.trackers.log(record, step)

    def evaluated(self, state: TrainingState, found: Evaluation, is_best: bool, total_steps: int) -> None:
        """The dev scores and losses of the step of `state`, and that the run goes on longer, if so."""
        if total_steps > (self.progress.view.total or 0):
            self.progress.extend(total_steps)
            self.heartbeat.standing.total_steps = total_steps
        scores = {f"dev/{name}": score for name, score in found.scores.items()}
        self.log(state.step, scores | {f"dev_loss/{name}": loss for name, loss in found.losses.items()})
        self.progress.scores(state.step, found.scores, is_best)

    def end(self) -> None:
        self.trackers.end()


def _looking_at(view: View, folder: RunFolder, heartbeat: Heartbeat) -> Callable[[], None]:
    """Brings what processes say of themselves into `view`: of this one at once, of others as often as they write."""
    others, looked = view.processes, 0.0

    def look() -> None:
        nonlocal others, looked
        own, now = heartbeat.standing, time.time()
        own.written = now
        if own.processes > 1 and now - looked > EVERY:
            others, looked = read_standings(folder.logs)[1:], now
        view.processes = [own, *others]

    return look
