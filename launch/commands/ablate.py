"""`minbert ablate`: what each extension of the baseline brings, alone, added up, left out, and combined, over seeds."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from minbert.data.errors import UserError, require_package
from minbert.data.files import replacing, to_json
from minbert.launch.ablating import run_here, run_on_ray, submit_missing
from minbert.launch.help import Option
from minbert.launch.many_runs import (
    check_data_and_model,
    merged_resources,
    note_environment,
    only_driver,
    read_many_runs,
    retry_failed,
)
from minbert.launch.options import build_run_config
from minbert.slurm.status import is_active
from minbert.trainer.config import flatten, parse_config
from minbert.trainer.options import Seed
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.tuning.ablation import ABLATION_FILE, GROUPS, TITLES, Ablation, plan, refuse_other_ablation
from minbert.tuning.comparison import AGAINST, Row, compare, differences, labels
from minbert.tuning.extensions import DEFAULT, PAPER_BASELINE, combination, extension
from minbert.tuning.search import base_options
from minbert.tuning.space import Parameters
from minbert.tuning.trial import LOCK, Trial

DESCRIPTION = (
    "Measure extensions against the paper's baseline (features=baseline, hidden_layers=1, freeze=encoder), or a"
    " --recipe, or go on with the ablation in --ablation. Options of a run hold for every variant."
)

OPTIONS = {
    "ablation": Option(
        Path, None, "Folder of the ablation; one that exists goes on. The default is a new one under runs/.", "FOLDER"
    ),
    "extensions": Option(
        Annotated[tuple[str, ...], Field(min_length=1)],
        DEFAULT,
        "In the order in which they are added: siamese, two_hidden_layers, back_translation=FILE, smart, unfrozen, "
        "gradual_unfreezing, pretrained=FOLDER, joint_pairs, averaged_weights, any aggregator, or "
        "NAME=OPTION:VALUE,...",
    ),
    "groups": Option(
        Annotated[tuple[Literal["alone", "added", "left_out"], ...], Field(min_length=1)],
        GROUPS[:3],
        "Comparisons to make.",
    ),
    "combine": Option(
        Annotated[tuple[str, ...], Field(min_length=1)], (), "Further combinations, such as siamese+pcgrad."
    ),
    "seeds": Option(
        Annotated[tuple[Seed, ...], Field(min_length=1)], (0, 1, 2), "Each variant is trained with each of them."
    ),
    "retry_failed": Option(bool, False, "Try the runs again that failed for good."),
    "ray": Option(bool, False, "Train several runs at once with Ray on this machine."),
    "address": Option(str, None, "Train on an existing Ray cluster: host:port, or `auto`.", "ADDRESS"),
    "slurm": Option(bool, False, "Train on the cluster, as an array of jobs."),
}


def main(arguments: list[str]) -> int:
    line = read_many_runs("ablate", DESCRIPTION, arguments, OPTIONS)
    options, run = line.command, line.run
    for name, instead in (("run", "ablation"), ("seed", "seeds")):
        if name in run:
            raise UserError(f"each run of an ablation has its own {name}; --{instead} says which")
    if options.get("ray") or "address" in options:
        require_package("ray", "search", "an ablation on Ray")
    folder = options.get("ablation") or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-ablation"
    with only_driver(folder):
        ablation = _resolve(folder, options, run)
        check_data_and_model(parse_config(ablation.baseline, ABLATION_FILE))
        if not options.get("slurm"):
            _refuse_queued_runs(folder, ablation)
        print(f"Ablation: {folder}", flush=True)
        trials = ablation.trials(folder)
        over = sum(trial.over for trial in trials)
        variants = f"{len(ablation.variants)} variants with {ablation.seeds_told}"
        print(f"{variants}: {len(trials)} runs, {over} are over.", flush=True)
        begin = partial(_begin, folder, ablation, trials, options.get("retry_failed", False))
        if options.get("slurm"):
            submit_missing(folder, ablation, trials, line.job, begin)
            if left := sum(trial.status != "finished" for trial in trials):
                print(f"{left} runs are not finished. Repeat the command when they are, for the table.")
                return ExitCode.FINISHED
            return _conclude(folder, ablation, trials)
        if options.get("ray") or "address" in options:
            code = run_on_ray(folder, ablation, trials, options.get("address"), begin)
        else:
            begin()
            code = run_here(ablation, trials)
        if code == ExitCode.INTERRUPTED:
            print(f"Stopped, and saved. To go on: minbert ablate --ablation {shlex.quote(str(folder))}")
        return code if code != ExitCode.FINISHED else _conclude(folder, ablation, trials)


def _begin(folder: Path, ablation: Ablation, trials: Sequence[Trial], retry: bool) -> None:
    """Write what is to be done, when nothing can refuse it any more."""
    ablation.write(folder)
    note_environment(folder)
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


def _resolve(folder: Path, options: Mapping[str, Any], run: dict[str, Any]) -> Ablation:
    """The ablation that the options, and what the folder holds already, describe. Raises UserError."""
    saved = Ablation.read(folder) if (folder / ABLATION_FILE).exists() else None
    if saved is None and any(entry.name != LOCK for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no ablation: it has no {ABLATION_FILE}. Give another --ablation.")
    baseline = _baseline(run, saved)
    tasks = parse_config(baseline, ABLATION_FILE).corpus.tasks
    if saved is not None and "extensions" not in options:
        extensions = saved.extensions
    else:
        extensions = dict(extension(word, tasks) for word in options.get("extensions", DEFAULT))
    wanted = options.get("groups", [name for name in saved.groups if name != "named"] if saved else GROUPS[:3])
    variants, groups = plan(extensions, wanted, [])
    if "combine" in options:
        named = [combination(word, extensions, tasks) for word in options["combine"]]
        every = extensions | {name: change for members in named for name, change in members.items()}
        more = plan(every, ["named"], [list(members) for members in named])
        variants, groups = variants | more[0], groups | more[1]
    elif saved is not None and "named" in saved.groups:
        groups["named"] = saved.groups["named"]
        variants |= {name: saved.variants[name] for name in groups["named"]}
    resources = merged_resources(saved.resources if saved else None, options)
    seeds = list(dict.fromkeys(options.get("seeds", saved.seeds if saved else OPTIONS["seeds"].default)))
    ablation = Ablation(
        baseline=baseline, extensions=extensions, variants=variants, groups=groups, seeds=seeds, resources=resources
    )
    ablation.check()
    if saved is not None:
        refuse_other_ablation(folder, saved, ablation)
    return ablation


def _baseline(run: dict[str, Any], saved: Ablation | None) -> Parameters:
    """The paper's, a recipe's, or the folder's, and what a file and options make of it."""
    paper = {} if run.get("recipe") else PAPER_BASELINE
    config = build_run_config(run, below=paper if saved is None else saved.baseline)
    return {name: flatten(config)[name] for name in PAPER_BASELINE} | base_options(config)


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
        spread = "mean ± deviation of " if len(ablation.seeds) > 1 else ""
        console.print(_table(f"\n{TITLES[group]} ({spread}{ablation.seeds_told})", group, [rows[n] for n in names]))
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(to_json([asdict(row) for row in rows.values()], indent=2) + "\n")
    print(f"Summary: {folder / 'summary.json'}")
    return ExitCode.FINISHED


def _table(title: str, group: str, rows: Sequence[Row]) -> Table:
    called, compared = labels(group, [row.variant for row in rows]), differences(group, rows)
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    columns = list(next((row.scores for row in rows if row.scores), {}))
    for heading in ("variant", *columns, f"to {AGAINST[group]} [95%], ahead"):
        table.add_column(heading)
    for row in rows:
        failed = f" ({row.failed} failed)" if row.failed else ""
        scores = [str(row.scores[name]) if name in row.scores else "" for name in columns]
        table.add_row(called[row.variant] + failed, *scores, str(compared.get(row.variant, "")))
    return table
