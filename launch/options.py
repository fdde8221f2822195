"""A command's options: defaults, files and the command line, of which the later wins, and nothing unknown passes.

Commands that take a folder and a few options declare them as a dataclass (`parse`). Those that describe runs take all
options of a run, a job's where they submit, and some of their own (`read_command_line`).
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import tyro
from pydantic import AfterValidator, BaseModel, Field

from minbert.data.errors import UserError
from minbert.data.reading import read_yaml
from minbert.launch.help import RUN_OPTIONS, Option, described, help_with_run_options
from minbert.launch.manual import Help
from minbert.launch.words import convert, read_options, takes_several
from minbert.slurm.settings import JobSettings, parse_parameters
from minbert.trainer.config import OPTIONS, SECTIONS, RunConfig, flat_options, parse_config
from minbert.trainer.recipe import with_recipes
from minbert.trainer.run.folder import RunFolder

T = TypeVar("T")
TRAIN = "Train minBERT on several tasks at once, or resume the run in --run."


def parse(kind: type[T], arguments: list[str], command: str) -> T:
    """`arguments` as a dataclass `kind`, whose positional fields take the words that belong to no option, in order.
    Raises UserError for a wrong option or value, or where a word is missing, and Help for --help."""
    if asks_for_help(arguments):
        raise Help(described(kind), command)
    types = get_type_hints(kind, include_extras=True)
    places = {name: types.pop(name) for name in list(types) if tyro.conf.Positional in _marks(types[name])}
    values, words = read_options(types, arguments, command)
    for name, place in places.items():
        count = len(words) if takes_several(place) else 1
        if words:
            values[name] = convert(_metavar(name, place), place, words[:count])
            del words[:count]
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    if needed - values.keys():
        usage = " ".join(_metavar(name, place) for name, place in places.items())
        raise UserError(f"usage: minbert {command} {usage} [options]; `minbert {command} --help` tells more")
    if words:
        raise UserError(f"what is {words[0]!r}? `minbert {command} --help` tells what it takes")
    return kind(**values)


def _marks(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__metadata__", ())


def _metavar(name: str, place: Any) -> str:
    return next(filter(None, (getattr(mark, "metavar", None) for mark in _marks(place))), name.upper())


class CommandLine(NamedTuple):
    """The options on a command line: the command's own, a job's, and those of every run."""

    command: dict[str, Any]
    job: dict[str, Any]
    run: dict[str, Any]


def read_command_line(
    command: str,
    description: str,
    arguments: list[str],
    options: Mapping[str, Option],
    groups: Mapping[str, type[BaseModel]] = {},
) -> CommandLine:
    """Of a command that describes runs and may submit them; `options` and `groups` of options are its own. Raises
    UserError for a wrong option or value, and Help for --help."""
    if asks_for_help(arguments):
        raise help_with_run_options(command, description, options, {**groups, "job": JobSettings})
    own_types = {name: option.type for name, option in options.items()}
    for group in groups.values():
        own_types |= _types_of(group)
    job_types = job_option_types()
    given, words = read_options(run_option_types() | job_types | own_types, arguments, command)
    _refuse_words(words)
    line = CommandLine({}, {}, {})
    for name, value in given.items():
        (line.command if name in own_types else line.job if name in job_types else line.run)[name] = value
    return line


def parse_run_config(arguments: list[str], command: str = "train") -> RunConfig:
    """A run's configuration: defaults < the run folder's own < `--config FILE` < options. Raises UserError.

    `--force` is allowed among the options, and no part of a run.
    """
    return build_run_config(read_run_options(arguments, command))


def read_run_options(arguments: list[str], command: str = "train", description: str = TRAIN) -> dict[str, Any]:
    """The options of a command that takes those of a run only. Raises UserError, and Help for --help."""
    if asks_for_help(arguments):
        raise help_with_run_options(command, description, {}, {})
    options, words = read_options(run_option_types(), arguments, command)
    _refuse_words(words)
    return options


def _refuse_words(words: list[str]) -> None:
    """Raises UserError for words that belong to no option."""
    if words:
        raise UserError(f"what is {words[0]!r}? Options start with --, and the run folder is given by --run")


def run_option_types() -> dict[str, Any]:
    """The type of every option of a run, by its name."""
    types = {name: kind for model in (RunConfig, *SECTIONS.values()) for name, kind in _types_of(model).items()}
    types = {name: kind for name, kind in types.items() if name in OPTIONS}
    types |= {name: option.type for name, option in RUN_OPTIONS.items()}
    return types | {"tasks": Annotated[tuple[str, ...], Field(min_length=1)]}


def job_option_types() -> dict[str, Any]:
    """The type of every option of a job, by its name."""
    parameters = Annotated[tuple[str, ...], AfterValidator(parse_parameters)]
    return _types_of(JobSettings) | {"slurm_parameters": parameters}


def refuse_job_options(job: Mapping[str, Any]) -> None:
    """Raises UserError for options of a job, where there is none without --slurm."""
    if job:
        raise UserError(f"--{next(iter(job)).replace('_', '-')} is about a job; add --slurm")


def _types_of(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.rebuild_annotation() for name, field in model.model_fields.items()}


def build_run_config(options: Mapping[str, Any], below: Mapping[str, Any] = {}) -> RunConfig:
    """A run's configuration: defaults < `below` < the run folder's own < recipes < the file `config` < `options`.

    Raises UserError; the recipe `list` prints all and ends the program.
    """
    file = options.get("config")
    where = "options" if file is None else str(file)
    options = {name: value for name, value in options.items() if name not in RUN_OPTIONS}
    layers = [options] if file is None else [flat_options(read_yaml(file), where), options]
    layers = [below, *with_recipes(layers)]
    aggregator = next((layer["aggregator"] for layer in reversed(layers) if "aggregator" in layer), None)
    run = next((layer["run"] for layer in reversed(layers) if layer.get("run")), None)
    if isinstance(run, str | Path) and (folder := RunFolder(Path(run))).config_file.exists():
        layers.insert(1, flat_options(folder.read_config().model_dump(), str(run)))
    merged: dict[str, Any] = {}
    for layer in layers:
        given = dict(layer)
        if given.get("epochs") is not None and given.get("steps") is None:
            given["steps"] = None  # a later word on the budget replaces an earlier one, in whichever unit
        elif given.get("steps") is not None and given.get("extend_to") is None:
            given["extend_to"] = None
        for name, other in (("eval_every", "evaluations"), ("evaluations", "eval_every")):
            if given.get(name) is not None and given.get(other) is None:
                given[other] = None
        merged |= given
    config = parse_config(merged, where)
    if aggregator is not None and aggregator != "sum":
        from minbert.trainer.surgery.own_code import find_in_working_folder  # imports PyTorch

        find_in_working_folder(config.batch.aggregator)
    return config


def asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments
