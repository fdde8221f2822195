"""Delimited files, quoted as csv, one header line: the course's, tab-separated, and a user's own.

A file is read strictly. What makes the whole file unreadable (its encoding, its columns, an open quote) raises at once;
what makes a row unusable is left to `collect`. Every message carries the line on which the record starts.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from minbert.data.errors import DataError, shown
from minbert.data.reading import read_text
from minbert.data.sources.examples import SOURCES, BadRow, BadRows, Examples, Row, collect
from minbert.data.task import SPLITS, Split, Task

MOST_NAMES = 10  # of columns in a message

csv.field_size_limit(1 << 30)  # characters; the module's own limit of 2 ** 17 is less than a long document


def read_course(folder: Path, task: Task, split: Split, bad_rows: BadRows = "refuse") -> Examples:
    """Read one split from the folder of the course's files.

    Train and dev need a label column; test is unlabelled unless it has one. Ids come lower-cased, sentences stripped.
    Raises DataError for a missing folder or file, an unreadable file, and bad rows as `collect` does.
    """
    course = task.course
    assert course is not None, task.name
    files = ", ".join(course.name(each) for each in SPLITS)
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; of {task.name} it would hold {files}. {SOURCES}")
    path = folder / course.name(split)
    if not path.is_file():
        raise DataError(f"{path} does not exist; the files of {task.name} are {files}. {SOURCES}")
    rows = (
        Row(row.where, row.id.lower(), row.sentences, row.label) if isinstance(row, Row) else row
        for row in read_delimited(path, task, split, "\t")
    )
    return collect(task, split, str(path), rows, bad_rows, course.known_defects)


def read_delimited(path: Path, task: Task, split: Split, delimiter: str) -> Iterator[Row | BadRow]:
    """The rows of a file, sentences stripped; without a column of ids, the row numbers are the ids."""
    lines = records(path, delimiter)
    _, _, header = next(lines, (1, 1, None))
    if header is None:
        raise DataError(f"{path} is empty")
    id_at, sentences_at, label_at = _find_columns(path, header, task, split, delimiter)
    name = path.name
    for number, (line, last_line, record) in enumerate(lines):
        where = f"{name}:{line}"
        if len(record) != len(header):
            reason = f"{len(record)} fields where the header has {len(header)}"
            if last_line > line:
                reason += f" (a quote spans lines {line} to {last_line})"
            yield BadRow(where, reason)
            continue
        sentences = tuple(record[at].strip() for at in sentences_at)
        identifier = str(number) if id_at is None else record[id_at].strip()
        yield Row(where, identifier, sentences, None if label_at is None else record[label_at].strip())


def _find_columns(
    path: Path, header: list[str], task: Task, split: Split, delimiter: str
) -> tuple[int | None, list[int], int | None]:
    """Positions of the id, the sentences and the label; None for a label that a test file, and for ids that a user's
    file does without."""
    names = [name.strip() for name in header]
    wanted = [task.id, *task.sentences, task.label]
    required = wanted[1 if task.files else 0 : -1 if split == "test" else None]
    missing = [name for name in required if name not in names]
    if missing:
        found = ", ".join(map(shown, names[:MOST_NAMES])) + (", ..." if len(names) > MOST_NAMES else "")
        comma = delimiter == "\t" and any("," in name for name in names)
        hint = " It looks comma-separated, and must be tab-separated." if comma else ""
        raise DataError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {found}.{hint}")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise DataError(f"{path}:1: two columns are called {shown(twice[0])}; which is meant? Rename the other")
    at = {name: names.index(name) for name in wanted if name in names}
    return at.get(task.id), [at[name] for name in task.sentences], at.get(task.label)


def records(path: Path, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, fields) of each record that is not blank; lines count from 1. Raises DataError."""
    # newline="\n": a lone carriage return in a quoted field is text and must not count as a line.
    reader = csv.reader(io.StringIO(read_text(path, None), newline="\n"), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line" in str(error):
                advice = "A carriage return stands in a field without quotes, or ends the lines instead of a line feed."
            else:
                advice = (
                    "The record that starts here has a quote that is not closed, or not doubled inside a quoted field; "
                    'a field that contains " is written as "... ""so"" ...".'
                )
            raise DataError(f"{path}:{line}: {error}. {advice}") from None
        if record:
            yield line, reader.line_num, record
