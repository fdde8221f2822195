"""`minbert submit`: what `minbert train` does, as a job on the cluster: prepare the run folder, queue, and return."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import create_model

from minbert.data.errors import UserError
from minbert.launch.options import (
    asks_for_help,
    build_run_config,
    open_option,
    quiet,
    read_options,
    refuse_words,
    run_option_types,
    show_help,
)
from minbert.launch.ownership import own
from minbert.launch.sweep import elements, parse_sweep
from minbert.slurm.batch_script import batch_script
from minbert.slurm.records import Records
from minbert.slurm.settings import JobSettings, parse_parameters, resolve_settings
from minbert.slurm.status import look
from minbert.slurm.submission import refuse_hopeless, submit
from minbert.trainer.config import RunConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.preparation import new_run_path, prepare, resolve, total_steps

DESCRIPTION = (
    "Train as a job on a SLURM cluster, or go on with the run in --run: `minbert train` with a queue before it."
)


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run: dict[str, Any]  # options of the run
    job: dict[str, Any]  # of the job
    sweep: dict[str, list[str]]
    dry: bool


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        show_help(DESCRIPTION, "submit", _help())
    request = read_request(arguments)
    folder = Path(request.run["run"]) if request.run.get("run") else None
    if request.sweep:
        return _submit_sweep(request, folder)
    earlier = Records(folder).submission() if folder else None
    config, settings = _reconcile(build_run_config(request.run), request, earlier.settings if earlier else None)
    if config.run is None:
        config = config.model_copy(update={"run": new_run_path(config)})
    if request.dry:
        _show([config], settings, config.run)
        return ExitCode.FINISHED
    prepare_and_queue([config], settings, config.run, force=bool(request.run.get("force")))
    return look([config.run])[0].exit_code if settings.executor == "debug" else ExitCode.FINISHED


def read_request(arguments: list[str]) -> Request:
    """Options of the run and of the job, told apart by name. Raises UserError."""
    job_types = {name: field.rebuild_annotation() for name, field in JobSettings.model_fields.items()}
    types = run_option_types() | job_types | {"slurm_parameters": tuple[str, ...], "sweep": tuple[str, ...]}
    options, rest = read_options(types | {"dry_run": bool}, arguments, "submit")
    refuse_words(rest)
    dry, sweep = options.pop("dry_run", False), options.pop("sweep", None)
    if "slurm_parameters" in options:
        options["slurm_parameters"] = parse_parameters(options["slurm_parameters"])
    return Request(
        run={name: value for name, value in options.items() if name not in job_types},
        job={name: value for name, value in options.items() if name in job_types},
        sweep={} if sweep is None else parse_sweep(sweep),
        dry=dry,
    )


def _reconcile(
    config: RunConfig, request: Request, earlier: Mapping[str, Any] | None = None
) -> tuple[RunConfig, JobSettings]:
    """The job has as many processes as the run: either may say how many."""
    job = dict(request.job)
    processes = request.run.get("processes")
    if processes and not job.keys() & {"nodes", "tasks_per_node", "gpus_per_node"}:
        job |= {"nodes": 1, "tasks_per_node": processes}
    settings = resolve_settings(job, earlier)
    if processes and processes != settings.tasks:
        raise UserError(
            f"processes={processes}, but {settings.nodes} node(s) with {settings.processes_per_node} process(es) each "
            f"make {settings.tasks}; leave --processes out"
        )
    parallel = config.parallel.model_copy(update={"processes": settings.tasks})
    return config.model_copy(update={"parallel": parallel}), settings


def _submit_sweep(request: Request, folder: Path | None) -> int:
    folder = folder or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-sweep"
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run, not a folder for a sweep's runs; give another --run")
    configs = []
    for name, words in elements(request.sweep).items():
        varied, rest = read_options(run_option_types(), words, "submit --sweep")
        if rest:
            raise UserError(
                f"--sweep: what is {rest[0]!r} in {name}? Several words are only for options that take several"
            )
        config, settings = _reconcile(build_run_config(request.run | varied | {"run": folder / name}), request)
        configs.append(config)
    if request.dry:
        _show(configs, settings, folder)
        return ExitCode.FINISHED
    reports = look([config.run for config in configs])
    wanted = [config for config, report in zip(configs, reports) if not report.active and not report.finished]
    for config, report in zip(configs, reports):
        if config not in wanted:
            print(f"{config.run.name}: {report.summary}")
    if wanted:
        prepare_and_queue(wanted, settings, folder, force=bool(request.run.get("force")))
    return ExitCode.FINISHED


def prepare_and_queue(configs: Sequence[RunConfig], settings: JobSettings, folder: Path, force: bool = False) -> None:
    """`folder` is the run's own, or that of several. Raises UserError if somebody else trains, prepares or has queued
    one of the runs."""
    if settings.executor == "debug" and len(configs) > 1:
        raise UserError("the debug executor runs one run; use executor=local for a sweep")
    refuse_hopeless(settings, folder)
    with own([config.run for config in configs]):
        runs = [prepare(config, force).path for config in configs]
        queue(runs, settings, folder, [total_steps(config) for config in configs], force)


def queue(
    runs: Sequence[Path], settings: JobSettings, folder: Path, steps: Sequence[int | None], force: bool = False
) -> None:
    """Submit prepared runs, which we own, with a snapshot of the code, and say what comes next."""
    from minbert.launch.job import RunJob
    from minbert.slurm.snapshot import take_snapshot

    folder = folder.absolute()
    code = take_snapshot(folder / "code")
    tasks = [RunJob(run.absolute(), force) for run in runs]
    ids = submit(runs, tasks, settings, folder / "slurm", code, steps, folder.name)
    for run, job_id in zip(runs, ids):
        print(f"Run folder: {run}   job {job_id}")
    if settings.executor != "debug":
        shown = shlex.quote(str(runs[0] if len(runs) == 1 else folder))
        print(f"Watch: minbert jobs {shown}   minbert logs {shlex.quote(str(runs[0]))} --follow")


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


def _help() -> dict[str, Any]:
    """Our own options, as `--help` shows them."""
    sweep = open_option("OPTION=VALUE,... ...", help="A run for every combination of these values, as job arrays.")
    parameters = open_option("NAME=VALUE ...", help=JobSettings.model_fields["slurm_parameters"].description)
    words = tuple[str, ...]
    job = create_model(
        "JobSettings",
        __base__=quiet(JobSettings),
        __doc__=JobSettings.__doc__,
        slurm_parameters=(Annotated[words, parameters], ()),
    )
    dry = tyro.conf.arg(help="Print the batch script and the configuration, and do nothing.")
    return {
        "sweep": (Annotated[words, sweep], ()),
        "dry_run": (Annotated[bool, dry], False),
        "job": (job, job()),
    }
