"""How training sees back translations: drawn in the place of a row, anew each time, or appended to the training rows.

A file by `minbert augment` says for each of its rows of which training row it was made. It is joined to the rows that
are trained on now, and refused if those are others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from minbert.data.augmentation.rows import ORIGIN, row_digest
from minbert.data.errors import DataError
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.ragged import Ragged
from minbert.data.sequences.split import Encoded, TokenisedSplit
from minbert.data.sources.examples import Examples, parse_label
from minbert.data.sources.own import Record, read_columns
from minbert.data.task import FORMATS


@dataclass(frozen=True)
class Augmentation:
    """New rows (m) for a split: `sources` (m,) are the rows that they were made of."""

    examples: Examples
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)


def read_augmentation(paths: Sequence[Path], tasks: Sequence[str], examples: Examples, part: bool) -> Augmentation:
    """The new rows in the files `paths` for the training rows `examples`, all of their split or `part` of it. Raises
    DataError if a file is none by `minbert augment`, has rows of none of the `tasks`, or was made of other rows."""
    task = examples.task
    place = {identifier: row for row, identifier in enumerate(examples.ids)}
    found: list[tuple[int, str, tuple[str, ...], float | list[float]]] = []
    for path in paths:
        for where, record in _records(path):
            if record["task"] not in tasks:
                raise DataError(f"{where}: a row of task {record['task']}, which is not among {', '.join(tasks)}")
            if record["task"] != task.name:
                continue
            row = place.get(str(record["source"]))
            if row is None and part:
                continue
            if row is None or record["source_digest"] != _digest_of(examples, row):
                raise DataError(
                    f"{where}: made of row {record['source']} of {task.name}, which {examples.source} does not have, "
                    "or has otherwise: run minbert augment again, with the data that is trained on"
                )
            found.append((row, *_parse(where, record, examples)))
    rows, ids, sentences, labels = zip(*found) if found else ((), (), (), ())
    columns = tuple(list(column) for column in zip(*sentences)) if found else tuple([] for _ in task.sentences)
    source = ", ".join(map(str, paths))
    new = Examples(task, "train", source, list(ids), columns, np.asarray(labels, np.float32))
    if len(set(ids)) < len(ids):
        twice = next(identifier for identifier in ids if ids.count(identifier) > 1)
        raise DataError(f"{source}: row {twice} of {task.name} is there twice")
    return Augmentation(new, np.asarray(rows, np.int64))


def appended(examples: Examples, new: Examples) -> Examples:
    """The rows with the new ones after them: the paper's quadrupling, of pairs with one variant."""
    if not len(new):
        return examples
    assert examples.labels is not None and new.labels is not None, examples.task.name
    return replace(
        examples,
        ids=examples.ids + new.ids,
        sentences=tuple(old + more for old, more in zip(examples.sentences, new.sentences, strict=True)),
        labels=np.concatenate([examples.labels, new.labels]),
    )


@dataclass(frozen=True)
class AugmentedSplit(TokenisedSplit):
    """A training split of n rows, in whose place their new rows are drawn: whenever a row that has some comes up, one
    of them is taken with probability `share`, each as often as the others.

    `new` holds the m new rows, ordered by the row that they were made of; those of row i are numbers `first[i]` to
    `first[i + 1]` - 1. `joined` is both, one after the other.
    """

    new: TokenisedSplit = field(kw_only=True)
    first: np.ndarray = field(kw_only=True)  # (n + 1,) int64
    joined: TokenisedSplit = field(kw_only=True)
    share: float = field(kw_only=True)

    @staticmethod
    def of(split: TokenisedSplit, new: TokenisedSplit, sources: np.ndarray, share: float) -> "AugmentedSplit":
        """`sources` (m,): the row of `split` that each of `new` was made of."""
        order = np.argsort(sources, kind="stable")
        columns = tuple(column.take(order) for column in new.columns)
        assert split.labels is not None and new.labels is not None
        new = TokenisedSplit([new.ids[row] for row in order], columns, new.labels[order], split.joint)
        both = tuple(Ragged.concatenate([old, more]) for old, more in zip(split.columns, columns, strict=True))
        labels = np.concatenate([split.labels, new.labels])
        joined = TokenisedSplit([*split.ids, *new.ids], both, labels, split.joint)
        first = np.concatenate([[0], np.cumsum(np.bincount(sources, minlength=len(split)))])
        return AugmentedSplit(
            split.ids, split.columns, split.labels, split.joint, new=new, first=first, joined=joined, share=share
        )

    def encode(self, rows: np.ndarray, draw: Draw | None = None) -> Encoded:
        return self.joined.encode(rows if draw is None else self.drawn(rows, draw), draw)

    def drawn(self, rows: np.ndarray, draw: Draw) -> np.ndarray:
        """The rows of `joined` that take the place of `rows`; with those numbers, the same everywhere."""
        whether, which = draw.uniform("back translation", 2).T
        count = self.first[rows + 1] - self.first[rows]
        chosen = self.first[rows] + np.minimum((which * count).astype(np.int64), count - 1)
        return np.where((whether < self.share) & (count > 0), len(self) + chosen, rows)

    def fingerprint(self) -> str:
        """That of the rows, and of the new ones with their places."""
        places = _hash(self.first)
        return f"{super().fingerprint()}, and {self.new.fingerprint()} drawn in their place ({places})"


def _hash(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]


def _records(path: Path) -> list[Record]:
    """The file's rows by column, with their places. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; `minbert augment` writes such files")
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path} must end in {', '.join(FORMATS)}")
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, modified: int, size: int) -> list[Record]:
    records = []
    for where, record in read_columns(path):
        if isinstance(record, str):
            raise DataError(f"{where}: {record}")
        if missing := [name for name in ORIGIN if not isinstance(record.get(name), str)]:
            raise DataError(f"{where}: no {' and '.join(missing)}; such a file is written by `minbert augment`")
        records.append((where, record))
    return records


@lru_cache(maxsize=1 << 17)
def _remembered_digest(sentences: tuple[str, ...], label: bytes) -> str:
    return row_digest(sentences, np.frombuffer(label, np.float32))


def _digest_of(examples: Examples, row: int) -> str:
    assert examples.labels is not None
    return _remembered_digest(tuple(column[row] for column in examples.sentences), examples.labels[row].tobytes())


def _parse(where: str, record: dict, examples: Examples) -> tuple[str, tuple[str, ...], float | list[float]]:
    """Id, sentences and label of a new row. Raises DataError."""
    task = examples.task
    sentences = tuple(str(record.get(column) or "").strip() for column in task.sentences)
    if not all(sentences):
        raise DataError(f"{where}: no text in {' or '.join(task.sentences)}")
    try:
        label = parse_label(task, record.get(task.label))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return str(record.get(task.id)), sentences, label
