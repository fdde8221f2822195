"""Sweeps: every combination of some options' values, as a run folder of its own that is named by them."""

import re
from collections.abc import Iterable
from hashlib import sha256
from itertools import product

from minbert.data.errors import UserError


def parse_sweep(words: Iterable[str]) -> dict[str, list[str]]:
    """`seed=1,2,3 aggregator=sum,pcgrad` as {"seed": ["1", "2", "3"], ...}. Raises UserError for anything else."""
    axes: dict[str, list[str]] = {}
    for word in words:
        name, given, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not name or not given or not all(values.split(",")):
            raise UserError(f"--sweep takes OPTION=VALUE,VALUE,..., not {word!r}")
        if name in axes:
            raise UserError(f"--sweep names {name} twice")
        if name == "run":
            raise UserError("--sweep cannot vary the run folder: each element has one of its own under --run")
        axes[name] = values.split(",")
    if not axes:
        raise UserError("--sweep needs OPTION=VALUE,VALUE,...")
    return axes


def elements(axes: dict[str, list[str]]) -> dict[str, list[str]]:
    """The name of each element's folder -> its options for the command line, such as ["--seed", "1"].

    Raises UserError if two elements would have the same name.
    """
    found: dict[str, list[str]] = {}
    for values in product(*axes.values()):
        name = ",".join(f"{option}={_safe(value)}" for option, value in zip(axes, values))
        if name in found:
            raise UserError(f"two elements of the sweep are called {name}")
        found[name] = [
            word for option, value in zip(axes, values) for word in (f"--{option.replace('_', '-')}", *value.split())
        ]
    return found


def _safe(value: str) -> str:
    """As part of a file's name; where it loses something, a hash keeps it apart from others."""
    plain = re.sub(r"[^\w.+-]+", "_", value).strip("_")
    return plain if plain == value else f"{plain}~{sha256(value.encode()).hexdigest()[:6]}"
