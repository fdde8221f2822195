"""The course's prediction files, to the byte as its scorer reads them."""

from collections.abc import Iterable
from pathlib import Path

from minbert.data.files import replacing
from minbert.data.tasks import Split, Task
from minbert.trainer.config import RunConfig


def prediction_file_name(config: RunConfig, task: Task, split: Split) -> str:
    """`sst-dev-output.csv` of a multitask run; a run of one sentence classifier alone is the course's first part,
    whose files are named after what was trained: `pretrain-sst-dev-out.csv` (the head only) or `finetune-...`."""
    if config.corpus.tasks == (task.name,) and not task.is_pair:
        mode = "pretrain" if config.encoder.freeze == "encoder" else "finetune"
        return f"{mode}-{task.name}-{split}-out.csv"
    return f"{task.course.prediction_stem}-{split}-output.csv"


def write_predictions(path: Path, task: Task, ids: Iterable[str], predicted: Iterable[float]) -> None:
    """A line per example: a class as an integer, a paraphrase as 0.0 or 1.0, a similarity as a float."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(f"id \t {task.course.prediction_header} \n")
        for identifier, value in zip(ids, predicted, strict=True):
            shown = int(value) if task.kind == "classification" else float(value)
            file.write(f"{identifier} , {shown} \n")
