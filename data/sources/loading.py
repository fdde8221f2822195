"""Where examples come from: the one function that the rest of the program asks for data.

A source is a short string, as it stands in a configuration or on a command line; each kind has a reader of its own. A
task whose declaration names files has its rows there, whatever the source.
"""

from pathlib import Path

from minbert.data.errors import DataError
from minbert.data.sources.builtin import builtin_examples
from minbert.data.sources.course import read_course
from minbert.data.sources.examples import SOURCES, BadRows, Examples
from minbert.data.sources.hub import read_hub
from minbert.data.sources.own import read_own
from minbert.data.task import Split, Task


def load_examples(source: str, task: Task, split: Split, bad_rows: BadRows = "refuse") -> Examples:
    """The rows of one split of a task.

    `source` is "builtin", "hub", "hub:DIR", or else a folder with the course's files. Raises DataError, whose message
    says what is missing or broken and where, or UserError if the source needs a library that is not installed.
    """
    if task.files is not None:
        return read_own(task, split, bad_rows)
    if source == "builtin":
        return builtin_examples(task, split)
    if source == "hub" or source.startswith("hub:"):
        if task.hub is None:
            raise DataError(f"the declaration of task {task.name} has no `hub`, so data={source} does not have it")
        return read_hub(task, split, None if source == "hub" else _folder(source.removeprefix("hub:")), bad_rows)
    folder = _folder(source)
    if task.course is None:
        raise DataError(f"the declaration of task {task.name} has no `course` and no `files`: where are its rows?")
    return read_course(folder, task, split, bad_rows)


def _folder(text: str) -> Path:
    if not text:
        raise DataError(f"no data folder given. {SOURCES}")
    return Path(text).expanduser()
