"""A search under way: what `minbert tune` does here, and a search's job on the cluster."""

import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError
from minbert.launch.many_runs import note_environment, retry_failed
from minbert.launch.watching import watching
from minbert.trainer.config import parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.again import candidates, runs_again, verdict, winner
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
    """Run what is left of a search on the Ray that `start()` provides, and its best trials with other seeds where it
    wants that; returns the exit code. search.yaml is written when nothing can refuse the search any more. `retry`: the
    trials, too, that have failed."""
    trials = search.trials(folder)
    runs = runs_again(search, folder, trials)
    left = [trial for trial in (*trials, *runs) if not trial.over or (retry and trial.status == "failed")]
    if trials:
        begun = sum(1 for trial in left if trial.step)
        over = sum(trial.over for trial in trials)
        print(f"{over} of {search.samples} trials are over; {begun} go on from their checkpoints.", flush=True)
    if left or len(trials) < search.samples:
        with start():
            _run_trials(folder, search, trials, runs, stop, retry)
    trials = search.trials(folder)
    runs = runs_again(search, folder, trials)
    found = winner(search, trials, runs)
    if found:
        write_best(folder, *found)
    if len(trials) < search.samples or any(not trial.over for trial in (*trials, *runs)):
        return ExitCode.INTERRUPTED
    for trial in (*trials, *runs):
        if trial.done:
            trial.forget_checkpoints()
    return _conclude(folder, search, trials, runs, found[0] if found else None)


def _run_trials(
    folder: Path, search: Search, trials: list[Trial], runs: list[Trial], stop: StopRequest, retry: bool
) -> None:
    """The trials that are left, and then the runs with other seeds."""
    from minbert.launch.trial import train_trial
    from minbert.tuning.driver import TrialRunner
    from minbert.tuning.strategy import SearchStrategy, Strategy

    runner = TrialRunner(
        folder,
        options=lambda trial: search.options(trial.parameters) | ({} if trial.seed is None else {"seed": trial.seed}),
        train=train_trial,
        resources=search.resources,
        parallel=parse_config(search.base, SEARCH_FILE).parallel,
    )
    search.write(folder)
    note_environment(folder)
    if retry:
        retry_failed([*trials, *runs])
    strategy, tell, problem = SearchStrategy(folder, search, trials), Announcer(folder, search, trials), None
    with watching(folder):
        if strategy.further or any(not trial.over for trial in trials):
            problem = runner.run(trials, stop=stop, tell=tell, strategy=strategy)
        runs = runs_again(search, folder, search.trials(folder))
        if problem is None and stop.signal is None and any(not run.over for run in runs):
            problem = runner.run(runs, stop=stop, tell=partial(_tell_again, runs), strategy=Strategy())
    if problem:
        print(f"minbert: {problem}", file=sys.stderr, flush=True)


def _tell_again(runs: list[Trial], run: Trial) -> None:
    print(_line(run, sum(other.over for other in runs), len(runs)), flush=True)


class Announcer:
    """Prints a line for each trial that starts, goes on or is over, and writes best.yaml when one is over."""

    def __init__(self, folder: Path, search: Search, trials: list[Trial]):
        self.folder, self.search = folder, search
        self.trials = {trial.number: trial for trial in trials}
        self.taken_over: dict[str, int] = {}  # trial -> how often it had taken over from another

    def __call__(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        if trial.over and (found := winner(self.search, list(self.trials.values()), ())):
            write_best(self.folder, *found)
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


def _conclude(folder: Path, search: Search, trials: list[Trial], runs: list[Trial], chosen: Trial | None) -> int:
    failed = [trial for trial in (*trials, *runs) if trial.status == "failed"]
    for trial in failed:
        print(f"{trial.name} failed: {trial.error}")
    if chosen is None:
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
    for line in describe_schedule(chosen, search.space):
        print(line)
    if again := candidates(trials, runs):
        print("\nThe best of them again, with other seeds")
        for each in again:
            print(f"{each.trial.name}  {each.spread} over {len(each.scores)}; {each.trial.score:.3f} in the search")
        print(verdict(again))
    print(f"Configuration: {folder / 'best.yaml'}   The full run: minbert tune --best {shlex.quote(str(folder))}")
    return ExitCode.FINISHED
