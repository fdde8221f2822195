"""The page of a search: which trials were best, and what their hyperparameters had to do with it."""

from pathlib import Path
from typing import Any

from minbert.data.clock import clock
from minbert.data.errors import UserError
from minbert.trainer.config import parse_config
from minbert.tuning.again import winner
from minbert.tuning.report.by_option import against, importance, parallel
from minbert.tuning.report.course import cost, cost_unit, curves, history, seeds, timeline
from minbert.tuning.report.facts import facts
from minbert.tuning.report.found import Found, best_record
from minbert.tuning.report.links import to_run
from minbert.tuning.report.page import Page, Report, Section, Table, link, number, setting
from minbert.tuning.search import Search
from minbert.tuning.space import Choice, Distribution, LogUniform
from minbert.tuning.trial import METRIC, Trial

SHOWN = 10  # trials in the table of the best


def search_report(folder: Path, place: Path) -> Report:
    """The report, for the folder `place`, of the search in `folder`, over or not. Raises UserError if no trial has a
    score yet."""
    found = Found.read(folder)
    search, trials = found.search, found.trials
    if not found.scored:
        raise UserError(f"no trial of {folder} has a score yet; minbert tune --search {folder} goes on with it")
    chosen, known = winner(search, trials, found.runs)
    sections = [
        Section("The search", [_summary(found), _settings(search)]),
        Section("Best configurations", _best(found, folder, chosen)),
        *([Section("The best again, with other seeds", seeds(found, place))] if search.again or found.runs else []),
        Section("Best so far", [history(found.scored)]),
        Section("Timeline and cost", timeline(found)),
        Section("Score against each hyperparameter", against(found)),
        Section("Importance", importance(found)),
        Section("Parallel coordinates", [parallel(found)]),
        Section("Learning curves", [curves(found.scored)]),
        Section("All trials", [_all(found, place)]),
    ]
    began = min((trial.started for trial in trials if trial.started), default=None)
    ended = max((trial.ended for trial in (*trials, *found.runs) if trial.ended), default=None)
    about = facts(folder, parse_config(search.base, "search.yaml"), began, ended)
    page = Page(f"Search {folder.name}", known, sections, _warnings(found), about)
    return Report(page, _rows(found))


