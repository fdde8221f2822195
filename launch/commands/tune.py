"""`minbert tune`: search hyperparameters with Ray Tune, here, on a Ray cluster, or inside a SLURM allocation."""

import shlex
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from minbert.data.errors import UserError
from minbert.data.reading import read_yaml
from minbert.launch.many_runs import (
    Own,
    check_data_and_model,
    leave_without_ray,
    only_driver,
    read_command_line,
    refuse_queued,
    retry_failed,
)
from minbert.launch.options import build_run_config
from minbert.launch.searching import run_search
from minbert.slurm.settings import parse_parameters, resolve_settings
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.search import (
    SEARCH_FILE,
    Resources,
    Search,
    base_options,
    explain,
    refuse_other_search,
)
from minbert.tuning.space import Space, check_space, paper_space, parse_space, read_space
from minbert.tuning.trial import LOCK, best

DESCRIPTION = (
    "Search hyperparameters, or go on with the search in --search. Options of a run hold for every trial. "
    "`minbert tune --best SEARCH [--run NEW] [options]` starts the full run from the best trial."
)
SAMPLES = 20
EVALUATIONS = 10  # of each trial: what it is judged by while it runs

OWN = {
    "search": Own(
        Path, None, "Folder of the search; one that exists goes on. The default is a new one under runs/.", "FOLDER"
    ),
    "space": Own(
        Annotated[tuple[str, ...], Field(min_length=1)],
        (),
        "What to search: a YAML file, or words such as lr=loguniform(1e-5,1e-4) batch_size=16,32. The default is what "
        "the paper wanted to search.",
        "FILE|OPTION=VALUES ...",
    ),
    "samples": Own(Annotated[int, Field(ge=1)], SAMPLES, "Trials; a grid has as many as it has combinations."),
    "algorithm": Own(Literal["random", "grid", "tpe"], "random", "How trials are chosen; tpe needs Optuna."),
    "scheduler": Own(
        Literal["asha", "pbt", "none"],
        "asha",
        "What becomes of trials that fall behind: ASHA stops them early; in population-based training (pbt) they go on "
        "from where one that is ahead is, with other learning rates, decay or dropout.",
    ),
    "reduction": Own(Annotated[float, Field(gt=1)], 3.0, "ASHA lets one in this many go on."),
    "grace": Own(Annotated[float, Field(gt=0, lt=1)], 0.1, "Share of its budget after which a trial is judged first."),
    "retry_failed": Own(bool, False, "Try the trials again that failed for good."),
    "address": Own(str, None, "An existing Ray cluster to use, as host:port or `auto`.", "ADDRESS"),
    "slurm": Own(bool, False, "Run inside an allocation of SLURM, with Ray on all its nodes."),
    "best": Own(Path, None, "Start the full run from the best trial of this search.", "FOLDER"),
}


def main(arguments: list[str]) -> int:
    own, job, run = read_command_line(OWN, arguments, "tune", DESCRIPTION)
    if "best" in own:
        return _start_best(own, job, run)
    if "run" in run:
        raise UserError("each trial has a run folder of its own; --search names the folder of the search")
    folder = own.get("search") or _new_folder()
    if own.get("slurm"):
        refuse_queued(folder)  # rather than that somebody holds the lock
    with only_driver(folder):
        search = _resolve(folder, own, run)
        refuse_queued(folder)
        trials, retry = search.trials(folder), own.get("retry_failed", False)
        if retry or len(trials) < search.samples or any(not trial.over for trial in trials):
            check_data_and_model(parse_config(search.base | search.sources(), SEARCH_FILE))
        if own.get("slurm"):
            return _submit(folder, search, job, retry)
        print(f"Search: {folder}", flush=True)
        from minbert.tuning.cluster import join_or_start

        again = f"minbert tune --search {shlex.quote(str(folder))}"
        elsewhere = f" --address {own['address']}" if "address" in own else ""
        start = partial(join_or_start, own.get("address"), folder, partial(leave_without_ray, again + elsewhere))
        with StopRequest() as stop:
            code = run_search(folder, search, stop, start, retry)
            stop.exit_code = code
    if code == ExitCode.INTERRUPTED:
        print(f"Stopped, and saved. To go on: {again}{elsewhere}")
    return code


