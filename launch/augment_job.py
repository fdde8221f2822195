"""What an element of an augmentation's job array executes: its share of the units, and the files, if it is the last.

`AugmentJob` is what is pickled. An element that starts again takes from the output folder what is done; so does a
command that is typed while the array runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from minbert.data.augmentation.work import local_devices, missing, translate
from minbert.data.errors import UserError
from minbert.launch.job import run_task
from minbert.launch.ownership import lock_runs
from minbert.launch.submitting import job_settings, submit_tasks
from minbert.launch.translation import SentenceProgress, Work, finish, make_output
from minbert.slurm.allocation import Allocation
from minbert.slurm.submission import Task, refuse_hopeless
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest


class Stop(Exception):
    """The element was asked to leave; the units that it finished are kept."""


class AugmentJob:
    """Every `parts`-th unit of `work`, from the `part`-th on. `folder` holds the records. Returns 0 (finished)
    or 75 (stopped, saved)."""

    def __init__(self, work: Work, folder: Path, part: int, parts: int):
        self.work, self.folder, self.part, self.parts = work, folder, part, parts

    def __call__(self) -> int:
        return run_task(self.folder, self._translate)

    def _translate(self, allocation: Allocation, stop: StopRequest) -> int:
        work, console = self.work, Console(stderr=True)
        left = missing(work.store, work.units[self.part :: self.parts])
        devices = local_devices(work.translator_model, work.processes)
        try:
            with SentenceProgress(sum(count for _, count in left), console) as progress:

                def advance(count: int) -> None:
                    progress(count)
                    if stop.signal is not None:
                        raise Stop

                translate(work.workshop, [unit for unit, _ in left], devices, advance)
        except Stop:
            return ExitCode.INTERRUPTED
        if not missing(work.store, work.units):
            finish(work, console)
            console.print(f"All is translated: {', '.join(str(work.file(name)) for name in work.examples)}")
        return ExitCode.FINISHED


def submit_array(work: Work, elements: int, options: Mapping[str, Any]) -> None:
    """Submit the augmentation as an array of so many jobs, at most one for each unit. Raises UserError."""
    work = work.absolute()
    work.check()
    units = len(work.units)
    settings = job_settings(None, {"nodes": 1, "tasks_per_node": 1} | dict(options))
    if settings.executor != "slurm":
        raise UserError("--slurm is for the cluster; leave it out to translate on this machine")
    if settings.tasks > 1:
        raise UserError(f"{settings.tasks} processes in a job: an element is one, which uses all that its node gives")
    refuse_hopeless(settings, work.output)
    make_output(work)
    parts = min(elements, units)
    folders = [work.output / "elements" / str(part) for part in range(parts)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with lock_runs(folders):
        tasks = [Task(folder, AugmentJob(work, folder, part, parts)) for part, folder in enumerate(folders)]
        submit_tasks(tasks, settings, work.output / "elements", kind="Element")
