"""Recipes: configurations that have a name, as YAML files in `trainer/recipes/`.

The first line of comment says what a recipe is. It may build on another (`base`), one level deep, and say which options
the user has to give (`needs`). Several are laid over each other: `paper-full minilm` is the paper's best model in
another size.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError, shown
from minbert.data.reading import read_yaml
from minbert.trainer.config import flat_options

RECIPES = Path(__file__).parent / "recipes"

Options = Mapping[str, Any]


def recipes() -> dict[str, str]:
    """The name of every recipe, and what it is."""
    first_lines = {path.stem: path.read_text().partition("\n")[0] for path in RECIPES.glob("*.yaml")}
    return {name: first_lines[name].removeprefix("# ") for name in sorted(first_lines)}


def with_recipes(layers: Sequence[Options]) -> list[Options]:
    """Layers of options, the later over the earlier, above the recipes that the last `recipe` among them names.

    The recipe `list` prints all and ends the program. Raises UserError if there is no such recipe, or it needs an
    option that nobody gives.
    """
    named = next((layer["recipe"] for layer in reversed(layers) if layer.get("recipe") is not None), ())
    names = (named,) if isinstance(named, str) or not isinstance(named, Sequence) else tuple(named)
    if not names:
        return list(layers)
    if names == ("list",):
        known = recipes()
        print("\n".join(f"{name:<{max(map(len, known))}}  {what}" for name, what in known.items()))
        raise SystemExit
    read = [read_recipe(name) for name in names]
    for name, options in zip(names, read):
        for option in options.pop("needs", []):
            if not any(layer.get(option) for layer in layers):
                raise UserError(f"the recipe {name} needs --{option.replace('_', '-')}: {recipes()[name]}")
    return [*read, *layers, {"recipe": names}]


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's options by their own names. Raises UserError if there is none of this name."""
    options = _read(name)
    base = options.pop("base", None)
    return options if base is None else _read(base) | options


def _read(name: Any) -> dict[str, Any]:
    known = recipes()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name)[:80], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no recipe is called {shown(name)}; {hint}There are {', '.join(known)}")
    path = RECIPES / f"{name}.yaml"
    return flat_options(read_yaml(path), str(path))