def _warnings(found: Found) -> list[str]:
    warnings = []
    left = found.search.samples - sum(trial.over for trial in found.trials)
    if left:
        warnings.append(
            f"The search is not over: {left} of {found.search.samples} trials are still to be trained or finished."
        )
    elif found.missing:
        warnings.append(f"{found.missing} runs with other seeds are still to be trained or finished.")
    if failed := [trial for trial in (*found.trials, *found.runs) if trial.status == "failed"]:
        lines = [f"{trial.name}: {trial.error}" for trial in failed[:SHOWN]]
        lines += [f"and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
        warnings.append("\n".join(["Trials that failed and count for nothing:", *lines]))
    return warnings


def _summary(found: Found) -> str:
    search, trials = found.search, found.trials
    count = {status: sum(trial.status == status for trial in trials) for status in ("finished", "stopped", "failed")}
    done = [f"{count['finished']} were trained to the end"]
    done += [f"{count['stopped']} were stopped early"] if count["stopped"] else []
    done += [f"{count['failed']} failed"] if count["failed"] else []
    trained = sum(trial.step for trial in trials)
    whole = sum(trial.steps or 0 for trial in trials if trial.step)
    saved = f" Stopping early left out {1 - trained / whole:.0%} of the steps." if count["stopped"] and whole else ""
    return (
        f"Of {search.samples} trials {', '.join(done)}.{saved} A trial's score is its best {METRIC}, on the dev splits."
        + _moves(found)
    )


def _moves(found: Found) -> str:
    if not found.search.earlier:
        return ""
    before = [trial for trial in found.trials if trial.number < found.search.first]
    inside = sum(trial.name in found.inside for trial in before)
    return (
        f" The search went on in another space from trial-{found.search.first:04d} on. Of the {len(before)} trials "
        f"before, {inside} lie in it, with the values that they had of all its options: the search learns from them, "
        "and they are in all charts. The others are in the tables, the history and the curves."
    )


def _settings(search: Search) -> Table:
    rows = [("algorithm", search.algorithm), ("scheduler", search.scheduler), ("seed", str(search.seed))]
    if not search.earlier:
        rows += [(name, _describe(kind)) for name, kind in search.space.items()]
        return Table(("option", "value"), rows, text_columns=2)
    starts = [0, *(earlier.trials for earlier in search.earlier)]
    header = [f"{place}, from trial-{start:04d}" for place, start in enumerate(starts, 1)]
    names = dict.fromkeys(name for space in search.spaces for name in space)
    rest = search.values({})
    rows = [(name, *[value] * len(starts)) for name, value in rows]
    for name in names:
        cells = [_describe(s[name]) if name in s else f"{setting(rest[name])} (not searched)" for s in search.spaces]
        rows.append((name, *cells))
    return Table(("option, in space", *header), rows, text_columns=len(header) + 1)


def _describe(kind: Distribution) -> str:
    if isinstance(kind, Choice):
        return "one of " + ", ".join(setting(value) for value in kind.values)
    scale = ", evenly in the logarithm" if isinstance(kind, LogUniform) else ""
    return f"{setting(kind.low)} to {setting(kind.high)}{scale}"


def _best(found: Found, folder: Path, chosen: Trial) -> list[Any]:
    tasks = parse_config(found.search.base, "search.yaml").corpus.names
    rows = []
    for trial in found.scored[:SHOWN]:
        record = best_record(trial)
        scores = [number(record.get(f"dev/{name}")) for name in tasks]
        place = f"{trial.step}/{trial.steps}"
        name = link(trial.name, f"#{trial.name}")
        rows.append([name, trial.status, number(trial.score), *scores, place, *found.row(trial)])
    header = ["trial", "status", "overall", *tasks, "steps", *found.header]
    return [
        "The task scores are those of the evaluation with the best overall score. minbert tune --best "
        f"{folder.name} starts the full run from {chosen.name}, whose configuration is in best.yaml.",
        Table(header, rows, text_columns=2),
    ]


def _all(found: Found, place: Path) -> Table:
    """A name leads to the trial's own page where there is one."""
    rows = []
    for trial in found.trials:
        reached = f"{trial.step}/{trial.steps}" if trial.steps else "–"
        name = to_run(trial.name, trial.folder, place)
        took = [clock(trial.seconds), f"{cost(trial):.3g}"] if trial.turns else ["–", "–"]
        rows.append([name, trial.status, number(trial.score), reached, *took, *found.row(trial)])
    header = ["trial", "status", "overall", "steps", "trained", cost_unit(found.trials), *found.header]
    return Table(header, rows, text_columns=2, trials=[trial.name for trial in found.trials])


def _rows(found: Found) -> list[list[Any]]:
    tasks = parse_config(found.search.base, "search.yaml").corpus.names
    fields = ("trial", "number", "status", "score", "step", "steps", "started", "ended", "stopped_by", "error")
    rows: list[list[Any]] = [
        [*fields, "seconds", "seed", *(f"dev/{name}" for name in tasks), *found.header]  # runs with other seeds below
    ]
    for trial in (*found.trials, *found.runs):
        record = best_record(trial) if trial.earned() else {}
        own = [trial.name, *(getattr(trial, name) for name in fields[1:])]
        own += [trial.seconds, found.search.seed if trial.seed is None else trial.seed]
        scores = [record.get(f"dev/{name}") for name in tasks]
        searched = trial.variant or trial.name
        space = [found.spaces[searched]] * bool(found.search.earlier)
        rows.append([*own, *scores, *space, *(found.values[searched][name] for name in found.options)])
    return rows
