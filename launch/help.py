"""The help of a command, drawn by tyro from the types, defaults and docstrings of its options.

tyro keeps some of the line breaks that docstrings have in the source, and says of an empty list that it is the default:
so it is given types like those of the options, that say of each in one paragraph what it is.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

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


def open_option(metavar: str) -> Any:
    """What the help shows of an option that is left open by default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def help_with_run_options(
    command: str, description: str, options: Mapping[str, Option], groups: Mapping[str, type[BaseModel]]
) -> Help:
    """The help of a command that has a run's options, with --config and --force, `options`, and `groups` of them."""
    sections = {name: described(section) for name, section in (SECTIONS | dict(groups)).items()}
    shown = {name: _shown(option) for name, option in (RUN_OPTIONS | dict(options)).items()}
    shown |= _fields_of_model(RunConfig) | {name: (section, section()) for name, section in sections.items()}
    return Help(create_model("Options", __base__=RunConfig, __doc__=description, **shown), command)


def described(kind: type) -> type:
    """A type with the options that are the fields of `kind`, a dataclass or model, of which each says in one paragraph
    what it is, and what its default is if there is one."""
    if is_dataclass(kind):
        return make_dataclass(
            kind.__name__, _fields_of_dataclass(kind), namespace={"__doc__": _paragraph(kind.__doc__)}
        )
    return create_model(kind.__name__, __base__=kind, __doc__=_paragraph(kind.__doc__), **_fields_of_model(kind))


def _shown(option: Option) -> tuple[Any, Any]:
    """Type and default, as a model's field has them."""
    kind = option.type if option.default is not None else option.type | None
    marks = [_told(option.help)] + [open_option(option.metavar)] * bool(option.metavar)
    return Annotated[kind, *marks], option.default


def _fields_of_dataclass(kind: type) -> list[tuple[str, Any, Any]]:
    types, texts = get_type_hints(kind, include_extras=True), docstrings(kind)
    found = []
    for each in fields(kind):
        mark = _mark(each.name, types[each.name], each.default, texts)
        default = {"default": each.default} if each.default is not MISSING else {}
        found.append((each.name, Annotated[types[each.name], *mark], field(**default)))
    return found


def _fields_of_model(model: type[BaseModel]) -> dict[str, Any]:
    """Those that are no groups of options themselves."""
    texts, found = docstrings(model), {}
    for name, each in model.model_fields.items():
        if isinstance(each.default, BaseModel):
            continue
        kind, default = each.rebuild_annotation(), each.default
        if name in WORDS:
            kind, default = tuple[str, ...], tuple(default)
        found[name] = (Annotated[kind, *_mark(name, kind, default, texts)], default)
    return found


def _mark(name: str, kind: Any, default: Any, texts: Mapping[str, str]) -> list[Any]:
    """What the help says of an option; marks of its own come last, and so have the last word."""
    marks = [_told(texts.get(name, ""))]
    if name in WORDS:
        marks.append(tyro.conf.arg(metavar=WORDS[name]))
    elif default is None:
        marks.append(_open(kind))
    return [*marks, *getattr(kind, "__metadata__", ())]


def _told(text: str) -> Any:
    return tyro.conf.arg(help=_paragraph(text), help_behavior_hint=_default)


def _default(shown: str) -> str:
    return f"(default: {shown})" if shown else ""


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def _open(kind: Any) -> Any:
    """Of an option that is left open by default, the kinds of value that it takes."""
    names = []
    for part in (bare(part) for part in get_args(bare(kind)) if part is not NoneType):
        if get_origin(part) is Literal:
            names.append("{" + ",".join(map(str, get_args(part))) + "}")
        elif get_origin(part) is tuple:
            names.append(f"{bare(get_args(part)[0]).__name__.upper()} ...")
        else:
            names.append(part.__name__.upper())
    return open_option("|".join(names))


def docstrings(kind: type) -> dict[str, str]:
    """The strings that stand below the fields of a class, by field; those of its bases too."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if owner.__module__.startswith("minbert."):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
            assert isinstance(definition, ast.ClassDef)
            for above, below in pairwise(definition.body):
                if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
                    assert isinstance(above.target, ast.Name)
                    found[above.target.id] = ast.literal_eval(below.value)
    return found
