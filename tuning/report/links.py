"""Links between pages as the files lie: from a search, an ablation or a comparison to the pages of its runs, and from
the page of such a run back.

A link is there when the page is that it leads to; who writes the page of a run writes its search's anew.
"""

import os
from pathlib import Path
from urllib.parse import quote

from minbert.tuning.ablation import ABLATION_FILE
from minbert.tuning.report.page import link
from minbert.tuning.search import SEARCH_FILE

PAGE = "report.html"  # in the folder of which it tells
KINDS = {SEARCH_FILE: "Search", ABLATION_FILE: "Ablation"}
DEEPEST = 3  # ABLATION/runs/VARIANT/seed-N, SEARCH/again/TRIAL/seed-N


def to_run(text: str, run: Path, place: Path) -> str:
    """A cell of a page in the folder `place`: leads to the page of the run in `run`, if it has one."""
    page = run / PAGE
    return link(text, _path(page, place)) if page.exists() else text


def owner(run: Path) -> Path | None:
    """The folder of the search or ablation that the run in the folder `run` belongs to."""
    if not (run / "trial.json").exists():
        return None
    above = list(run.absolute().parents)[:DEEPEST]
    return next((folder for folder in above if any((folder / file).exists() for file in KINDS)), None)


def to_owner(run: Path, place: Path) -> str:
    """What stands above the page of a run, in the folder `place`: to the page of its search or ablation, if it has one;
    else nothing."""
    folder = owner(run)
    if folder is None or not (folder / PAGE).exists():
        return ""
    kind = next(kind for file, kind in KINDS.items() if (folder / file).exists())
    return link(f"{kind} {folder.name}", _path(folder / PAGE, place))


def _path(page: Path, place: Path) -> str:
    """Relative, so that it holds wherever the folders lie together."""
    return quote(Path(os.path.relpath(page.absolute(), place.absolute())).as_posix())
