"""Handing runs to an executor: the batch script's parts, arrays, and the record in each run folder.

The batch script is submitit's: our lines before and after `srun` call the supervisor, which checks the allocation,
records each attempt, and lets the job go on. What is pickled holds the run folder's path only; where the run stands,
its folder says.

sbatch's answer may be lost although the job is queued. So a token is recorded first and travels in the job's comment:
by that the job is found, and the job itself finds its task and leaves its id in the record.
"""

import io
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.slurm import controller
from minbert.slurm.batch_script import python_command, slurm_parameters
from minbert.slurm.records import Records, Submission
from minbert.slurm.settings import UNLIMITED, JobSettings, refuse_control_characters

REFUSED = re.compile(r"sbatch: (error|fatal)")
NEVER_ASKED = re.compile(r"connect failure|Could not establish a configuration source")
LOST_ANSWER = re.compile(r"tim(ed|e) ?out|zero bytes|unexpected message|communicat|contact", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """A run's part of what is submitted: what each of its processes executes, and the steps of its budget, if known."""

    run: Path
    work: Callable[[], Any]
    total_steps: int | None = None


def submit(
    tasks: Sequence[Task], settings: JobSettings, folder: Path, code: Path, name: str, again: bool = False
) -> list[str]:
    """Submit prepared runs, as arrays where there are several, each as large as the site allows.

    `folder`: for submitit's files. `code`: goes onto the jobs' PYTHONPATH. `again`: it is the job itself that is
    submitted anew.

    Returns: the job ids, as ARRAY_INDEX for elements. Raises UserError with SLURM's reason if it refuses.
    """
    size = controller.largest_array() if settings.executor == "slurm" and len(tasks) > 1 else 1
    ids: list[str] = []
    for start in range(0, len(tasks), size):
        ids += _submit_part(tasks[start : start + size], settings, folder, code, name, again)
    return ids


def _submit_part(
    tasks: Sequence[Task], settings: JobSettings, folder: Path, code: Path, name: str, again: bool
) -> list[str]:
    from submitit.core.utils import DelayedSubmission

    folder.mkdir(parents=True, exist_ok=True)
    token, runs = uuid4().hex[:12], [task.run.absolute() for task in tasks]
    runs_file = folder / f"runs-{token}.txt"
    runs_file.write_text("".join(f"{run}\n" for run in runs))
    executor = _executor(settings, folder, code, runs_file, name)

    earlier = [Records(run).submission() for run in runs]
    submissions = [
        Submission(
            job_id="",
            folder=str(folder),
            code=str(code),
            settings=settings.model_dump(mode="json", exclude_defaults=True),
            host=socket.gethostname(),
            submitted=time.time(),
            total_steps=task.total_steps,
            earlier_attempts=before.earlier_attempts if again and before else len(Records(run).attempts()),
            token=token,
            element=None if len(runs) == 1 else index,
            run=str(run),
        )
        for index, (run, task, before) in enumerate(zip(runs, tasks, earlier))
    ]
    _record(runs, submissions)  # a job may start before its id is known here
    for task, submission in zip(tasks, submissions):
        DelayedSubmission(task.work).dump(kept_task(submission))
    jobs: Sequence[Any] = []
    with _submission_environment(code), redirect_stderr(io.StringIO()):  # submitit prints what it raises
        try:
            works = [task.work for task in tasks]
            jobs = [executor.submit(works[0])] if len(works) == 1 else executor.submit_array(works)
            ids = [job.job_id for job in jobs]
        except (subprocess.SubprocessError, RuntimeError) as error:
            if settings.executor != "slurm" or is_refusal(str(error)):
                _record(runs, earlier)
                _forget_tasks(submissions)
                raise UserError(f"SLURM refused the job: {error}") from None
            ids = _lost_and_found(submissions, str(error))
    for run, job_id in zip(runs, ids):
        Records(run).change(token, job_id=job_id)
    if jobs:  # otherwise the job fetches them
        _forget_tasks(submissions)
    if settings.executor == "debug":
        jobs[0].results()
    return ids


def refuse_hopeless(settings: JobSettings, folder: Path) -> None:
    """Raises UserError for a job that could never run, or whose files in `folder` SLURM would misread."""
    if settings.executor == "slurm":
        controller.require_commands()
    path = str(folder.absolute())
    if "%" in path or "\\" in path:
        raise UserError(
            f"{path}: SLURM replaces % and \\ in the names of a job's files; give a folder without them by --run"
        )
    try:
        refuse_control_characters(path, "the run folder")
    except ValueError as error:
        raise UserError(str(error)) from None
    if settings.gpus_per_node and not settings.python:  # another Python may have another PyTorch
        import torch

        if not torch.backends.cuda.is_built():
            raise UserError(
                f"gpus_per_node={settings.gpus_per_node}, but this PyTorch ({torch.__version__}) is built without "
                "CUDA; install one with CUDA, or name the Python that has it by --python"
            )
    if settings.executor == "slurm" and settings.nodes > 1 and (largest := _largest_partition(settings)):
        partition, nodes = largest
        if settings.nodes > nodes:
            raise UserError(
                f"nodes={settings.nodes}, but the partition {partition} has {nodes}: it would wait for ever"
            )


def _largest_partition(settings: JobSettings) -> tuple[str, int] | None:
    additional = settings.slurm_parameters.get("additional_parameters", {})
    elsewhere = {"clusters", "cluster", "partition"} & additional.keys()
    return None if elsewhere else controller.largest_partition(settings.partition)


def is_refusal(complaint: str) -> bool:
    """Whether sbatch says so that SLURM did not take the job; if not, its answer may just be lost."""
    if NEVER_ASKED.search(complaint):
        return True
    return REFUSED.search(complaint) is not None and LOST_ANSWER.search(complaint) is None


def _lost_and_found(submissions: Sequence[Submission], complaint: str) -> list[str]:
    """The ids under which SLURM has the job after all. Raises UserError if it does not tell; the record then keeps the
    token, and whoever looks next asks again."""
    token, problem = submissions[0].token, "it does not list the job"
    complaint = complaint.partition("\nJob instance will not")[0]  # submitit's advice is for its own users
    try:
        if found := controller.find([token]).get(token):
            return [job_id_of(submission, found) for submission in submissions]
    except UserError as error:
        problem = str(error)
    raise UserError(
        f"whether SLURM has taken the job is unknown: {complaint}; asked for it by its token {token}, {problem}. "
        "`minbert jobs` asks again; until that is settled, nothing is submitted."
    )


def job_id_of(submission: Submission, job_id: str) -> str:
    """The run's job: the one that was submitted, or its element of the array."""
    return job_id if submission.element is None else f"{job_id}_{submission.element}"


def kept_task(submission: Submission) -> Path:
    """Where the task lies until the job's id is known."""
    return Path(submission.folder) / f"task-{submission.token}-{submission.element or 0}.pkl"


def _forget_tasks(submissions: Sequence[Submission]) -> None:
    for submission in submissions:
        kept_task(submission).unlink(missing_ok=True)


def _record(runs: Sequence[Path], submissions: Sequence[Submission | None]) -> None:
    for run, submission in zip(runs, submissions):
        Records(run).write_submission(submission)


def submit_anew(run: Path, job_id: str) -> str:
    """From inside job `job_id`: submit it again as it was, alone if it was part of an array; returns the new id."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    submission = Records(run).submission()
    folder = Path(submission.folder)
    work = DelayedSubmission.load(JobPaths(folder, job_id).submitted_pickle).function
    task, settings = Task(run, work, submission.total_steps), submission.job_settings()
    (new,) = submit([task], settings, folder, Path(submission.code), settings.job_name or run.name, again=True)
    return new


def mark_cancelled(run: Path) -> None:
    """From now on no supervisor lets the run's job go on."""
    records = Records(run)
    records.write_submission(replace(records.submission(), cancelled=True))


def _executor(settings: JobSettings, folder: Path, code: Path, runs_file: Path, name: str) -> Any:
    import submitit

    if settings.executor == "debug":
        return submitit.DebugExecutor(folder)
    if settings.executor == "local":
        executor = submitit.LocalExecutor(folder, python=python_command(settings))
        executor.update_parameters(
            timeout_min=settings.minutes or UNLIMITED,
            tasks_per_node=settings.processes_per_node,
            gpus_per_node=settings.gpus_per_node or 0,
            signal_delay_s=settings.signal_before,
            stderr_to_stdout=True,
        )
        return executor
    controller.require_commands()
    executor = submitit.SlurmExecutor(folder, python=python_command(settings))
    executor.update_parameters(**slurm_parameters(settings, code, runs_file, name))
    return executor


@contextmanager
def _submission_environment(code: Path) -> Iterator[None]:
    """What the job inherits: nothing of a job that we may be in, and the snapshot first among the code."""
    before = dict(os.environ)
    path = [str(code), *filter(None, before.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.clear()
    os.environ.update(controller.without_job(before) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path))})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
