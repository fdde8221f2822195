"""`minbert pretrain`: train the encoder as a masked language model, here or as a job on the cluster.

That is `minbert train` on one task, which this command declares from its options, with defaults of its own.
"""

from collections.abc import Mapping
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
import yaml

from minbert.data.errors import UserError
from minbert.data.reading import read_yaml
from minbert.data.task import SPLITS, Split, Task, resolve_task
from minbert.launch.options import asks_for_help, open_option, read_options, run_option_types, show_help
from minbert.slurm.settings import JobSettings
from minbert.trainer.config import flat_options
from minbert.trainer.run.folder import RunFolder

TASK = "mlm"
DEFAULTS = {"batch_size": 64, "max_length": 100, "epochs": 3, "eval_limit": 2000}
DESCRIPTION = """Train the encoder as a masked language model: from any checkpoint or, with --model tiny, from nothing.

The result is the folder `model` in the run folder, for `--model` of other runs and for transformers. Of the options
below --tasks says whose training texts are taken, and these have other defaults: batch_size=64, max_length=100,
epochs=3, eval_limit=2000."""

# Our own options: type, default, help.
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "texts": (
        tuple[Path, ...],
        (),
        "Text files with one sentence or document a line; instead of --tasks, or beside them.",
    ),
    "dev_texts": (tuple[Path, ...], (), "Text files to score; without them a share of all texts is held out."),
    "held_out": (float, 0.02, "That share."),
    "text_splits": (tuple[Split, ...], ("train",), f"Splits of the tasks to train on, of {', '.join(SPLITS)}."),
    "packed": (bool, False, "Lay texts end to end and cut that to max_length, instead of cutting each text off."),
    "mask_share": (float, 0.15, "Share of a text's tokens to hide."),
    "single_pieces": (bool, False, "Hide single pieces, not whole words."),
    "submit": (bool, False, "Train as a job on a SLURM cluster: the options of `minbert submit` are allowed, too."),
}
# Where the declaration has them.
TEXTS = {"dev_texts": "dev", "held_out": "held_out", "text_splits": "splits", "packed": "packed"}


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        show_help(DESCRIPTION, "pretrain", _help())
    options = _read(arguments)
    command = "submit" if options.get("submit") else "train"
    with TemporaryDirectory() as folder:
        words = [
            word for words in _by_option(arguments) for word in words if _name(words[0]) not in {*OPTIONS, "tasks"}
        ]
        if not _goes_on(options) or options.keys() & {*OPTIONS, "tasks"} - {"submit"}:
            file = Path(folder) / f"{TASK}.yaml"
            file.write_text(yaml.safe_dump(declare(options).model_dump(mode="json"), sort_keys=False))
            words += ["--tasks", str(file)]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in _defaults(options).items()]
        return import_module(f"minbert.launch.commands.{command}").main(words)


def declare(options: Mapping[str, Any]) -> Task:
    """The task that the options describe; or a declaration that `tasks` names. Raises UserError."""
    texts: dict[str, Any] = {theirs: options[ours] for ours, theirs in TEXTS.items() if ours in options}
    texts["files"] = options.get("texts", ())
    for key in ("files", "dev"):
        texts[key] = [str(path.expanduser().absolute()) for path in texts.get(key, ())]
    tasks = options.get("tasks") or (() if texts["files"] else ("sst", "quora", "sts"))
    known = [resolve_task(word, options.get("task_folder")) for word in tasks]
    if corpora := [task for task in known if task.kind == "masked_lm"]:
        if len(known) > 1 or options.keys() & OPTIONS.keys() - {"submit"}:
            raise UserError(
                f"{corpora[0]} says itself what its texts are: no other task or option of texts goes with it"
            )
        return corpora[0]
    texts["tasks"] = [task.model_dump(mode="json") for task in known]
    texts["splits"] = list(texts.get("splits", ("train",)))
    masking: dict[str, Any] = {"share": options["mask_share"]} if "mask_share" in options else {}
    if "single_pieces" in options:
        masking["whole"] = not options["single_pieces"]
    title = "masked language model"
    return resolve_task({"name": TASK, "title": title, "kind": "masked_lm", "texts": texts, "masking": masking})


def _read(arguments: list[str]) -> dict[str, Any]:
    """All options by name, a job's only where one is submitted. Raises UserError for what is none."""
    types = run_option_types() | {name: kind for name, (kind, _, _) in OPTIONS.items()}
    if any(_name(word) == "submit" for word in arguments):
        types |= {name: field.rebuild_annotation() for name, field in JobSettings.model_fields.items()}
        types |= {"slurm_parameters": tuple[str, ...], "sweep": tuple[str, ...], "dry_run": bool}
    return read_options(types, arguments, "pretrain")[0]


def _by_option(arguments: list[str]) -> list[list[str]]:
    """The words, those of each option together with it."""
    found, rest = [], list(arguments)
    while rest:
        words = [rest[0], *takewhile(lambda word: not word.startswith("--"), rest[1:])]
        found.append(words)
        del rest[: len(words)]
    return found


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else ""


def _goes_on(options: Mapping[str, Any]) -> bool:
    """Whether a run is there already, whose options count."""
    return options.get("run") is not None and RunFolder(Path(options["run"])).config_file.exists()


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Our own defaults, of a new run, for what neither the command line nor its file says."""
    if _goes_on(options):
        return {}
    file = options.get("config")
    given = {*options, *(flat_options(read_yaml(file), str(file)) if file is not None else ())}
    if "steps" in given:
        given.add("epochs")
    return {name: value for name, value in DEFAULTS.items() if name not in given}


def _help() -> dict[str, Any]:
    return {
        name: (
            Annotated[kind, open_option("FILE ...", help=text) if not default else tyro.conf.arg(help=text)],
            default,
        )
        if kind is not bool
        else (Annotated[bool, tyro.conf.arg(help=text)], default)
        for name, (kind, default, text) in OPTIONS.items()
    }
