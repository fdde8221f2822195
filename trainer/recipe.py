"""Recipes: configurations that have a name, as YAML files in `trainer/recipes/`.

A recipe may build on another (`base`), one level deep, and its first line of comment says what it is. Several are laid
over each other, the later wins: `paper-full minilm` is the paper's best model in another size.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError, shown
from minbert.data.reading import read_yaml
from minbert.trainer.config import flat_options

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """The name of every recipe, and what it is."""
    first_lines = {path.stem: path.read_text().partition("\n")[0] for path in sorted(RECIPES.glob("*.yaml"))}
    return {name: line.removeprefix("# ") for name, line in first_lines.items()}


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's options by their own names. Raises UserError if there is none of this name."""
    options = _read(name)
    base = options.pop("base", None)
    return options if base is None else _read(base) | options


def listed() -> str:
    """All recipes, one a line."""
    known = recipes()
    width = max(map(len, known))
    return "\n".join(f"{name:<{width}}  {what}" for name, what in known.items())


def _read(name: Any) -> dict[str, Any]:
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(str(name)[:80], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no recipe is called {shown(name)}; {hint}There are {', '.join(known)}")
    path = RECIPES / f"{name}.yaml"
    return flat_options(read_yaml(path), str(path))


def named_recipes(layers: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """The recipes that options name, of which the last have the word. `list` prints all and ends the program."""
    named = next((layer["recipe"] for layer in reversed(layers) if layer.get("recipe") is not None), ())
    names = tuple([named] if isinstance(named, str) else named)
    if names == ("list",):
        print(listed())
        raise SystemExit
    return names
