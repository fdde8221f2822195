"""The help of a command, drawn by tyro from the types, defaults and docstrings of its options."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import tyro
from pydantic import BaseModel, create_model

from minbert.launch.manual import Help
from minbert.launch.words import bare
from minbert.trainer.config import SECTIONS, RunConfig

# Options whose words are not yet what they stand for.
WORDS = {"tasks": "TASK|FILE ...", "slurm_parameters": "NAME=VALUE ..."}


class Option(NamedTuple):
    """An option of a command that takes a run's options too; `metavar` where the default is none or says nothing."""

    type: Any
    default: Any
    help: str
    metavar: str = ""


# Of every run, beside its configuration.
RUN_OPTIONS = {
    "config": Option(Path, None, "A YAML file with options, alone or under the headings below.", "FILE"),
    "force": Option(bool, False, "Resume although settings, data or vocabulary are others now; each is named."),
}


def open_option(metavar: str, **more: Any) -> Any:
    """What the help shows of an option that is left open by default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="", **more)


def help_with_run_options(
    command: str, description: str, options: Mapping[str, Option], groups: Mapping[str, type[BaseModel]]
) -> Help:
    """The help of a command that has a run's options, with --config and --force, `options`, and `groups` of them."""
    sections = {name: _open(section) for name, section in (SECTIONS | dict(groups)).items()}
    fields = {name: _shown(option) for name, option in (RUN_OPTIONS | dict(options)).items()}
    fields |= _open_fields(RunConfig) | {name: (section, section()) for name, section in sections.items()}
    return Help(create_model("Options", __base__=RunConfig, __doc__=description, **fields), command)


def _shown(option: Option) -> tuple[Any, Any]:
    """Type and default, as a model's field has them."""
    kind = option.type if option.default is not None else option.type | None
    text = open_option(option.metavar, help=option.help) if option.metavar else tyro.conf.arg(help=option.help)
    return Annotated[kind, text], option.default


def _open(section: type[BaseModel]) -> type[BaseModel]:
    """A group of options, without a word on the defaults of those that are open by default."""
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **_open_fields(section))


def _open_fields(model: type[BaseModel]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: (Annotated[field.rebuild_annotation(), _help_of(field.annotation)], None)
        for name, field in model.model_fields.items()
        if field.default is None
    }
    for name in WORDS.keys() & model.model_fields.keys():
        default = tuple(model.model_fields[name].default)
        words = tyro.conf.arg(metavar=WORDS[name]) if default else open_option(WORDS[name])
        fields[name] = (Annotated[tuple[str, ...], words], default)
    return fields


def _help_of(kind: Any) -> Any:
    names = []
    for part in (bare(part) for part in get_args(kind) if part is not NoneType):
        if get_origin(part) is Literal:
            names.append("{" + ",".join(map(str, get_args(part))) + "}")
        elif get_origin(part) is tuple:
            names.append(f"{bare(get_args(part)[0]).__name__.upper()} ...")
        else:
            names.append(part.__name__.upper())
    return open_option("|".join(names))
