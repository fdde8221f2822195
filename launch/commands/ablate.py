"""`minbert ablate`: what each extension of the baseline brings, alone, added up, left out, and combined, over seeds."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError
from minbert.data.files import replacing, to_json
from minbert.data.reading import read_yaml
from minbert.launch.many_runs import (
    Own,
    check_data_and_model,
    leave_without_ray,
    only_driver,
    read_command_line,
    retry_failed,
)
from minbert.launch.options import build_run_config
from minbert.launch.trial import train_trial
from minbert.slurm.settings import parse_parameters, resolve_settings
from minbert.slurm.status import is_active
from minbert.trainer.config import Seed, flat_options, flatten, parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.ablation import (
    ABLATION_FILE,
    DEFAULT,
    GROUPS,
    PAPER_BASELINE,
    TITLES,
    Ablation,
    combination,
    extension,
    plan,
    refuse_other_ablation,
)
from minbert.tuning.comparison import Row, compare
from minbert.tuning.search import Resources, base_options
from minbert.tuning.space import Parameters
from minbert.tuning.trial import LOCK, METRIC, Trial, better, score_of

DESCRIPTION = (
    "Measure extensions against the paper's baseline (features=baseline, hidden_layers=1, freeze=encoder), or go on "
    "with the ablation in --ablation. Options of a run hold for every variant."
)

OWN = {
    "ablation": Own(
        Path, None, "Folder of the ablation; one that exists goes on. The default is a new one under runs/.", "FOLDER"
    ),
    "extensions": Own(
        Annotated[tuple[str, ...], Field(min_length=1)],
        DEFAULT,
        "In the order in which they are added: siamese, two_hidden_layers, unfrozen, any aggregator, or "
        "NAME=OPTION:VALUE,...",
    ),
    "groups": Own(
        Annotated[tuple[Literal["alone", "added", "left_out"], ...], Field(min_length=1)],
        GROUPS[:3],
        "Comparisons to make.",
    ),
    "combine": Own(
        Annotated[tuple[str, ...], Field(min_length=1)], (), "Further combinations, such as siamese+pcgrad."
    ),
    "seeds": Own(
        Annotated[tuple[Seed, ...], Field(min_length=1)], (0, 1, 2), "Each variant is trained with each of them."
    ),
    "retry_failed": Own(bool, False, "Try the runs again that failed for good."),
    "ray": Own(bool, False, "Train several runs at once with Ray on this machine."),
    "address": Own(str, None, "Train on an existing Ray cluster: host:port, or `auto`.", "ADDRESS"),
    "slurm": Own(bool, False, "Train on the cluster, as an array of jobs."),
}


def main(arguments: list[str]) -> int:
    own, job, run = read_command_line(OWN, arguments, "ablate", DESCRIPTION)
    for name, instead in (("run", "ablation"), ("seed", "seeds")):
        if name in run:
            raise UserError(f"each run of an ablation has its own {name}; --{instead} says which")
    folder = own.get("ablation") or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-ablation"
    with only_driver(folder):
        ablation = _resolve(folder, own, run)
        check_data_and_model(parse_config(ablation.baseline, ABLATION_FILE))
        if not own.get("slurm"):
            _refuse_queued_runs(folder, ablation)
        print(f"Ablation: {folder}", flush=True)
        trials = ablation.trials(folder)
        over = sum(trial.over for trial in trials)
        variants, seeds = len(ablation.variants), len(ablation.seeds)
        print(f"{variants} variants with {seeds} seeds: {len(trials)} runs, {over} are over.", flush=True)
        begin = partial(_begin, folder, ablation, trials, own.get("retry_failed", False))
        if own.get("slurm"):
            _queue_missing(folder, ablation, trials, job, begin)
            if left := sum(trial.status != "finished" for trial in trials):
                print(f"{left} runs are not finished. Repeat the command when they are, for the table.")
                return ExitCode.FINISHED
            return _conclude(folder, ablation, trials)
        if own.get("ray") or "address" in own:
            code = _run_on_ray(folder, ablation, trials, own.get("address"), begin)
        else:
            begin()
            code = _run_here(ablation, trials)
        if code == ExitCode.INTERRUPTED:
            print(f"Stopped, and saved. To go on: minbert ablate --ablation {shlex.quote(str(folder))}")
        return code if code != ExitCode.FINISHED else _conclude(folder, ablation, trials)


def _begin(folder: Path, ablation: Ablation, trials: Sequence[Trial], retry: bool) -> None:
    """Write what is to be done, when nothing can refuse it any more."""
    ablation.write(folder)
    for trial in trials:
        trial.write()
    if retry:
        retry_failed(trials)


def _refuse_queued_runs(folder: Path, ablation: Ablation) -> None:
    for trial in ablation.trials(folder):
        if not trial.over and is_active(trial.folder):
            raise UserError(
                f"{trial.folder} has a job; wait for it with --slurm, or end it by `minbert cancel {folder}`"
            )


def _resolve(folder: Path, own: Mapping[str, Any], run: dict[str, Any]) -> Ablation:
    """The ablation that the options, and what the folder holds already, describe. Raises UserError."""
    saved = Ablation.read(folder) if (folder / ABLATION_FILE).exists() else None
    if saved is None and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no ablation: it has no {ABLATION_FILE}. Give another --ablation.")
    baseline = _baseline(run, saved)
    if saved is not None and "extensions" not in own:
        extensions = saved.extensions
    else:
        extensions = dict(extension(word) for word in own.get("extensions", DEFAULT))
    wanted = own.get("groups", [name for name in saved.groups if name != "named"] if saved else GROUPS[:3])
    variants, groups = plan(extensions, wanted, [])
    if "combine" in own:
        named = [combination(word, extensions) for word in own["combine"]]
        every = extensions | {name: change for members in named for name, change in members.items()}
        more = plan(every, ["named"], [list(members) for members in named])
        variants, groups = variants | more[0], groups | more[1]
    elif saved is not None and "named" in saved.groups:
        groups["named"] = saved.groups["named"]
        variants |= {name: saved.variants[name] for name in groups["named"]}
    resources = (saved.resources if saved else Resources()).model_dump()
    resources |= {name: value for name, value in own.items() if name in Resources.model_fields}
    seeds = list(dict.fromkeys(own.get("seeds", saved.seeds if saved else OWN["seeds"].default)))
    ablation = Ablation(
        baseline=baseline, extensions=extensions, variants=variants, groups=groups, seeds=seeds, resources=resources
    )
    ablation.check()
    if saved is not None:
        refuse_other_ablation(folder, saved, ablation)
    return ablation


def _baseline(run: dict[str, Any], saved: Ablation | None) -> Parameters:
    """The paper's, the folder's, or what options and a file make of it."""
    given = dict(saved.baseline) if saved is not None else dict(PAPER_BASELINE)
    if "config" in run:
        content = flat_options(read_yaml(run["config"]), str(run["config"]))
        given = {name: value for name, value in given.items() if name not in content}
    config = build_run_config(given | run)
    return {name: flatten(config)[name] for name in PAPER_BASELINE} | base_options(config)


def _run_here(ablation: Ablation, trials: Sequence[Trial]) -> int:
    """One run after another, in this process."""
    from minbert.tuning.background import BackgroundTraining, free_memory, tells_of_disk

    with StopRequest() as stop:
        for number, trial in enumerate(trials, 1):
            if trial.over:
                continue
            print(f"[{number}/{len(trials)}] {trial.name}", flush=True)
            trial.status, trial.started, trial.error = "running", trial.started or time.time(), None
            trial.write()
            training = BackgroundTraining(train_trial, trial.folder.absolute(), ablation.options(trial), trial.step)
            while not training.over:
                if stop.signal is not None:
                    training.end()
                if evaluation := training.next(1.0):
                    trial.step, trial.steps = evaluation["step"], training.steps
                    trial.score = better(trial.score, score_of(evaluation))
                    trial.write()
            free_memory()
            code, error = training.ending
            if code != ExitCode.FINISHED and tells_of_disk(error):
                trial.status = "pending"
                trial.write()
                raise UserError(
                    f"{trial.folder}: {error.strip().splitlines()[-1]}\nMake room, then repeat the command."
                )
            if code == ExitCode.INTERRUPTED:
                trial.status = "pending"
                trial.write()
                stop.exit_code = ExitCode.INTERRUPTED
                return ExitCode.INTERRUPTED
            trial.status, trial.ended = "finished" if code == ExitCode.FINISHED else "failed", time.time()
            trial.error = error.strip().splitlines()[-1] if error else None
            trial.write()
            if code == ExitCode.USER_MISTAKE and not any(other.score is not None for other in trials):
                raise UserError(error)  # the others would fail alike
            if trial.error:
                print(f"{trial.name} failed: {trial.error}", flush=True)
            if stop.signal is not None:
                return ExitCode.INTERRUPTED
    return ExitCode.FINISHED


def _run_on_ray(
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

    parallel = parse_config(ablation.baseline, ABLATION_FILE).parallel
    where = f"--address {address}" if address else "--ray"
    lost = partial(leave_without_ray, f"minbert ablate --ablation {shlex.quote(str(folder))} {where}")
    with StopRequest() as stop:
        with join_or_start(address, folder, lost):
            from minbert.tuning.driver import find_room, run_trials

            resources = ablation.resources
            room = find_room(resources, parallel)
            begin()
            problem = run_trials(folder, trials, ablation.options, train_trial, resources, room, stop, tell)
            if problem:
                print(f"minbert: {problem}", file=sys.stderr, flush=True)
        stop.exit_code = ExitCode.INTERRUPTED if stop.signal is not None else ExitCode.FINISHED
    return ExitCode.FINISHED if all(trial.over for trial in trials) else ExitCode.INTERRUPTED


def _queue_missing(
    folder: Path, ablation: Ablation, trials: Sequence[Trial], job: dict[str, Any], begin: Callable[[], None]
) -> None:
    """Look how the runs stand on the cluster, and queue those that are neither finished nor queued."""
    from minbert.launch.commands.submit import prepare_and_queue
    from minbert.slurm.status import look

    if "slurm_parameters" in job:
        job["slurm_parameters"] = parse_parameters(job["slurm_parameters"])
    settings = resolve_settings(job)
    begin()
    missing = []
    for trial, report in zip(trials, look([trial.folder for trial in trials])):
        scores = [record[METRIC] for record in trial.evaluations()]
        trial.score, trial.steps = max(scores, default=None), report.total
        trial.step = trial.evaluations()[-1]["step"] if scores else 0
        trial.status = "finished" if report.finished else "running" if report.active and report.nodes else "pending"
        trial.error = None
        if report.state == "failed":
            trial.status, trial.error = "failed", report.detail or None
        trial.write()
        if trial.status != "finished" and not report.active:
            missing.append(trial)
    if missing:
        configs = []
        for trial in missing:
            config = parse_config(ablation.options(trial) | {"run": trial.folder}, trial.name)
            parallel = config.parallel.model_copy(update={"processes": settings.tasks})
            configs.append(config.model_copy(update={"parallel": parallel}))
        prepare_and_queue(configs, settings, folder)


def _conclude(folder: Path, ablation: Ablation, trials: Sequence[Trial]) -> int:
    """Print the tables, and leave them in summary.json."""
    rows = {row.variant: row for row in compare(ablation, trials)}
    if not any(row.scores for row in rows.values()):
        failed = next((trial for trial in trials if trial.error), None)
        raise UserError(
            f"no run of {folder} has a score" + (f"; the first failed with: {failed.error}" if failed else "")
        )
    console = Console(width=max(Console().width, 140))
    for group, names in ablation.groups.items():
        console.print(
            _table(f"{TITLES[group]} (mean ± deviation of {len(ablation.seeds)} seeds)", [rows[n] for n in names])
        )
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(to_json([asdict(row) for row in rows.values()], indent=2) + "\n")
    print(f"Summary: {folder / 'summary.json'}")
    return ExitCode.FINISHED


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    columns = list(next((row.scores for row in rows if row.scores), {}))
    for heading in ("variant", *columns, "to the baseline [95%], ahead"):
        table.add_column(heading)
    for row in rows:
        failed = f" ({row.failed} failed)" if row.failed else ""
        scores = [str(row.scores[name]) if name in row.scores else "" for name in columns]
        table.add_row(row.variant + failed, *scores, str(row.difference or ""))
    return table
