"""A search under way: what `minbert tune` does here, and a search's job on the cluster."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError
from minbert.launch.many_runs import retry_failed
from minbert.trainer.config import parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.search import SEARCH_FILE, NextTrial, Search, describe_schedule, write_best
from minbert.tuning.trial import Trial, ranked

SHOWN = 5  # trials in the table at the end


def run_search(folder: Path, search: Search, stop: StopRequest, start: Any, retry: bool = False) -> int:
    """Run what is left of a search on the Ray that the context manager `start()` provides; returns the exit code.
    search.yaml is written when nothing can refuse the search any more. `retry`: the trials, too, that have failed."""
    trials = search.trials(folder)
    left = [trial for trial in trials if not trial.over or (retry and trial.status == "failed")]
    further = max(0, search.samples - len(trials))
    begun = sum(1 for trial in left if trial.step)
    if trials:
        print(f"{len(trials) - len(left)} of {search.samples} trials are over; {begun} go on from their checkpoints.")
        sys.stdout.flush()
    if left or further:
        with start():
            _run(folder, search, trials, further, stop, retry)
    trials = search.trials(folder)
    winner = write_best(folder, trials)
    if any(not trial.over for trial in trials) or len(trials) < search.samples:
        return ExitCode.INTERRUPTED
    for trial in trials:
        if trial.done:
            trial.forget_checkpoints()
    return _conclude(folder, search, trials, winner)


def _run(folder: Path, search: Search, trials: list[Trial], further: int, stop: StopRequest, retry: bool) -> None:
    from minbert.launch.trial import train_trial
    from minbert.tuning.driver import Recorder, find_room, run_trials
    from minbert.tuning.population import Population
    from minbert.tuning.proposals import Proposals, TpeProposals
    from minbert.tuning.scheduler import RememberingASHA

    room = find_room(search.resources, parse_config(search.base, SEARCH_FILE).parallel)
    search.write(folder)
    if retry:
        retry_failed(trials)

    def make_scheduler(recorder: Recorder) -> Any:
        if search.scheduler == "asha":
            return RememberingASHA(search.grace, search.reduction, trials)
        return Population(search, recorder, trials) if search.scheduler == "pbt" else None

    proposals = partial(Proposals, propose=NextTrial(search, folder, trials))
    if search.algorithm == "tpe":
        create = partial(search.new_trial, folder)
        proposals = lambda waiting, describe: TpeProposals(search, trials, waiting, describe, create)  # noqa: E731
    known = {trial.number: trial for trial in trials}
    taken_over: dict[str, int] = {}

    def tell(trial: Trial) -> None:
        known[trial.number] = trial
        if trial.over:
            write_best(folder, list(known.values()))
        turn = search.scheduler == "pbt" and trial.status == "running" and trial.step > 0 and not trial.error
        if turn and taken_over.get(trial.name) == len(trial.taken_over):
            return  # it had made room for another
        taken_over[trial.name] = len(trial.taken_over)
        print(_line(trial, sum(t.over for t in known.values()), search.samples), flush=True)

    problem = run_trials(
        folder,
        trials,
        lambda trial: search.options(trial.parameters),
        train_trial,
        search.resources,
        room,
        stop,
        tell,
        make_scheduler,
        proposals,
        further,
    )
    if problem:
        print(f"minbert: {problem}", file=sys.stderr, flush=True)


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
        values = [str(trial.parameters[name]) for name in names]
        table.add_row(trial.name, f"{trial.score:.3f}", f"{trial.step}/{trial.steps}", *values)
    Console(width=max(Console().width, 60 + 14 * len(names))).print(table)
    for line in describe_schedule(winner, search.space):
        print(line)
    print(f"Configuration: {folder / 'best.yaml'}   The full run: minbert tune --best {shlex.quote(str(folder))}")
    return ExitCode.FINISHED
