"""Words of a command line become values by the types of their options."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from minbert.data.errors import UserError
from minbert.launch.words import read_options

TYPES = {
    "flag": bool,
    "count": Annotated[int, Field(ge=1)],
    "some_rate": float | None,
    "stage": Literal[0, 1] | None,
    "level": Literal["low"] | int,
    "where": Path | None,
    "names": tuple[Literal["a", "b"], ...],
    "weights": tuple[float, ...] | None,
}


@pytest.mark.parametrize(
    ("line", "options", "rest"),
    [
        ("x --flag y", {"flag": True}, ["x", "y"]),
        ("--count=3 x", {"count": 3}, ["x"]),
        ("--some-rate -1e-3 x", {"some_rate": -1e-3}, ["x"]),
        ("--some_rate None --stage none --where ./none", {"some_rate": None, "stage": None, "where": Path("none")}, []),
        ("--stage 1 --level 1", {"stage": 1, "level": 1}, []),
        ("--level low --level 2", {"level": 2}, []),
        ("--names a b --weights 1 -2", {"names": ("a", "b"), "weights": (1.0, -2.0)}, []),
        ("--names --weights None", {"names": (), "weights": None}, []),
        ("--where a=b", {"where": Path("a=b")}, []),
    ],
)
def test_words_become_values_by_the_types_of_their_options(line, options, rest):
    assert read_options(TYPES, line.split(), "test") == (options, rest)


@pytest.mark.parametrize("line", ["--count 0", "--stage 2", "--level high", "--names a c", "--nam a", "--some-rate"])
def test_wrong_words_are_refused(line):
    with pytest.raises(UserError):
        read_options(TYPES, line.split(), "test")