def _resolve(folder: Path, own: Mapping[str, Any], run: Mapping[str, Any]) -> Search:
    """The search that the options, and what the folder holds already, describe. Raises UserError."""
    saved = Search.read(folder) if (folder / SEARCH_FILE).exists() else None
    if saved is None and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no search: it has no {SEARCH_FILE}. Give another --search.")
    inherited = dict(saved.base) if saved is not None and "config" not in run else {}
    config = build_run_config(inherited | dict(run))
    if config.budget.eval_every is None and config.budget.evaluations is None:
        budget = config.budget.model_copy(update={"evaluations": EVALUATIONS})
        config = config.model_copy(update={"budget": budget})
    base = base_options(config)
    resources = (saved.resources if saved else Resources()).model_dump()
    resources |= {name: value for name, value in own.items() if name in Resources.model_fields}
    fields = {name: value for name, value in own.items() if name in Search.model_fields and name != "space"}
    if "seed" in run or "config" in run:
        fields["seed"] = config.seed
    before = saved.model_dump() if saved else {"samples": SAMPLES}
    given = (base.keys() | run.keys()) - {"seed"}
    space = _space(own, saved, config, given)
    try:
        search = Search(**(before | fields | {"space": space, "base": base, "resources": resources}))
    except ValidationError as error:
        raise UserError(explain(error, str(folder))) from None
    asked, search = search.samples, search.limited()
    if search.samples < asked and search.algorithm == "random":
        print(f"The space has only {search.samples} combinations: so many trials.")
    if saved is not None:
        refuse_other_search(folder, saved, search)
    search.check()
    return search


def _space(own: Mapping[str, Any], saved: Search | None, config: RunConfig, given: Collection[str]) -> Space:
    """What is searched; of the default, what is not `given` as an option."""
    words = own.get("space", ())
    if not words and saved is not None:
        return check_space(saved.space, given, str(own["search"]))
    if not words:
        return check_space({name: kind for name, kind in paper_space(config).items() if name not in given})
    if len(words) == 1 and "=" not in words[0]:
        return check_space(read_space(read_yaml(Path(words[0])), words[0]), given, words[0])
    return check_space(parse_space(words), given, "--space")


def _start_best(own: Mapping[str, Any], job: Mapping[str, Any], run: dict[str, Any]) -> int:
    """The full run from the best trial; options of the run override its configuration."""
    from minbert.launch.commands.train import start
    from minbert.trainer.run.preparation import new_run_path

    if others := [name for name in (*own, *job) if name != "best"]:
        raise UserError(f"--best starts a run, to which --{others[0].replace('_', '-')} means nothing")
    folder = own["best"]
    search = Search.read(folder)
    winner = best(search.trials(folder))
    if winner is None or not (folder / "best.yaml").exists():
        raise UserError(f"no trial of {folder} has a score yet: minbert tune --search {folder}")
    if "config" in run:
        raise UserError("--best takes the configuration of the best trial; give single options to change it")
    config = build_run_config(run | {"config": folder / "best.yaml"})
    if config.run is None:
        config = config.model_copy(update={"run": new_run_path(config)})
    print(f"From {winner.name} of {folder}, {search.metric} {winner.score:.3f} in the search.")
    return start(config, force=bool(run.get("force")))


def _submit(folder: Path, search: Search, job: dict[str, Any], retry: bool) -> int:
    """Queue the search as one job with a task on each node."""
    from minbert.launch.search_job import SearchJob
    from minbert.slurm.records import Records
    from minbert.slurm.snapshot import take_snapshot
    from minbert.slurm.submission import refuse_hopeless, submit

    if "slurm_parameters" in job:
        job["slurm_parameters"] = parse_parameters(job["slurm_parameters"])
    earlier = Records(folder).submission()
    settings = resolve_settings(job, earlier.settings if earlier else None)
    if settings.executor != "slurm":
        raise UserError("--slurm is for the cluster; leave it out to search on this machine")
    if job.get("tasks_per_node", 1) != 1:
        raise UserError("a search has one task on each node, which starts Ray there; leave --tasks-per-node out")
    settings = settings.model_copy(update={"tasks_per_node": 1})
    refuse_hopeless(settings, folder / "slurm")
    search.write(folder)
    if retry:
        retry_failed(search.trials(folder))
    folder = folder.absolute()
    code = take_snapshot(folder / "code")
    (job_id,) = submit([folder], [SearchJob(folder)], settings, folder / "slurm", code, [None], folder.name)
    print(f"Search: {folder}   job {job_id}")
    print(f"Watch: minbert jobs {shlex.quote(str(folder))}   minbert logs {shlex.quote(str(folder))} --follow")
    return ExitCode.FINISHED


def _new_folder() -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-search"
