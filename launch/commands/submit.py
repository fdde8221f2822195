"""`minbert submit`: what `minbert train` does, as a job on the cluster: prepare the run folder, queue, and return."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import yaml

from minbert.data.errors import UserError
from minbert.launch.help import Option
from minbert.launch.options import CommandLine, build_run_config, read_command_line, run_option_types
from minbert.launch.submitting import job_settings, prepare_and_submit, with_processes
from minbert.launch.sweep import elements, parse_sweep
from minbert.launch.words import read_options
from minbert.slurm.batch_script import batch_script
from minbert.slurm.settings import JobSettings
from minbert.slurm.status import inspect_runs
from minbert.trainer.config import RunConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.preparation import in_folder, resolve

DESCRIPTION = (
    "Train as a job on a SLURM cluster, or go on with the run in --run: `minbert train` with a queue before it."
)


OPTIONS = {
    "sweep": Option(
        tuple[str, ...], (), "A run for every combination of these values, as job arrays.", "OPTION=VALUE,... ..."
    ),
    "dry_run": Option(bool, False, "Print the batch script and the configuration, and do nothing."),
}


def main(arguments: list[str]) -> int:
    return submit(read_command_line("submit", DESCRIPTION, arguments, OPTIONS))


def submit(line: CommandLine) -> int:
    """Submit the run, or the sweep's runs, that the command line describes."""
    dry, force = line.command.get("dry_run", False), line.run.get("force", False)
    if "sweep" in line.command:
        configs, settings, folder = _sweep(line)
    else:
        config, settings = _reconcile(build_run_config(line.run), line, line.run.get("run"))
        config = in_folder(config)
        configs, folder = [config], config.folder
    if dry:
        _show(configs, settings, folder)
        return ExitCode.FINISHED
    if "sweep" in line.command:
        configs = _unfinished(configs)
    if configs:
        prepare_and_submit(configs, settings, folder, force)
    if configs and settings.executor == "debug":
        return inspect_runs([configs[0].folder])[0].exit_code
    return ExitCode.FINISHED


def _reconcile(config: RunConfig, line: CommandLine, folder: Path | None) -> tuple[RunConfig, JobSettings]:
    """The job has as many processes as the run: either may say how many."""
    job = dict(line.job)
    processes = line.run.get("processes")
    if processes and not job.keys() & {"nodes", "tasks_per_node", "gpus_per_node"}:
        job |= {"nodes": 1, "tasks_per_node": processes}
    settings = job_settings(folder, job)
    if processes and processes != settings.tasks:
        raise UserError(
            f"processes={processes}, but {settings.nodes} node(s) with {settings.processes_per_node} process(es) each "
            f"make {settings.tasks}; leave --processes out"
        )
    return with_processes(config, settings), settings


def _sweep(line: CommandLine) -> tuple[list[RunConfig], JobSettings, Path]:
    """The runs of a sweep, and their folder. Raises UserError."""
    axes = parse_sweep(line.command["sweep"])
    folder = line.run.get("run") or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-sweep"
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run, not a folder for a sweep's runs; give another --run")
    configs = []
    for name, words in elements(axes).items():
        varied, rest = read_options(run_option_types(), words, "submit --sweep")
        if rest:
            raise UserError(
                f"--sweep: what is {rest[0]!r} in {name}? Several words are only for options that take several"
            )
        config, settings = _reconcile(build_run_config(line.run | varied | {"run": folder / name}), line, None)
        configs.append(config)
    return configs, settings, folder


def _unfinished(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """Those of a sweep that are neither finished nor have a job; how the others stand is said."""
    wanted = []
    for config, report in zip(configs, inspect_runs([config.folder for config in configs])):
        if report.active or report.finished:
            print(f"{config.folder.name}: {report.summary}")
        else:
            wanted.append(config)
    return wanted


def _show(configs: Sequence[RunConfig], settings: JobSettings, folder: Path) -> None:
    """The batch script and the resolved configuration, of the first run where there are several."""
    folder = folder.absolute()
    if settings.executor == "slurm":
        paths = folder / "slurm", folder / "code" / "SNAPSHOT", folder / "slurm" / "runs.txt"
        print(batch_script(settings, *paths, folder.name, len(configs)))
    print("# job")
    print(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True), sort_keys=False))
    for config in configs[1:]:
        print(f"# also {config.run}")
    print(f"# {configs[0].run}/config.yaml")
    print(yaml.safe_dump(json.loads(resolve(configs[0]).model_dump_json()), sort_keys=False), end="")
