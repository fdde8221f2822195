"""The course's files: tab-separated, quoted as csv, one header line, ids in the column `id`.

A file is read strictly. What makes the whole file unreadable (its encoding, its columns, an open quote) raises at once;
what makes a row unusable is left to `collect`. Every message carries the line on which the record starts.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from minbert.data.errors import DataError, shown
from minbert.data.examples import SOURCES, BadRow, BadRows, Examples, Row, collect
from minbert.data.reading import decode
from minbert.data.tasks import SPLITS, TASKS, Split, Task

MOST_NAMES = 10  # of columns in a message


def course_tasks(folder: Path) -> list[str]:
    """The tasks whose train and dev files are in `folder`. Raises DataError if there is no such folder."""
    _require_folder(folder)
    return [
        task.name
        for task in TASKS.values()
        if (folder / task.course.train).is_file() and (folder / task.course.dev).is_file()
    ]


def read_course(folder: Path, task: Task, split: Split, bad_rows: BadRows = "refuse") -> Examples:
    """Read one split from the folder of the course's files.

    Train and dev need a label column; test is unlabelled unless it has one. Ids come lower-cased, sentences stripped.
    Raises DataError for a missing folder or file, an unreadable file, and bad rows as `collect` does.
    """
    _require_folder(folder)
    path = folder / task.course.name(split)
    if not path.is_file():
        files = ", ".join(task.course.name(each) for each in SPLITS)
        raise DataError(f"{path} does not exist; the files of {task.name} are {files}. {SOURCES}")
    rows = _rows(path, task, split)
    return collect(task, split, str(path), rows, bad_rows, task.course.known_defects)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        files = ", ".join(task.course.train for task in TASKS.values())
        raise DataError(f"data folder {folder} does not exist; it would hold {files} and so on. {SOURCES}")


def _rows(path: Path, task: Task, split: Split) -> Iterator[Row | BadRow]:
    records = _records(path)
    _, _, header = next(records, (1, 1, None))
    if header is None:
        raise DataError(f"{path} is empty")
    id_at, *sentences_at, label_at = _find_columns(path, header, task, split)
    for line, last_line, record in records:
        where = f"{path.name}:{line}"
        if len(record) != len(header):
            reason = f"{len(record)} fields where the header has {len(header)}"
            if last_line > line:
                reason += f" (a quote spans lines {line} to {last_line})"
            yield BadRow(where, reason)
            continue
        sentences = tuple(record[at].strip() for at in sentences_at)
        yield Row(
            where, record[id_at].strip().lower(), sentences, None if label_at is None else record[label_at].strip()
        )


def _find_columns(path: Path, header: list[str], task: Task, split: Split) -> list[int | None]:
    """Positions of the id, the sentences and the label, the last None for a test file without labels."""
    names = [name.strip() for name in header]
    wanted = ["id", *task.sentences, task.label]
    required = wanted[:-1] if split == "test" else wanted
    missing = [name for name in required if name not in names]
    if missing:
        found = ", ".join(map(shown, names[:MOST_NAMES])) + (", ..." if len(names) > MOST_NAMES else "")
        hint = " It looks comma-separated, and must be tab-separated." if any("," in name for name in names) else ""
        raise DataError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {found}.{hint}")
    return [names.index(name) if name in names else None for name in wanted]


def _records(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, fields) of each record that is not blank; lines count from 1."""
    # newline="\n": a lone carriage return in a quoted field is text and must not count as a line.
    reader = csv.reader(io.StringIO(_read(path), newline="\n"), delimiter="\t", strict=True)
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


def _read(path: Path) -> str:
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
