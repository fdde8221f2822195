"""Handing runs to an executor: the batch script's parts, arrays, and the record in each run folder.

The batch script is submitit's: our lines before and after `srun` call the supervisor, which checks the allocation,
records each life, and lets the job go on. What is pickled holds the run folder's path only; where the run stands, its
folder says.
"""

import io
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.slurm import controller
from minbert.slurm.records import Records, Submission
from minbert.slurm.settings import UNLIMITED, JobSettings

SUPERVISOR = "minbert.slurm.supervisor"


def submit(
    runs: Sequence[Path],
    tasks: Sequence[Callable[[], Any]],
    settings: JobSettings,
    folder: Path,
    code: Path,
    total_steps: Sequence[int | None],
    name: str,
    again: bool = False,
) -> list[str]:
    """Submit the prepared `runs`; `tasks[i]` is what each process of `runs[i]` executes.

    Several runs become arrays, each as large as the site allows. `folder`: for submitit's files. `code`: goes onto the
    jobs' PYTHONPATH. `again`: it is the job itself that is submitted anew.

    Returns: the job ids, as ARRAY_INDEX for elements. Raises UserError with SLURM's reason if it refuses.
    """
    runs = [run.absolute() for run in runs]
    size = controller.largest_array() if settings.executor == "slurm" and len(runs) > 1 else 1
    ids: list[str] = []
    for start in range(0, len(runs), size):
        part = slice(start, start + size)
        ids += _submit_part(runs[part], tasks[part], settings, folder, code, total_steps[part], name, again)
    return ids


def _submit_part(
    runs: Sequence[Path],
    tasks: Sequence[Callable[[], Any]],
    settings: JobSettings,
    folder: Path,
    code: Path,
    total_steps: Sequence[int | None],
    name: str,
    again: bool,
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    runs_file = folder / f"runs-{uuid4().hex[:8]}.txt"
    runs_file.write_text("".join(f"{run}\n" for run in runs))

    earlier = [Records(run).submission() for run in runs]
    submissions = [
        Submission(
            job_id="",
            folder=str(folder),
            code=str(code),
            settings=settings.model_dump(mode="json", exclude_defaults=True),
            host=socket.gethostname(),
            submitted=time.time(),
            total_steps=steps,
            earlier_lives=before.earlier_lives if again and before else len(Records(run).lives()),
        )
        for run, steps, before in zip(runs, total_steps, earlier)
    ]
    _record(runs, submissions)  # a job may start before its id is known here
    executor = _executor(settings, folder, code, runs_file, name)
    with _submission_environment(code), redirect_stderr(io.StringIO()):  # submitit prints what it raises
        try:
            jobs = [executor.submit(tasks[0])] if len(runs) == 1 else executor.submit_array(tasks)
        except (subprocess.SubprocessError, RuntimeError) as error:
            _record(runs, earlier)
            raise UserError(f"SLURM refused the job: {error}") from None
    _record(runs, [replace(submission, job_id=job.job_id) for submission, job in zip(submissions, jobs)])
    if settings.executor == "debug":
        jobs[0].results()
    return [job.job_id for job in jobs]


def _record(runs: Sequence[Path], submissions: Sequence[Submission | None]) -> None:
    for run, submission in zip(runs, submissions):
        Records(run).write_submission(submission)


def submit_anew(run: Path, job_id: str) -> str:
    """From inside job `job_id`: submit it again as it was, alone if it was part of an array; returns the new id."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    submission = Records(run).submission()
    folder = Path(submission.folder)
    task = DelayedSubmission.load(JobPaths(folder, job_id).submitted_pickle).function
    (new,) = submit(
        [run],
        [task],
        submission.job_settings(),
        folder,
        Path(submission.code),
        [submission.total_steps],
        submission.job_settings().job_name or run.name,
        again=True,
    )
    return new


def mark_cancelled(run: Path) -> None:
    """From now on no supervisor lets the run's job go on."""
    records = Records(run)
    records.write_submission(replace(records.submission(), cancelled=True))


def batch_script(settings: JobSettings, folder: Path, code: Path, runs_file: Path, name: str, array: int = 1) -> str:
    """What sbatch would get, for a job or an array."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python(settings)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = slurm_parameters(settings, code, runs_file, name)
    return _make_sbatch_string(command=command, folder=folder, map_count=array if array > 1 else None, **parameters)


def slurm_parameters(settings: JobSettings, code: Path, runs_file: Path, name: str) -> dict[str, Any]:
    """The settings in the words of submitit's SLURM executor."""
    supervisor = f"{shlex.quote(sys.executable)} -m {SUPERVISOR}"
    file = shlex.quote(str(runs_file))
    srun_args = ["--kill-on-bad-exit=1"]
    if settings.cpus_per_task:
        srun_args.append(f"--cpus-per-task={settings.cpus_per_task}")  # srun has not inherited it since 22.05
    more = dict(settings.slurm_parameters)
    additional = {"requeue": True} | dict(more.pop("additional_parameters", {}))
    if settings.reservation:
        additional["reservation"] = settings.reservation
    return {
        "job_name": settings.job_name or name,
        "time": settings.minutes,
        "nodes": settings.nodes,
        "ntasks_per_node": settings.processes_per_node,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task,
        "mem": settings.mem,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "signal_delay_s": settings.signal_before,
        "array_parallelism": settings.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [
            *settings.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "trap : TERM  # this script outlives SIGTERM, to say how its processes ended",
            f"{supervisor} begin {file} || exit $?",
        ],
        "srun_args": [*srun_args, *settings.srun_args],
        "teardown": [f"{supervisor} end {file} $?"],
        "additional_parameters": additional,
        **more,
    }


def _executor(settings: JobSettings, folder: Path, code: Path, runs_file: Path, name: str) -> Any:
    import submitit

    if settings.executor == "debug":
        return submitit.DebugExecutor(folder)
    if settings.executor == "local":
        executor = submitit.LocalExecutor(folder, python=_python(settings))
        executor.update_parameters(
            timeout_min=settings.minutes or UNLIMITED,
            tasks_per_node=settings.processes_per_node,
            gpus_per_node=settings.gpus_per_node or 0,
            signal_delay_s=settings.signal_before,
            stderr_to_stdout=True,
        )
        return executor
    try:
        executor = submitit.SlurmExecutor(folder, python=_python(settings))
    except RuntimeError:
        raise UserError("there is no SLURM here; try --executor local, or log in to the cluster") from None
    executor.update_parameters(**slurm_parameters(settings, code, runs_file, name))
    return executor


def _python(settings: JobSettings) -> str:
    return settings.python or shlex.quote(sys.executable)


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
