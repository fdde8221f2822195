"""From defaults, files and command line to one configuration: the later wins, and nothing unknown passes.

The types of the options decide what a word on the command line means, so a wrong one is refused with the same words as
in a file. tyro draws the help, and parses the commands that take a folder and a few options.
"""

import difflib
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from minbert.data.errors import UserError, shown
from minbert.data.reading import read_yaml
from minbert.trainer.config import OPTIONS, SECTIONS, RunConfig, flat_options, parse_config
from minbert.trainer.recipe import named_recipes, read_recipe
from minbert.trainer.run.folder import RunFolder

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], command: str) -> T:
    """`arguments` as a dataclass `kind`. Raises UserError for a wrong option or value; help, and a positional argument
    that is missing, end the program."""
    if not asks_for_help(arguments):
        types = get_type_hints(kind, include_extras=True)
        read_options(types, arguments, command)
        arguments = [flag for word in arguments for flag in _plain_flag(word, types)]
    return _tyro(kind, arguments, command)


def open_option(metavar: str, **more: Any) -> Any:
    """What the help shows of an option that is left open by default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="", **more)


def parse_run_config(
    arguments: list[str],
    command: str = "train",
    description: str = "Train minBERT on several tasks at once, or resume the run in --run.",
) -> RunConfig:
    """A run's configuration: defaults < the run folder's own < `--config FILE` < options. Raises UserError.

    `--force` is allowed among the options and left to the caller: it is no part of a run.
    """
    if asks_for_help(arguments):
        show_help(description, command)
    options, rest = read_options(run_option_types(), arguments, command)
    refuse_words(rest)
    return build_run_config(options)


def refuse_words(words: list[str]) -> None:
    """Raises UserError for words that belong to no option."""
    if words:
        raise UserError(f"what is {words[0]!r}? Options start with --, and the run folder is given by --run")


def run_option_types() -> dict[str, Any]:
    """The type of every option of a run, by its name."""
    types = {
        name: (RunConfig if section is None else SECTIONS[section]).model_fields[name].rebuild_annotation()
        for name, section in OPTIONS.items()
    }
    return types | {"tasks": Annotated[tuple[str, ...], Field(min_length=1)], "config": Path, "force": bool}


def build_run_config(options: Mapping[str, Any]) -> RunConfig:
    """A run's configuration: defaults < the run folder's own < recipes < the file `config` < `options`.

    Raises UserError; the recipe `list` prints all and ends the program.
    """
    file = options.get("config")
    where = "options" if file is None else str(file)
    options = {name: value for name, value in options.items() if name not in ("config", "force")}
    layers = [options] if file is None else [flat_options(read_yaml(file), where), options]
    if recipes := named_recipes(layers):
        layers = [*map(read_recipe, recipes), *layers, {"recipe": recipes}]
    aggregator = next((layer["aggregator"] for layer in reversed(layers) if "aggregator" in layer), None)
    run = next((layer["run"] for layer in reversed(layers) if layer.get("run")), None)
    if isinstance(run, str | Path) and (folder := RunFolder(Path(run))).config_file.exists():
        layers.insert(0, flat_options(folder.read_config().model_dump(), str(run)))
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


def read_options(types: Mapping[str, Any], arguments: list[str], command: str) -> tuple[dict[str, Any], list[str]]:
    """The options given, with values by their types, and the words that belong to no option.

    Raises UserError for an option that `types` does not have, naming the nearest, or a value that it does not allow.
    """
    options: dict[str, Any] = {}
    rest: list[str] = []
    words = list(arguments)
    lists: dict[str, list[str]] = {}  # the words of `--name=a --name=b`
    empty = ""  # the option before, if it has no value
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            rest.append(word)
            continue
        option, attached, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name not in types:
            hint = f"\nIf it is a value of {empty}, write {empty}={word}" if empty else ""
            raise UserError(_unknown(option, types, command) + hint)
        kind, empty = types[name], ""
        if kind is bool:
            options[name] = _convert(option, bool, [value]) if attached else True
            continue
        following = [value] if attached else list(takewhile(lambda word: not word.startswith("--"), words))
        if not following:
            empty = option
        if not _takes_several(kind):
            following = following[:1]
            if following in ([], [""]):
                raise UserError(f"{option} needs a value" + _attach(option, words))
        elif attached:
            following = lists[name] = [*lists.get(name, []), value]
        elif not following and not _may_be_empty(kind):
            raise UserError(f"{option} needs a value" + _attach(option, words))
        options[name] = _convert(option, kind, following)
        if not attached:
            del words[: len(following)]
    return options, rest


def _attach(option: str, words: list[str]) -> str:
    return f"; one that starts with -- is attached to it: {option}={words[0]}" if words else ""


def _plain_flag(word: str, types: Mapping[str, Any]) -> list[str]:
    """`--flag=true` as tyro takes it, which knows flags without a value only."""
    option, attached, value = word.partition("=")
    if not attached or types.get(option.removeprefix("--").replace("-", "_")) is not bool:
        return [word]
    return [option] if _convert(option, bool, [value]) else []


def _convert(option: str, kind: Any, words: list[str]) -> Any:
    if words == ["None"] and NoneType in get_args(_bare(kind)):
        return None
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    value = words if _takes_several(kind) else words[0]
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problems = error.errors()
    if any(problem["type"] == "literal_error" for problem in problems) and words[0].isdecimal():
        return _convert_number(option, adapter, words[0], problems)
    raise UserError(_refusal(option, words, problems))


def _convert_number(option: str, adapter: TypeAdapter, word: str, problems: list) -> Any:
    """Choices may be numbers, which no word equals."""
    try:
        return adapter.validate_python(int(word))
    except ValueError:  # pydantic's, or of a number with thousands of digits
        raise UserError(_refusal(option, [word], problems)) from None


def _refusal(option: str, words: list[str], problems: list) -> str:
    """What is allowed, of each part of a union, and the word that is not."""
    problems = [problem for problem in problems if problem["type"] != "none_required"]
    if own := next((problem for problem in problems if problem["type"] == "value_error"), None):
        return f"{option} {shown(words[0])}: {own['msg'].removeprefix('Value error, ')}"
    wanted = [problem["msg"].removeprefix("Input should be ").partition(", unable to")[0] for problem in problems]
    place = problems[0]["loc"]
    word = words[place[0]] if place and isinstance(place[0], int) else words[0]
    return f"{option} must be {', or '.join(dict.fromkeys(wanted))}, not {shown(word)}"


def _unknown(option: str, types: Mapping[str, Any], command: str) -> str:
    known = [f"--{name.replace('_', '-')}" for name in types]
    wanted = "--" + option.lstrip("-").rpartition(".")[2].replace("_", "-")
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`minbert {command} --help` lists all."
    return f"there is no option {option}; {hint}"


def asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _bare(kind: Any) -> Any:
    """A type without its annotations."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _takes_several(kind: Any) -> bool:
    parts = (kind, *get_args(_bare(kind)))
    return any(get_origin(_bare(part)) is tuple for part in parts)


