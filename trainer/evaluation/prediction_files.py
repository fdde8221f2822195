"""The course's prediction files, to the byte as its scorer reads them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minbert.data.files import replacing
from minbert.data.task import Split, Task, named
from minbert.trainer.config import RunConfig

RECORD = "predictions.json"  # beside them: what was predicted from what, by which model


def predicted_tasks(config: RunConfig) -> list[Task]:
    """Tasks of which there are prediction files: a masked language model predicts for nobody."""
    return [task for task in config.corpus.tasks if task.kind != "masked_lm"]


def prediction_file_name(config: RunConfig, task: Task, split: Split) -> str:
    """`sst-dev-output.csv` of a multitask run; a run of one sentence classifier alone is the course's first part,
    whose files are named after what was trained: `pretrain-sst-dev-out.csv` (the head only) or `finetune-...`."""
    if config.corpus.names == (task.name,) and not task.is_pair and task.course is not None:
        mode = "pretrain" if config.encoder.freeze == "encoder" else "finetune"
        return f"{mode}-{task.name}-{split}-out.csv"
    return f"{task.predictions.stem}-{split}-output.csv"


def write_predictions(path: Path, task: Task, ids: Iterable[str], predicted: Iterable) -> None:
    """A line per example, the prediction as the task declares it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(f"id \t {task.predictions.header} \n")
        for identifier, value in zip(ids, predicted, strict=True):
            file.write(f"{identifier} , {written(task, value)} \n")


def written(task: Task, value: Any) -> str:
    """A prediction as its task declares it: a class's name or number, or a float."""
    if task.predictions.values == "float":
        return str(float(value))
    return str(int(value)) if task.predictions.values == "index" else named(task, value)
