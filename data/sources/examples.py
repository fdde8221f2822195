"""The rows of one split of one task, and the checks that every source of rows passes through.

A source (the course's files, a Hugging Face data set) yields rows as it finds them; `collect` decides which are usable,
reports the others by place and reason, and returns `Examples`, which is all that tokenisation and training see.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from minbert.data.errors import DataError, shown
from minbert.data.task import Split, Task

logger = logging.getLogger(__name__)

BadRows = Literal["refuse", "skip"]

SOURCES = (
    "A source is 'builtin' (a generated corpus, no files needed), 'hub' (Hugging Face, needs the network), "
    "'hub:DIR' (data sets saved to disk), or a folder with the course's files."
)

_SHOWN = 10  # bad rows that a message lists; a wrong column makes all of them bad


@dataclass(frozen=True)
class BadRow:
    """A row that was not used. `where` is file:line, or split:row of a Hugging Face data set (counted from 0)."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Row(NamedTuple):
    """A row as a source gives it, not checked yet. `label` is the source's own value, None where there is none."""

    where: str
    id: str
    sentences: tuple[str, ...]
    label: object = None


@dataclass
class Examples:
    """One split of a task, n usable rows. `sentences` has one list of n strings per sentence column of the task."""

    task: Task
    split: Split
    source: str
    ids: list[str]
    sentences: tuple[list[str], ...]
    labels: np.ndarray | None  # (n,) float32, multilabel (n, classes); None where the split is unlabelled
    skipped: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def parse_label(task: Task, raw: object) -> float | list[float]:
    """The label as a number, of a multilabel task as one 0 or 1 per class.

    Where classes are named by numbers (stars from 1 to 5), a number is a name, also as a table of floats has it (5.0).
    Raises ValueError, whose message is the reason, if it is none that the task allows.
    """
    if task.kind == "multilabel":
        return _parse_several(task, raw)
    text = "" if raw is None else str(raw).strip()
    if not text:
        raise ValueError("label is missing")
    if text in task.classes:
        return float(task.classes.index(text))
    if isinstance(raw, bool):
        return _parse_truth(task, raw)
    value = _number(text)
    if value is None:
        classes = f" and no class ({', '.join(task.classes)})" if task.classes else ""
        raise ValueError(f"label {text!r} is not a number{classes}")
    if not math.isfinite(value):
        raise ValueError(f"label {text} is not finite")
    numbers = [_number(name) for name in task.classes]
    if any(number is not None and math.isfinite(number) for number in numbers):
        if value not in numbers:
            raise ValueError(f"label {text} is no class ({', '.join(task.classes)})")
        return float(numbers.index(value))
    low, high = task.label_range
    if not low <= value <= high:
        raise ValueError(f"label {text} is outside {low:g}..{high:g}")
    if task.classes and not value.is_integer():
        raise ValueError(f"label {text} is not a whole number")
    return value


def _parse_truth(task: Task, raw: bool) -> float:
    """Truth values, of jsonl and parquet, stand for classes called true and false, in whatever case, or for 1 and 0."""
    names = [name.lower() for name in task.classes]
    if "true" in names or "false" in names:
        if str(raw).lower() not in names:
            raise ValueError(f"label {raw} is no class ({', '.join(task.classes)})")
        return float(names.index(str(raw).lower()))
    return float(parse_label(task, int(raw)))  # type: ignore[arg-type]  # of one label


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parse_several(task: Task, raw: object) -> list[float]:
    """Names joined by commas, or a list of them; none at all is a label, too, but not a missing one."""
    if raw is None:
        raise ValueError("label is missing")
    parts = raw if isinstance(raw, list | tuple) else str(raw).split(",")
    names = [name for part in parts if (name := str(part).strip())]
    if unknown := [name for name in names if name not in task.classes]:
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(task.classes)}")
    return [float(name in names) for name in task.classes]


