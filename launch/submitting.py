"""Submitting, whatever the job does: its settings, whether it could ever run, a snapshot of the code, the job, and what
comes next. `minbert submit`, `tune`, `ablate` and `jobs --resubmit` all go this way."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.launch.job import RunJob
from minbert.launch.ownership import lock_runs
from minbert.slurm.records import Records
from minbert.slurm.settings import JobSettings, resolve_settings
from minbert.slurm.snapshot import take_snapshot
from minbert.slurm.submission import Task, refuse_hopeless, submit
from minbert.trainer.config import RunConfig
from minbert.trainer.run.preparation import prepare, total_steps


def job_settings(folder: Path | None, options: Mapping[str, Any]) -> JobSettings:
    """Defaults < the site's file < how what lies in `folder` was submitted last < options. Raises UserError."""
    earlier = Records(folder).submission() if folder else None
    return resolve_settings(options, earlier.settings if earlier else None)


def with_processes(config: RunConfig, settings: JobSettings) -> RunConfig:
    """The run with as many processes as its job has."""
    parallel = config.parallel.model_copy(update={"processes": settings.tasks})
    return config.model_copy(update={"parallel": parallel})


def prepare_and_submit(configs: Sequence[RunConfig], settings: JobSettings, folder: Path, force: bool = False) -> None:
    """Train the runs as jobs; `folder` is the run's own, or that of several. Raises UserError if somebody else trains,
    prepares or has submitted one of them."""
    if settings.executor == "debug" and len(configs) > 1:
        raise UserError("the debug executor runs one run; use executor=local for a sweep")
    refuse_hopeless(settings, folder)
    with lock_runs([config.folder for config in configs]):
        runs = [prepare(config, force, predicts=True).path for config in configs]
        steps = [total_steps(config) for config in configs]
        submit_tasks([run_task(run, step, force) for run, step in zip(runs, steps)], settings, folder)


def run_task(run: Path, total_steps: int | None, force: bool = False) -> Task:
    """Training a prepared run."""
    return Task(run, RunJob(run.absolute(), force), total_steps)


def submit_tasks(tasks: Sequence[Task], settings: JobSettings, folder: Path, kind: str = "Run folder") -> None:
    """Submit what is prepared, and locked, with a snapshot of the code, and say what comes next. `folder` is the
    task's own, or that of several; `kind` is what a task's folder is. Raises UserError."""
    refuse_hopeless(settings, folder)
    folder = folder.absolute()
    ids = submit(tasks, settings, folder / "slurm", take_snapshot(folder / "code"), folder.name)
    for task, job_id in zip(tasks, ids):
        print(f"{kind}: {task.run}   job {job_id}")
    if settings.executor != "debug":
        first = tasks[0].run
        shown = first if len(tasks) == 1 else folder
        print(f"Watch: minbert jobs {shlex.quote(str(shown))}   minbert logs {shlex.quote(str(first))} --follow")
