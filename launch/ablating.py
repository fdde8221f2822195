"""An ablation under way: its runs one after another here, several at once on Ray, or as jobs on the cluster."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.machine import free_memory
from minbert.launch.many_runs import leave_without_ray
from minbert.launch.trial import train_trial
from minbert.launch.watching import watching
from minbert.slurm.endings import Ending
from minbert.slurm.status import inspect_runs
from minbert.slurm.submission import refuse_hopeless
from minbert.trainer.config import parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.ablation import ABLATION_FILE, Ablation
from minbert.tuning.background import BackgroundTraining, line_on_disk, telling_line
from minbert.tuning.trial import METRIC, Trial, better, score_of


def run_here(ablation: Ablation, trials: Sequence[Trial]) -> int:
    """One run after another, in this process. Raises UserError if the disk is full, or the first run is refused."""
    with StopRequest() as stop:
        for number, trial in enumerate(trials, 1):
            if trial.over:
                continue
            print(f"[{number}/{len(trials)}] {trial.name}", flush=True)
            code, error = _train(trial, ablation.options(trial), stop)
            full = line_on_disk(error) if code != ExitCode.FINISHED else None
            if full or code == ExitCode.INTERRUPTED:
                trial.status = "pending"
                trial.write()
            if full:
                raise UserError(f"{trial.folder}: {full}\nMake room, then repeat the command.")
            if code == ExitCode.INTERRUPTED:
                stop.exit_code = ExitCode.INTERRUPTED
                return ExitCode.INTERRUPTED
            trial.status, trial.ended = "finished" if code == ExitCode.FINISHED else "failed", time.time()
            trial.error = telling_line(error)
            trial.write()
            if code == ExitCode.USER_MISTAKE and not any(other.score is not None for other in trials):
                raise UserError(error)  # the others would fail alike
            if trial.error:
                print(f"{trial.name} failed: {trial.error}", flush=True)
            if stop.signal is not None:
                return ExitCode.INTERRUPTED
    return ExitCode.FINISHED


def _train(trial: Trial, options: dict[str, Any], stop: StopRequest) -> tuple[int, str]:
    """Exit code and error of a run, of which the trial's file tells meanwhile how far it is."""
    trial.status, trial.started, trial.error = "running", trial.started or time.time(), None
    trial.write()
    training = BackgroundTraining(train_trial, trial.folder.absolute(), options, trial.step)
    while not training.over:
        if stop.signal is not None:
            training.end()
        if evaluation := training.next(1.0):
            trial.step, trial.steps = evaluation["step"], training.steps
            trial.score = better(trial.score, score_of(evaluation))
            trial.write()
    free_memory()
    assert training.ending is not None  # it is over
    return training.ending


def run_on_ray(
    folder: Path, ablation: Ablation, trials: Sequence[Trial], address: str | None, begin: Callable[[], None]
) -> int:
    if all(trial.done for trial in trials):
        begin()
        return ExitCode.FINISHED
    from minbert.tuning.cluster import join_or_start

    def tell(trial: Trial) -> None:
        over = sum(other.over for other in trials)
        shown = "" if trial.score is None or not trial.over else f" {trial.score:.3f}"
        print(
            f"[{over}/{len(trials)}] {trial.name} {trial.status}{shown}" + (f": {trial.error}" if trial.error else "")
        )

    where = f"--address {address}" if address else "--ray"
    lost = partial(leave_without_ray, f"minbert ablate --ablation {shlex.quote(str(folder))} {where}")
    with StopRequest() as stop:
        with join_or_start(address, folder, lost):
            from minbert.tuning.driver import TrialRunner
            from minbert.tuning.strategy import Strategy

            runner = TrialRunner(
                folder,
                options=ablation.options,
                train=train_trial,
                resources=ablation.resources,
                parallel=parse_config(ablation.baseline, ABLATION_FILE).parallel,
            )
            begin()
            with watching(folder):
                problem = runner.run(trials, stop=stop, tell=tell, strategy=Strategy())
            if problem:
                print(f"minbert: {problem}", file=sys.stderr, flush=True)
        stop.exit_code = ExitCode.INTERRUPTED if stop.signal is not None else ExitCode.FINISHED
    return ExitCode.FINISHED if all(trial.over for trial in trials) else ExitCode.INTERRUPTED


def submit_missing(
    folder: Path, ablation: Ablation, trials: Sequence[Trial], job: Mapping[str, Any], begin: Callable[[], None]
) -> None:
    """Look how the runs stand on the cluster, and submit those that are neither finished nor have a job."""
    from minbert.launch.submitting import job_settings, prepare_and_submit, with_processes
    from minbert.trainer.run.out_of_memory import as_cut  # imports PyTorch

    settings = job_settings(None, job)
    refuse_hopeless(settings, folder)
    begin()
    missing = []
    for trial, report in zip(trials, inspect_runs([trial.folder for trial in trials])):
        scores = [record[METRIC] for record in trial.evaluations()]
        trial.score, trial.steps = max(scores, default=None), report.total
        trial.step = trial.evaluations()[-1]["step"] if scores else 0
        trial.status = "finished" if report.finished else "running" if report.active and report.nodes else "pending"
        trial.error = None
        if report.state in (Ending.FAILED, Ending.OUT_OF_MEMORY):
            trial.status, trial.error = "failed", report.detail or None
        trial.write()
        if trial.status != "finished" and not report.active:
            missing.append(trial)
    if missing:
        asked = (parse_config(ablation.options(trial) | {"run": trial.folder}, trial.name) for trial in missing)
        configs = [as_cut(config) for config in asked]
        prepare_and_submit([with_processes(config, settings) for config in configs], settings, folder)