def collect(
    task: Task,
    split: Split,
    source: str,
    rows: Iterable[Row | BadRow],
    bad_rows: BadRows = "refuse",
    known_defects: Mapping[str, str] | None = None,
) -> Examples:
    """Check every row and gather the good ones.

    A test split in which no row has a label (None, empty, or GLUE's -1) is unlabelled; other splits must be labelled
    throughout. A bad row whose id is in `known_defects` is broken for everybody: it is left out of a labelled split
    whatever the policy, and kept in an unlabelled one. Any other bad row raises DataError under "refuse" and goes to
    `skipped` under "skip". A split without a usable row raises DataError.
    """
    rows, known_defects = list(rows), known_defects or {}
    labelled = split != "test" or any(isinstance(row, Row) and row.label not in (None, "", -1) for row in rows)
    good: list[Row] = []
    labels: list[float | list[float]] = []
    bad: list[BadRow] = []
    known: list[BadRow] = []
    first_place: dict[str, str] = {}  # of each id
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            label = _check(task, row, labelled, first_place)
        except ValueError as reason:
            if row.id not in known_defects:
                bad.append(BadRow(row.where, str(reason)))
                continue
            if labelled:
                known.append(BadRow(row.where, known_defects[row.id]))
                continue
            label = [0.0] * len(task.classes) if task.kind == "multilabel" else 0.0
        good.append(row)
        labels.append(label)

    if bad and bad_rows == "refuse":
        advice = "Mend them, or leave them out with --bad-rows skip."
        raise DataError(
            f"{source}: {len(bad)} of {len(rows)} rows of {task.name} {split} are bad\n{_list(bad)}\n{advice}"
        )
    skipped = known + bad
    if not good:
        raise DataError(f"{source}: {task.name} {split} has no usable row\n{_list(skipped)}".rstrip())
    if skipped:
        logger.warning("%s: left out %d of %d rows\n%s", source, len(skipped), len(rows), _list(skipped))
    return Examples(
        task,
        split,
        source,
        [row.id for row in good],
        tuple(list(column) for column in zip(*(row.sentences for row in good), strict=True)),
        np.asarray(labels, dtype=np.float32) if labelled else None,
        skipped,
    )


def limit(examples: Examples, n: int) -> Examples:
    """A sub-sample of `n` rows spread evenly over the split, the same one every time; all rows if there are fewer."""
    if n < 1:
        raise ValueError(f"cannot limit examples to {n} rows")
    if n >= len(examples):
        return examples
    rows = [i * len(examples) // n for i in range(n)]
    return replace(
        examples,
        ids=[examples.ids[row] for row in rows],
        sentences=tuple([column[row] for row in rows] for column in examples.sentences),
        labels=None if examples.labels is None else examples.labels[rows],
    )


def fingerprint(examples: Examples) -> str:
    """SHA-256 (hexadecimal) of ids, sentences and labels: equal exactly for equal data, wherever it was read from."""
    digest = hashlib.sha256(json.dumps([examples.ids, examples.sentences]).encode())
    digest.update(b"unlabelled" if examples.labels is None else examples.labels.astype("<f4").tobytes())
    return digest.hexdigest()


def _check(task: Task, row: Row, labelled: bool, first_place: dict[str, str]) -> float | list[float]:
    """The row's label (0 in an unlabelled split). Raises ValueError with the reason for which it cannot be used."""
    if not row.id:
        raise ValueError("id is empty")
    if row.id in first_place:
        raise ValueError(f"id {row.id} was given before, at {first_place[row.id]}")
    first_place[row.id] = row.where
    for column, sentence in zip(task.sentences, row.sentences, strict=True):
        if not sentence:
            raise ValueError(f"{column} is empty")
    for column, text in zip((task.id, *task.sentences), (row.id, *row.sentences), strict=True):
        require_whole(text, column)
    return parse_label(task, row.label) if labelled else 0.0


def require_whole(text: str, what: str) -> None:
    r"""Raises ValueError for a text with half of a character, such as JSON's "\ud83d" without its other half: it is no
    Unicode, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half of a character, {shown(text[error.start])}, at {error.start}") from None


def _list(bad: list[BadRow]) -> str:
    lines = [f"  {row}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(lines)
