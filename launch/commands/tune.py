"""`minbert tune`: search hyperparameters with Ray Tune, here, on a Ray cluster, or inside a SLURM allocation."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from minbert.data.errors import UserError, require_package
from minbert.data.reading import read_yaml
from minbert.launch.help import Option
from minbert.launch.many_runs import (
    check_data_and_model,
    leave_without_ray,
    merged_resources,
    note_environment,
    only_driver,
    read_many_runs,
    refuse_queued,
    retry_failed,
)
from minbert.launch.options import CommandLine, build_run_config
from minbert.launch.searching import run_search
from minbert.trainer.config import OPTIONS as OF_A_RUN
from minbert.trainer.config import RunConfig, parse_config
from minbert.trainer.options import Seed
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.tuning.again import runs_again, winner
from minbert.tuning.search import (
    SEARCH_FILE,
    Search,
    base_options,
    explain,
    refuse_other_search,
)
from minbert.tuning.space import Space, check_space, paper_space, parse_space, read_space
from minbert.tuning.trial import LOCK, Trial

DESCRIPTION = (
    "Search hyperparameters, or go on with the search in --search. Options of a run hold for every trial. "
    "`minbert tune --best SEARCH [--run NEW] [options]` starts the full run from the best trial."
)
SAMPLES = 20
EVALUATIONS = 10  # of each trial: what it is judged by while it runs

OPTIONS = {
    "search": Option(
        Path, None, "Folder of the search; one that exists goes on. The default is a new one under runs/.", "FOLDER"
    ),
    "space": Option(
        Annotated[tuple[str, ...], Field(min_length=1)],
        (),
        "What to search: a YAML file, or words such as lr=loguniform(1e-5,1e-4) batch_size=16,32. The default is what "
        "the paper wanted to search. A search that exists goes on in it.",
        "FILE|OPTION=VALUES ...",
    ),
    "samples": Option(Annotated[int, Field(ge=1)], SAMPLES, "Trials; a grid has as many as it has combinations."),
    "algorithm": Option(Literal["random", "grid", "tpe"], "random", "How trials are chosen; tpe needs Optuna."),
    "scheduler": Option(
        Literal["asha", "pbt", "none"],
        "asha",
        "What becomes of trials that fall behind: ASHA stops them early; in population-based training (pbt) they go on "
        "from where one that is ahead is, with other learning rates, decay or dropout.",
    ),
    "reduction": Option(Annotated[float, Field(gt=1)], 3.0, "ASHA lets one in this many go on."),
    "grace": Option(Annotated[float, Field(gt=0, lt=1)], 0.1, "Share of its budget at which a trial is judged first."),
    "again": Option(
        Annotated[int, Field(ge=0)],
        0,
        "When its trials are over, train this many of the best once more with each of --seeds: the best of many is "
        "also the luckiest.",
    ),
    "seeds": Option(
        Annotated[tuple[Seed, ...], Field(min_length=1)],
        None,
        "For --again; the default is the three after the search's own.",
        "SEED ...",
    ),
    "retry_failed": Option(bool, False, "Try the trials again that failed for good."),
    "address": Option(str, None, "An existing Ray cluster to use, as host:port or `auto`.", "ADDRESS"),
    "slurm": Option(bool, False, "Run inside an allocation of SLURM, with Ray on all its nodes."),
    "best": Option(Path, None, "Start the full run from the best trial of this search.", "FOLDER"),
}


def main(arguments: list[str]) -> int:
    line = read_many_runs("tune", DESCRIPTION, arguments, OPTIONS)
    if "best" in line.command:
        return _start_best(line)
    require_package("ray", "search", "a search")
    if "run" in line.run:
        raise UserError("each trial has a run folder of its own; --search names the folder of the search")
    folder = line.command.get("search") or _new_folder()
    slurm, retry, address = (line.command.get(name) for name in ("slurm", "retry_failed", "address"))
    if slurm:
        refuse_queued(folder)  # rather than that somebody holds the lock
    with only_driver(folder):
        search = _resolve(folder, line)
        refuse_queued(folder)
        trials = search.trials(folder)
        runs = runs_again(search, folder, trials)
        if retry or len(trials) < search.samples or any(not trial.over for trial in (*trials, *runs)):
            check_data_and_model(parse_config(search.base | search.sources(), SEARCH_FILE))
        if slurm:
            return _submit(folder, search, line.job, bool(retry))
        print(f"Search: {folder}", flush=True)
        from minbert.tuning.cluster import join_or_start

        again = f"minbert tune --search {shlex.quote(str(folder))}" + (f" --address {address}" if address else "")
        start = partial(join_or_start, address, folder, partial(leave_without_ray, again))
        with StopRequest() as stop:
            code = run_search(folder, search, stop, start, bool(retry))
            stop.exit_code = code
    if code == ExitCode.INTERRUPTED:
        print(f"Stopped, and saved. To go on: {again}")
    return code


def _resolve(folder: Path, line: CommandLine) -> Search:
    """The search that the options, and what the folder holds already, describe. Raises UserError."""
    options, run = line.command, line.run
    saved = Search.read(folder) if (folder / SEARCH_FILE).exists() else None
    if saved is None and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no search: it has no {SEARCH_FILE}. Give another --search.")
    inherited = dict(saved.base) if saved is not None and "config" not in run else {}
    config = build_run_config(inherited | dict(run))
    if config.budget.eval_every is None and config.budget.evaluations is None:
        budget = config.budget.model_copy(update={"evaluations": EVALUATIONS})
        config = config.model_copy(update={"budget": budget})
    base = base_options(config)
    resources = merged_resources(saved.resources if saved else None, options)
    fields = {name: value for name, value in options.items() if name in Search.model_fields and name != "space"}
    if "seed" in run or "config" in run:
        fields["seed"] = config.seed
    before = saved.model_dump() if saved else {"samples": SAMPLES}
    fields |= _other_seeds(before | fields, "seeds" in fields)
    given = ((base.keys() - (saved.base.keys() if saved else set())) | run.keys()) - {"seed"}
    space = _space(options, saved, config, given)
    trials = saved.trials(folder) if saved else []
    begun = max((trial.number for trial in trials), default=-1) + 1
    moves = saved is not None and space != saved.space
    if moves:
        fields["earlier"] = saved.going_on_in(space, begun)
    try:
        search = Search(**(before | fields | {"space": space, "base": base, "resources": resources}))
    except ValidationError as error:
        raise UserError(explain(error, str(folder))) from None
    asked, search = search.samples, search.limited(trials)
    if search.samples < asked and search.algorithm == "random":
        print(f"The space has only {search.samples - begun} combinations more: so many trials.")
    if saved is not None:
        refuse_other_search(folder, saved, search)
    if moves:
        _tell_move(search, trials, begun)
    search.check()
    return search


def _other_seeds(fields: Mapping[str, Any], given: bool) -> dict[str, Any]:
    """The field `seeds` of a search with these `fields`, where it changes. Raises UserError if seeds are `given` that
    nothing is to be trained with."""
    again, seeds = fields.get("again"), fields.get("seeds")
    if given and not again:
        raise UserError("--seeds are for the best trials once more; --again 3 says how many of them")
    if again and not seeds:
        seed = fields.get("seed", 0)
        return {"seeds": (seed + 1, seed + 2, seed + 3)}
    return {"seeds": tuple(dict.fromkeys(seeds))} if given else {}


def _tell_move(search: Search, trials: Sequence[Trial], begun: int) -> None:
    """Raises UserError if nothing is left to be drawn from the new space."""
    if search.samples <= begun and search.algorithm == "grid":
        raise UserError("every combination of this space has a trial already; give it a value more")
    if search.samples <= begun:
        raise UserError(
            f"all {begun} trials are drawn already, from the space before: --samples {2 * begun} makes {begun} more, "
            "from the new one"
        )
    inside = sum(search.point(trial.number, trial.parameters) is not None for trial in trials)
    print(f"Another space, from trial-{begun:04d} on. {inside} of the {begun} trials before lie in it, and count.")


def _space(options: Mapping[str, Any], saved: Search | None, config: RunConfig, given: Collection[str]) -> Space:
    """What is searched; of the default, what is not `given` as an option."""
    words = options.get("space", ())
    if not words and saved is not None:
        return check_space(saved.space, given, str(options["search"]))
    if not words:
        return check_space({name: kind for name, kind in paper_space(config).items() if name not in given})
    if len(words) == 1 and "=" not in words[0] and words[0] not in OF_A_RUN:
        return check_space(read_space(read_yaml(Path(words[0])), words[0]), given, words[0])
    return check_space(parse_space(words), given, "--space")


def _start_best(line: CommandLine) -> int:
    """The full run from the best trial; options of the run override its configuration."""
    from minbert.launch.commands.train import start
    from minbert.trainer.run.preparation import in_folder

    if others := [name for name in (*line.command, *line.job) if name != "best"]:
        raise UserError(f"--best starts a run, to which --{others[0].replace('_', '-')} means nothing")
    folder = line.command["best"]
    search = Search.read(folder)
    trials = search.trials(folder)
    found = winner(search, trials, runs_again(search, folder, trials))
    if found is None or not (folder / "best.yaml").exists():
        raise UserError(f"no trial of {folder} has a score yet: minbert tune --search {folder}")
    if "config" in line.run:
        raise UserError("--best takes the configuration of the best trial; give single options to change it")
    config = in_folder(build_run_config(line.run | {"config": folder / "best.yaml"}))
    print(f"From {folder}. {found[1]}")
    return start(config, force=line.run.get("force", False))


def _submit(folder: Path, search: Search, job: Mapping[str, Any], retry: bool) -> int:
    """Submit the search as one job with a task on each node."""
    from minbert.launch.search_job import SearchJob
    from minbert.launch.submitting import job_settings, submit_tasks
    from minbert.slurm.submission import Task, refuse_hopeless

    settings = job_settings(folder, job)
    if settings.executor != "slurm":
        raise UserError("--slurm is for the cluster; leave it out to search on this machine")
    if job.get("tasks_per_node", 1) != 1:
        raise UserError("a search has one task on each node, which starts Ray there; leave --tasks-per-node out")
    settings = settings.model_copy(update={"tasks_per_node": 1})
    refuse_hopeless(settings, folder)
    search.write(folder)
    note_environment(folder)
    if retry:
        retry_failed(search.trials(folder))
    folder = folder.absolute()
    submit_tasks([Task(folder, SearchJob(folder))], settings, folder, "Search")
    return ExitCode.FINISHED


def _new_folder() -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-search"
