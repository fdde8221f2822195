"""minbert from Python: what its commands do, in a notebook or a script, with runs as objects.

This folder is the package `minbert` itself; its rooms are the folders beside it. Names are imported when they are first
asked for, so `import minbert` costs nothing. docs/python.md tells how to use them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minbert.data.errors import UserError
    from minbert.launch.api import Comparison, Curve, Run, Unfinished, compare, runs, train

__all__ = ["Comparison", "Curve", "Run", "Unfinished", "UserError", "compare", "runs", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("minbert")
    if name not in __all__:
        raise AttributeError(f"module 'minbert' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("minbert.data.errors" if name == "UserError" else "minbert.launch.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
