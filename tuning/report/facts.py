"""What a page says above everything else: model, data, code, command, when, how long, and what is not the default."""

import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from minbert.data.clock import clock
from minbert.data.errors import UserError
from minbert.data.reading import read_json
from minbert.trainer.config import INCIDENTAL, RunConfig, flatten
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import resolve
from minbert.trainer.run.standing import read_standing
from minbert.tuning.report.page import setting


def facts(
    folder: Path, config: RunConfig, began: float | None = None, ended: float | None = None
) -> list[tuple[str, str]]:
    """Of a run, a search or an ablation with its environment.json in `folder`; moments in seconds since the epoch."""
    corpus, encoder, environment = config.corpus, config.encoder, _environment(folder)
    limits = [f"{name} {value}" for name in ("train_limit", "eval_limit") if (value := getattr(corpus, name))]
    found = [
        ("Model", encoder.model + (f" at {encoder.revision[:12]}" if encoder.revision else "")),
        ("Data", f"{corpus.data}: {', '.join(corpus.names)}" + (f" ({', '.join(limits)})" if limits else "")),
    ]
    if commit := environment.get("commit"):
        changed = ", with changes that were not committed" if environment.get("uncommitted_changes") else ""
        found.append(("Code", f"commit {str(commit)[:12]}{changed}"))
    elif isinstance(packages := environment.get("packages"), dict):
        found.append(("Code", f"minbert {packages.get('minbert')}"))
    if isinstance(command := environment.get("command"), list) and command:
        found.append(("Command", _command([str(word) for word in command])))
    if began:
        found.append(("Date", f"{datetime.fromtimestamp(began):%Y-%m-%d %H:%M}"))
        if ended and ended >= began:
            found.append(("Duration", clock(ended - began)))
    changed = ", ".join(f"{name} {setting(value)}" for name, value in not_default(config).items())
    return [*found, ("Not the default", changed or "nothing")]


def span(run: RunFolder) -> tuple[float | None, float | None]:
    """When the latest start of the run began, and ended or was heard of last; seconds since the epoch."""
    standing = read_standing(run.logs / "rank-0.json")
    return (None, None) if standing is None else (standing.began, standing.written)


def _command(words: list[str]) -> str:
    """As it would be typed."""
    program = Path(words[0])
    return shlex.join(["minbert" if program.name in ("minbert", "main.py") else program.name, *words[1:]])


def not_default(config: RunConfig) -> dict[str, Any]:
    """The options whose values are not the defaults; those that a run fills in count as they would be for its model."""
    usual = flatten(RunConfig()) | _filled_in(config)
    return {name: value for name, value in flatten(config).items() if value != usual[name] and name not in INCIDENTAL}


def _filled_in(config: RunConfig) -> dict[str, Any]:
    """What a run with this encoder, and for the heads this learning rate, makes of options that are left open; nothing
    of those that are open still."""
    plain = RunConfig().model_copy(update={"encoder": config.encoder})
    rate = plain.model_copy(update={"optimizer": plain.optimizer.model_copy(update={"lr": config.optimizer.lr})})
    filled = flatten(resolve(plain)) | {"head_lr": resolve(rate).optimizer.head_lr}
    values = flatten(config)
    return {name: filled[name] for name in ("lr", "head_lr", "epochs") if values[name] is not None}


def _environment(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json(folder / "environment.json")
    except (FileNotFoundError, UserError):
        return {}