def _may_be_empty(kind: Any) -> bool:
    """`--trackers` alone means no tracker."""
    return get_origin(kind) is tuple


def _tyro(kind: type[T], arguments: list[str], command: str) -> T:
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, args=arguments, prog=f"minbert {command}", config=settings)


def show_help(description: str, command: str, more: Mapping[str, Any] | None = None) -> NoReturn:
    """Print the help of a command that takes a run's options, and `more`: name -> (type, default); end the program."""
    _tyro(_for_help(description, more or {}), ["--help"], command)
    raise SystemExit


def _for_help(description: str, more: Mapping[str, Any]) -> type[BaseModel]:
    """RunConfig as its help shows it: with --config and --force, and without a word on options that are open by
    default."""

    sections = {name: quiet(section) for name, section in SECTIONS.items()}
    file = open_option("FILE", help="A YAML file with options, alone or under the headings below.")
    fields = _open_fields(RunConfig) | {name: (section, section()) for name, section in sections.items()}
    force = tyro.conf.arg(help="Resume although settings, data or vocabulary are others now; each is named.")
    return create_model(
        "Options",
        __base__=RunConfig,
        __doc__=description,
        config=(Annotated[Path | None, file], None),
        force=(Annotated[bool, force], False),
        **fields,
        **more,
    )


def quiet(section: type[BaseModel]) -> type[BaseModel]:
    """A group of options as the help shows it, without a word on those that are open by default."""
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **_open_fields(section))


def _open_fields(model: type[BaseModel]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: (Annotated[field.rebuild_annotation(), _help_of(field.annotation)], None)
        for name, field in model.model_fields.items()
        if field.default is None
    }
    if "tasks" in model.model_fields:
        words = tyro.conf.arg(metavar="TASK|FILE ...", help=model.model_fields["tasks"].description)
        fields["tasks"] = (Annotated[tuple[str, ...], words], model.model_fields["tasks"].default)
    return fields


def _help_of(kind: Any) -> Any:
    names = []
    for part in (_bare(part) for part in get_args(kind) if part is not NoneType):
        if get_origin(part) is Literal:
            names.append("{" + ",".join(map(str, get_args(part))) + "}")
        elif get_origin(part) is tuple:
            names.append(f"{_bare(get_args(part)[0]).__name__.upper()} ...")
        else:
            names.append(part.__name__.upper())
    return open_option("|".join(names))
