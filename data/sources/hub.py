"""The tasks from Hugging Face `datasets`: from the hub, or from data sets saved to disk beforehand.

Columns and splits may carry the task's own names or the hub's. The library is optional and slow to import, so it is
imported on use, and nothing but an explicit `hub` source reaches for the network.
"""

from collections.abc import Container, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from minbert.data.errors import DataError, UserError
from minbert.data.sources.examples import SOURCES, BadRows, Examples, Row, collect
from minbert.data.task import HubDataset, Split, Task

if TYPE_CHECKING:
    from datasets import Dataset

_ID_COLUMNS = ("id", "idx")


def read_hub(task: Task, split: Split, directory: Path | None = None, bad_rows: BadRows = "refuse") -> Examples:
    """Read one split of `task` from the hub, or from `directory`/<task name> as `DatasetDict.save_to_disk` left it.

    Ids are the column `id` or `idx`, else row numbers. A test split labelled -1 throughout is unlabelled. Raises
    UserError if `datasets` is not installed; DataError for a data set that cannot be had or lacks a split or a column,
    and for bad rows as `collect` does.
    """
    hub = task.hub
    assert hub is not None, task.name
    library = _import_datasets()
    name, dataset = (
        _from_hub(library, task, hub, split) if directory is None else _from_disk(library, task, hub, split, directory)
    )
    return collect(task, split, name, _rows(name, dataset, task, hub, split), bad_rows)


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError("this source needs the library `datasets`: pip install 'minbert[hub]'") from None
    return datasets


def _from_hub(library: ModuleType, task: Task, hub: HubDataset, split: Split) -> "tuple[str, Dataset]":
    name = hub.path if hub.config is None else f"{hub.path} ({hub.config})"
    try:
        return name, library.load_dataset(hub.path, hub.config, split=hub.splits[split])
    # Being offline, a renamed data set, a refused login and a full disk surface as unrelated types of three libraries.
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"{name}, split {hub.splits[split]}, could not be had from the hub: {type(error).__name__}: {reason}. "
            f"Without a network, save it elsewhere with save_to_disk('DIR/{task.name}') and give hub:DIR. {SOURCES}"
        ) from None


def _from_disk(
    library: ModuleType, task: Task, hub: HubDataset, split: Split, directory: Path
) -> "tuple[str, Dataset]":
    folder = directory / task.name
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist; hub:DIR expects DIR/{task.name} as written by save_to_disk. {SOURCES}"
        )
    try:
        saved = library.load_from_disk(str(folder))
    except Exception as error:  # as above: any type, by what is broken
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{folder} cannot be read as a saved data set: {type(error).__name__}: {reason}") from None
    if not isinstance(saved, library.DatasetDict):
        raise DataError(f"{folder} holds one split, not a DatasetDict; save the dictionary of splits there")
    found = _name_in(saved, split, hub.splits[split])
    if found is None:
        raise DataError(f"{folder} has no split {hub.splits[split]!r}; its splits are {', '.join(saved)}")
    return str(folder), saved[found]


def _rows(name: str, dataset: "Dataset", task: Task, hub: HubDataset, split: Split) -> Iterator[Row]:
    wanted = (*task.sentences, task.label)
    found = {column: _name_in(dataset.column_names, column, hub.column(column)) for column in wanted}
    required = task.sentences if split == "test" else (*task.sentences, task.label)
    missing = [f"{column!r} (or {hub.column(column)!r})" for column in required if found[column] is None]
    if missing:
        columns = ", ".join(dataset.column_names)
        raise DataError(f"{name}, {split}: no column {', '.join(missing)}; its columns are {columns}")
    plain = dataset.with_format(None)  # a data set may have been saved in the format of arrays or tensors
    ids = next((plain[column] for column in _ID_COLUMNS if column in plain.column_names), range(len(plain)))
    sentences = zip(*(plain[found[column]] for column in task.sentences), strict=True)
    labels = [None] * len(plain) if found[task.label] is None else plain[found[task.label]]
    for row, (id_, texts, label) in enumerate(zip(ids, sentences, labels, strict=True)):
        yield Row(f"{split}:{row}", str(id_).strip().lower(), tuple((text or "").strip() for text in texts), label)


def _name_in(names: Container[str], own: str, hub: str) -> str | None:
    return own if own in names else hub if hub in names else None
