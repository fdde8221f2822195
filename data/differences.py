"""Two mappings of settings beside each other: those of a folder or a checkpoint, and those that are asked for now."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minbert.data.errors import UserError


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], there: str = "in the folder", here: str = "asked for"
) -> list[str]:
    """A line for every name whose values differ: `lr: 0.001 in the folder, 0.5 asked for`."""
    return [
        f"{name}: {before.get(name)} {there}, {now.get(name)} {here}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def indented(lines: Sequence[str]) -> str:
    """Lines below the one that says what they are."""
    return "\n".join(f"  {line}" for line in lines)


def refuse(what: str, different: Sequence[str], way: str) -> NoReturn:
    """Raises UserError: `what` it is that differs, each difference in a line of its own, and the `way` out."""
    raise UserError(f"{what}:\n{indented(different)}\n{way}")
