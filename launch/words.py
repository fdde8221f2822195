"""The words of a command line as values, by the types of their options; a wrong one is refused as it is in a file.

`--name value`, `--flag` and, where a value starts with --, `--name=value`. An option of several values takes the words
up to the next option, or one with each `--name=value`.
"""

import difflib
from collections.abc import Mapping
from itertools import takewhile
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from minbert.data.errors import UserError, shown


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
        if bare(kind) is bool:
            options[name] = convert(option, bool, [value]) if attached else True
            continue
        following = [value] if attached else list(takewhile(lambda word: not word.startswith("--"), words))
        if not following:
            empty = option
        if not takes_several(kind):
            following = following[:1]
            if following in ([], [""]):
                raise UserError(f"{option} needs a value" + _attach(option, words))
        elif attached:
            following = lists[name] = [*lists.get(name, []), value]
        elif not following and not _may_be_empty(kind):
            raise UserError(f"{option} needs a value" + _attach(option, words))
        options[name] = convert(option, kind, following)
        if not attached:
            del words[: len(following)]
    return options, rest


def _attach(option: str, words: list[str]) -> str:
    return f"; one that starts with -- is attached to it: {option}={words[0]}" if words else ""


def convert(option: str, kind: Any, words: list[str]) -> Any:
    """The words given to an option as a value of its type; `none` leaves one open that may be, whatever a recipe or a
    file says. Raises UserError, naming the option, if they are no value."""
    if words in (["none"], ["None"]) and NoneType in get_args(bare(kind)):
        return None
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    value = words if takes_several(kind) else words[0]
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
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else f"`minbert {command} --help` lists all."
    return f"there is no option {option}; {hint}"


def bare(kind: Any) -> Any:
    """A type without its annotations."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def takes_several(kind: Any) -> bool:
    """Whether an option's value may be several words."""
    parts = (kind, *get_args(bare(kind)))
    return any(get_origin(bare(part)) is tuple for part in parts)


def _may_be_empty(kind: Any) -> bool:
    """`--trackers` alone means no tracker."""
    return get_origin(kind) is tuple
