"""Where examples come from: the one function that the rest of the program asks for data.

A source is a short string, as it stands in a configuration or on a command line; each kind has a reader of its own.
"""

from pathlib import Path

from minbert.data.builtin import BUILTIN_TASKS, builtin_examples
from minbert.data.course import course_tasks, read_course
from minbert.data.errors import DataError
from minbert.data.examples import SOURCES, BadRows, Examples
from minbert.data.hub import read_hub, saved_tasks
from minbert.data.tasks import TASKS, Split, Task


def load_examples(source: str, task: Task, split: Split, bad_rows: BadRows = "refuse") -> Examples:
    """The rows of one split of a task.

    `source` is "builtin", "hub", "hub:DIR", or else a folder with the course's files. Raises DataError, whose message
    says what is missing or broken and where, or UserError if the source needs a library that is not installed.
    """
    if source == "builtin":
        return builtin_examples(task, split)
    if source == "hub":
        return read_hub(task, split, None, bad_rows)
    if source.startswith("hub:"):
        return read_hub(task, split, _folder(source.removeprefix("hub:")), bad_rows)
    return read_course(_folder(source), task, split, bad_rows)


def available_tasks(source: str) -> list[str]:
    """Names of the tasks that have train and dev data in a source, in the order of `TASKS`; the hub has all of them.

    Raises DataError if the folder does not exist or holds no task at all.
    """
    if source == "builtin":
        return list(BUILTIN_TASKS)
    if source == "hub":
        return list(TASKS)
    if source.startswith("hub:"):
        folder = _folder(source.removeprefix("hub:"))
        names, expected = saved_tasks(folder), ", ".join(f"{name}/dataset_dict.json" for name in TASKS)
    else:
        folder = _folder(source)
        names = course_tasks(folder)
        expected = ", ".join(f"{task.course.train} and {task.course.dev}" for task in TASKS.values())
    if not names:
        raise DataError(f"{folder} holds the train and dev data of no task; expected are {expected}. {SOURCES}")
    return names


def _folder(text: str) -> Path:
    if not text:
        raise DataError(f"no data folder given. {SOURCES}")
    return Path(text).expanduser()
