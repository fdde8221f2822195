"""A search under way: what `minbert tune` does here, and a search's job on the cluster."""

import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError
from minbert.launch.many_runs import note_environment, retry_failed
from minbert.launch.watching import watching
from minbert.trainer.config import parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.search import SEARCH_FILE, Search, describe_schedule, write_best
from minbert.tuning.trial import Trial, ranked

SHOWN = 5  # trials in the table at the end


def run_search(
    folder: Path,
    search: Search,
    stop: StopRequest,
    start: Callable[[], AbstractContextManager[object]],
    retry: bool = False,
) -> int:
    """Run what is left of a search on the Ray that `start()` provides; returns the exit code. search.yaml is written
    when nothing can refuse the search any more. `retry`: the trials, too, that have failed."""
    trials = search.trials(folder)
    left = [trial for trial in trials if not trial.over or (retry and trial.status == "failed")]
    if trials:
        begun = sum(1 for trial in left if trial.step)
        print(f"{len(trials) - len(left)} of {search.samples} trials are over; {begun} go on from their checkpoints.")
        sys.stdout.flush()
    if left or len(trials) < search.samples:
        with start():
            _run_trials(folder, search, trials, stop, retry)
    trials = search.trials(folder)
    winner = write_best(folder, trials)
    if any(not trial.over for trial in trials) or len(trials) < search.samples:
        return ExitCode.INTERRUPTED
    for trial in trials:
        if trial.done:
            trial.forget_checkpoints()
    return _conclude(folder, search, trials, winner)


def _run_trials(folder: Path, search: Search, trials: list[Trial], stop: StopRequest, retry: bool) -> None:
    from minbert.launch.trial import train_trial
    from minbert.tuning.driver import TrialRunner
    from minbert.tuning.strategy import SearchStrategy

    runner = TrialRunner(
        folder,
        options=lambda trial: search.options(trial.parameters),
        train=train_trial,
        resources=search.resources,
        parallel=parse_config(search.base, SEARCH_FILE).parallel,
    )
    search.write(folder)
    note_environment(folder)
    if retry:
        retry_failed(trials)
    strategy, tell = SearchStrategy(folder, search, trials), Announcer(folder, search, trials)
    with watching(folder):
        problem = runner.run(trials, stop=stop, tell=tell, strategy=strategy)
    if problem:
        print(f"minbert: {problem}", file=sys.stderr, flush=True)


class Announcer:
    """Prints a line for each trial that starts, goes on or is over, and writes best.yaml when one is over."""

    def __init__(self, folder: Path, search: Search, trials: list[Trial]):
        self.folder, self.search = folder, search
        self.trials = {trial.number: trial for trial in trials}
        self.taken_over: dict[str, int] = {}  # trial -> how often it had taken over from another

    def __call__(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        if trial.over:
            write_best(self.folder, list(self.trials.values()))
        took_turns = self.search.scheduler == "pbt" and trial.status == "running" and trial.step > 0 and not trial.error
        if took_turns and self.taken_over.get(trial.name) == len(trial.taken_over):
            return  # it had made room for another
        self.taken_over[trial.name] = len(trial.taken_over)
        print(_line(trial, sum(other.over for other in self.trials.values()), self.search.samples), flush=True)


def _line(trial: Trial, over: int, samples: int) -> str:
    parameters = " ".join(f"{name}={value}" for name, value in trial.parameters.items())
    if trial.status == "running" and trial.taken_over and not trial.error:
        last = trial.taken_over[-1]
        return f"{trial.name} takes over from {last['donor']} at step {last['at']}  {parameters}"
    if trial.status == "running":
        state = f"goes on from step {trial.step}" if trial.step else "starts"
        return f"{trial.name} {state}" + (f" after: {trial.error}" if trial.error else f"  {parameters}")
    score = "" if trial.score is None else f" {trial.score:.3f}"
    place = f" at {trial.step}/{trial.steps}" if trial.step else ""
    error = f": {trial.error}" if trial.error else ""
    return f"[{over}/{samples}] {trial.name} {trial.status}{score}{place}{error}"


def _conclude(folder: Path, search: Search, trials: list[Trial], winner: Trial | None) -> int:
    failed = [trial for trial in trials if trial.status == "failed"]
    for trial in failed:
        print(f"{trial.name} failed: {trial.error}")
    if winner is None:
        why = f"the first failed with: {failed[0].error}" if failed else "no evaluation gave a number"
        raise UserError(f"no trial of {folder} has a score; {why}")
    table = Table(title=f"The best of {len(trials)} trials", title_justify="left", box=None, header_style="dim")
    names = list(search.space)
    for heading in ("trial", "score", "step", *names):
        table.add_column(heading)
    for trial in ranked(trials)[:SHOWN]:
        all_values = search.values(trial.parameters)  # it may be of an earlier space
        values = [str(all_values[name]) for name in names]
        table.add_row(trial.name, f"{trial.score:.3f}", f"{trial.step}/{trial.steps}", *values)
    Console(width=max(Console().width, 60 + 14 * len(names))).print(table)
    for line in describe_schedule(winner, search.space):
        print(line)
    print(f"Configuration: {folder / 'best.yaml'}   The full run: minbert tune --best {shlex.quote(str(folder))}")
    return ExitCode.FINISHED
