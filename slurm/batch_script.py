"""The batch script: submitit's, with our lines before and after `srun`, which call the supervisor."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minbert.slurm import controller
from minbert.slurm.settings import JobSettings

SUPERVISOR = "minbert.slurm.supervisor"


def batch_script(settings: JobSettings, folder: Path, code: Path, runs_file: Path, name: str, array: int = 1) -> str:
    """What sbatch would get, for a job or an array."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{python_command(settings)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
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
    comment = f"{more.pop('comment', '')} {controller.comment(token_of(runs_file))}".strip()
    python_path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
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
        "comment": comment,
        "signal_delay_s": settings.signal_before,
        "array_parallelism": settings.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [
            "trap : TERM  # this script outlives SIGTERM, to say how its processes ended",
            *(watched(settings.setup, f"{python_path}; {supervisor} setup {file}") if settings.setup else ()),
            python_path,
            f"{supervisor} begin {file} || exit $?",
        ],
        "srun_args": [*srun_args, *settings.srun_args],
        "teardown": [f"{supervisor} end {file} $?"],
        "additional_parameters": additional,
        **more,
    }


def watched(lines: Sequence[str], failed: str) -> list[str]:
    """The user's lines of bash. One that fails, or leaves, ends the script by `failed`, which gets status and line;
    what fails inside a file that a line reads is that file's business."""
    leave = f'status=$? line=$BASH_COMMAND; {failed} $status "$line"; exit $?'
    return [
        "trap 'status=$?; [ ${#BASH_SOURCE[@]} -gt 1 ] || exit $status' ERR",
        f"trap {shlex.quote(leave)} EXIT",
        *lines,
        "trap - ERR EXIT",
    ]


def python_command(settings: JobSettings) -> str:
    return settings.python or shlex.quote(sys.executable)


def token_of(runs_file: Path) -> str:
    return runs_file.stem.removeprefix("runs-")
