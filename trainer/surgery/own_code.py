"""A run's own aggregator: the source that `package.module:function` names is kept in the run folder.

So a job on another machine finds it, a run is resumed with the code that it was started with, and the run says what
that was. Nothing here imports it: training does, and only training.
"""

import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from minbert.data.errors import UserError
from minbert.trainer.surgery.methods import is_own


def find_source(aggregator: str) -> list[Path]:
    """Where the module's package lies; nowhere if it is installed. Raises UserError if there is no such module."""
    if not is_own(aggregator):
        return []
    top = _top(aggregator)
    try:
        spec = find_spec(top)
    except ValueError:  # it is there already, without a file
        spec = None
    if spec is None:
        raise UserError(f"aggregator {aggregator}: there is no module {top} in {Path.cwd()} or among what is installed")
    sources = spec.submodule_search_locations
    if not sources:
        assert spec.origin is not None, spec  # what is no package is a file
        sources = [spec.origin]
    return [] if any(_installed(source) for source in sources) else [Path(source) for source in sources]


def keep_source(aggregator: str, folder: Path) -> None:
    """Copy the Python files of the module's package into `folder`, but not of one that is installed.

    Raises UserError if there is no such module.
    """
    sources, top = find_source(aggregator), _top(aggregator)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        for source in sources:
            for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
                copy = unfinished / (top / file.relative_to(source) if source.is_dir() else file.name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        if unfinished.exists():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _top(aggregator: str) -> str:
    return aggregator.partition(":")[0].partition(".")[0]


def use_source(folder: Path) -> None:
    """Let what was kept in `folder` be found first."""
    if folder.is_dir() and str(folder.absolute()) not in sys.path:
        sys.path.insert(0, str(folder.absolute()))


def find_in_working_folder(aggregator: str) -> None:
    """Let an aggregator that the user names be found in the folder where they stand."""
    if is_own(aggregator) and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _installed(source: str | None) -> bool:
    """Whether a module comes with Python or its packages: then it is a matter of the environment."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return source is None or not Path(source).exists() or any(Path(source).is_relative_to(root) for root in roots)
