"""A task's new rows: what the paper makes of a row and its back translations, with where each came from, in a file.

Of a pair (s1, s2) come (s1', s2), (s1, s2') and (s1', s2') for every variant, of a single sentence s' alone. The file
has the task's columns, so that it is read like any other file of the task, and those of `ORIGIN` beside them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minbert.data.augmentation.filters import plain
from minbert.data.files import replacing
from minbert.data.sources.examples import Examples
from minbert.data.task import Task, named

# source: id of the row that it was made of; source_digest: of that row's sentences and label; replaced: columns that
# are back translations; pivot, model (with its digest), variant: of which.
ORIGIN = ("task", "source", "source_digest", "replaced", "pivot", "model", "variant")


class Variant(NamedTuple):
    """A back translation that was kept."""

    text: str
    pivot: str
    model: str
    variant: int


@dataclass(frozen=True)
class NewRow:
    id: str
    sentences: tuple[str, ...]
    label: Any  # as a file has it
    origin: tuple[str, ...]  # as `ORIGIN` says


def new_rows(examples: Examples, variants: Mapping[str, Sequence[Variant]]) -> tuple[list[NewRow], list[NewRow]]:
    """The new rows in the order of `examples`, and those that were dropped because their two sentences had become the
    same, which says more than their label. `variants`: of each text; both sides of a pair are replaced by variants of
    one pivot, model and number."""
    kept: list[NewRow] = []
    equal: list[NewRow] = []
    task = examples.task
    assert examples.labels is not None, task.name
    for index, identifier in enumerate(examples.ids):
        texts = tuple(column[index] for column in examples.sentences)
        digest, label = row_digest(texts, examples.labels[index]), _written(task, examples.labels[index])
        ways: dict[tuple[str, str, int], dict[int, str]] = {}
        for side, text in enumerate(texts):
            for new, *way in variants.get(text, ()):
                ways.setdefault(tuple(way), {})[side] = new  # type: ignore[arg-type]
        for (pivot, model, variant), sides in ways.items():
            for replaced in _subsets(sorted(sides)):
                sentences = tuple(sides[side] if side in replaced else text for side, text in enumerate(texts))
                name = f"{identifier}~{pivot}{variant}-{''.join(str(side + 1) for side in replaced)}"
                columns = "+".join(task.sentences[side] for side in replaced)
                origin = (task.name, identifier, digest, columns, pivot, model, str(variant))
                became_equal = len(sentences) == 2 and plain(sentences[0]) == plain(sentences[1])
                was_equal = became_equal and plain(texts[0]) == plain(texts[1])
                (equal if became_equal and not was_equal else kept).append(NewRow(name, sentences, label, origin))
    return kept, equal


def _subsets(sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Each side alone, then both."""
    return [(side,) for side in sides] + ([tuple(sides)] if len(sides) > 1 else [])


def row_digest(sentences: Sequence[str], label: np.ndarray | np.float32) -> str:
    """By which a row is known again."""
    content = json.dumps([list(sentences), np.asarray(label, np.float32).reshape(-1).tolist()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _written(task: Task, label: Any) -> str | int | float:
    if task.kind == "multilabel":
        return named(task, label)
    return float(str(label)) if task.kind == "regression" else int(label)


def write_rows(path: Path, task: Task, rows: Sequence[NewRow]) -> None:
    """The rows as tsv, csv, jsonl or parquet by the file's suffix, whole or not at all. Raises OSError."""
    columns = (task.id, *task.sentences, task.label, *ORIGIN)
    records = [dict(zip(columns, (row.id, *row.sentences, row.label, *row.origin), strict=True)) for row in rows]
    kind = path.suffix.lower()
    with replacing(path) as temporary:
        if kind == ".parquet":
            import pyarrow
            import pyarrow.parquet

            content = {name: [record[name] for record in records] for name in columns}
            pyarrow.parquet.write_table(pyarrow.table(content), temporary)
        elif kind == ".jsonl":
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        else:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
