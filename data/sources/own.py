"""A user's own files, as a task's declaration names them: csv, tsv, jsonl or parquet, one for each split."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minbert.data.errors import DataError, require_package
from minbert.data.reading import read_text
from minbert.data.sources.course import read_delimited, records
from minbert.data.sources.examples import BadRow, BadRows, Examples, Row, collect
from minbert.data.task import Split, Task


def read_own(task: Task, split: Split, bad_rows: BadRows = "refuse") -> Examples:
    """Read one split of a task whose declaration names files. Raises DataError for a missing or unreadable file, and
    for bad rows as `collect` does."""
    assert task.files is not None, task.name
    path = task.files.name(split)
    if path is None:
        raise DataError(f"the declaration of task {task.name} names no file for {split}: files.{split}")
    if not path.is_file():
        raise DataError(f"{path} does not exist; it is files.{split} of task {task.name}")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        rows: Iterable[Row | BadRow] = read_delimited(path, task, split, "," if kind == ".csv" else "\t")
    else:
        rows = _rows(path, task, split, _read_jsonl(path) if kind == ".jsonl" else _read_parquet(path))
    return collect(task, split, str(path), rows, bad_rows)


Record = tuple[str, dict[str, Any]]  # place, and value by column


def read_columns(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Every row of a file of any of the formats as (place, value by column, or what is wrong with the row). Raises
    DataError for a file that cannot be read."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv"):
        yield from _read_jsonl(path) if kind == ".jsonl" else _read_parquet(path)
        return
    lines = records(path, "," if kind == ".csv" else "\t")
    _, _, header = next(lines, (1, 1, []))
    for line, _, fields in lines:
        fits = len(fields) == len(header)
        reason = f"{len(fields)} fields where the header has {len(header)}"
        yield f"{path.name}:{line}", dict(zip(header, fields)) if fits else reason


def _rows(
    path: Path, task: Task, split: Split, records: Iterable[tuple[str, dict[str, Any] | str]]
) -> Iterator[Row | BadRow]:
    """Rows of (place, record by column, or what is wrong with it)."""
    for number, (where, record) in enumerate(records):
        if isinstance(record, str):
            yield BadRow(where, record)
            continue
        missing = [column for column in task.sentences if not isinstance(record.get(column), str)]
        if missing:
            columns = ", ".join(map(str, record))
            yield BadRow(where, f"no text in {' and '.join(missing)}; its columns are {columns}")
            continue
        identifier = record.get(task.id)
        named = str(number if identifier is None else identifier).strip()
        yield Row(where, named, tuple(record[column].strip() for column in task.sentences), record.get(task.label))


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for line, text in enumerate(read_text(path, None).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield f"{path.name}:{line}", f"no JSON: {error}"
            continue
        yield f"{path.name}:{line}", record if isinstance(record, dict) else "no JSON object"


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    require_package("pyarrow", "parquet", f"{path} is a parquet file, and reading it")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    for number, record in enumerate(table.to_pylist()):
        yield f"{path.name}:{number}", record
