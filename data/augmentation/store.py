"""Translations on disk: shards that are named by their content, one folder for each recipe.

A shard is written once, atomically, and never changed, so whoever reads beside a writer sees whole files only. Its name
is the SHA-256 of its bytes: a shard that is not as it was written is noticed, dropped, and what was in it made again.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minbert.data.augmentation.recipe import RECIPE_FOLDER, Recipe
from minbert.data.files import holding, replacing

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"


class Translation(NamedTuple):
    """What a text became: in the pivot language, and back."""

    pivot: str
    back: str


class Store:
    """The translations of one recipe under `root`, read as far as they are there; `refresh` reads what is new."""

    def __init__(self, root: Path, recipe: Recipe):
        self.folder, self.recipe = root / recipe.folder, recipe
        self.translations: dict[str, Translation] = {}
        self._read: set[str] = set()
        self.refresh()

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those that have no translation yet, each once, in their order."""
        return [text for text in dict.fromkeys(texts) if text not in self.translations]

    def refresh(self) -> None:
        """Read the shards that came since. One that is damaged is removed, with a warning. Raises OSError."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"[0-9a-f]*{SUFFIX}")):
            if path.name in self._read:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # damaged, and another reader has removed it
            if _digest(content) != path.stem:
                log.warning("%s is not as it was written: what was in it is translated again", path)
                path.unlink(missing_ok=True)
                continue
            self._read.add(path.name)
            for line in content.decode().split("\n")[:-1]:  # there are other line breaks in texts
                text, pivot, back = json.loads(line)
                self.translations.setdefault(text, Translation(pivot, back))

    def add(self, translations: Mapping[str, Translation]) -> None:
        """Keep them as one shard. Raises OSError."""
        lines = [json.dumps([text, *translation], ensure_ascii=False) for text, translation in translations.items()]
        content = "".join(f"{line}\n" for line in lines).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "recipe.json"
        if not about.exists():
            with replacing(about) as temporary:
                temporary.write_text(json.dumps({"model": self.recipe.model} | self.recipe.identity, indent=2) + "\n")
        path = self.folder / f"{_digest(content)}{SUFFIX}"
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        self._read.add(path.name)
        self.translations |= translations

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the piece of work `name` is ours; it stays so to the end of the block, or of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as ours:
            try:
                ours.enter_context(holding(self.folder / f"{name}.lock"))
            except BlockingIOError:
                yield False
                return
            self.refresh()  # somebody else may have finished it meanwhile
            yield True


def sweep(root: Path) -> None:
    """Remove the locks below `root` that killed processes have left."""
    for path in root.glob("*/*.lock"):
        with suppress(BlockingIOError), holding(path):
            pass  # which removes it in the end


def is_store(root: Path) -> bool:
    """Whether `root` is a folder, and holds recipes' translations alone; others' files have other names."""
    if not root.is_dir():
        return False
    return all(RECIPE_FOLDER.fullmatch(entry.name) for entry in root.iterdir() if not entry.name.startswith("."))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
