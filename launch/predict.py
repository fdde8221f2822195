"""`minbert predict RUN`: the course's prediction files, a csv of one's own, or a sentence typed in."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from minbert.data.batch import TokenisedSplit
from minbert.data.errors import UserError
from minbert.data.tasks import TASKS, Task
from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import parse
from minbert.trainer.run_folder import RunFolder, replacing


@dataclass(frozen=True)
class PredictOptions:
    """Predict with the best model of a run: by default the course's files for dev and test, of every task."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    data: str | None = None
    """Other data than the run's own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    splits: tuple[Literal["dev", "test", "train"], ...] = ("dev", "test")
    """Splits to write prediction files for."""
    task: Literal["sst", "quora", "sts", "cfimdb"] | None = None
    """Task for --text or --csv; not needed if the run has only one."""
    text: tuple[str, ...] = ()
    """Predict a sentence, or for a pair task two."""
    csv: Path | None = None
    """Predict the rows of a comma- or tab-separated file whose header names the task's sentence columns."""
    out: Path | None = None
    """Where the csv with a `prediction` column goes; the default is the terminal."""


def main(arguments: list[str]) -> int:
    options = parse(PredictOptions, arguments, "predict")
    run = RunFolder.existing(options.run)
    if options.text and options.csv:
        raise UserError("give --text or --csv, not both")
    from minbert.launch.results import predict_splits, whole_splits

    if options.text:
        task = _task(run, options.task)
        if len(options.text) != len(task.sentences):
            raise UserError(f"task {task.name} takes {len(task.sentences)} sentence(s), and --text has {len(options.text)}")
        print(shown(task, _predict_texts(run, task, [[text] for text in options.text])[0]))
    elif options.csv:
        _predict_csv(run, _task(run, options.task), options.csv, options.out)
    else:
        config = whole_splits(run.read_config(), options.data)
        predict_splits(run, config, options.splits)
        print(f"Predictions: {run.predictions}")
    return ExitCode.FINISHED


def shown(task: Task, value: float) -> str:
    return str(int(value)) if task.kind != "regression" else f"{value:.3f}"


def _task(run: RunFolder, wanted: str | None) -> Task:
    trained = run.read_config().corpus.tasks
    if wanted is None and len(trained) > 1:
        raise UserError(f"say which task: --task {' | '.join(trained)}")
    name = wanted or trained[0]
    if name not in trained:
        raise UserError(f"the run was not trained on {name}, only on {', '.join(trained)}")
    return TASKS[name]


def _predict_texts(run: RunFolder, task: Task, columns: list[list[str]]) -> list[float]:
    """Predictions for n examples given as one list of n texts per sentence column."""
    from minbert.trainer.distributed import World, pick_device
    from minbert.trainer.evaluation import predict
    from minbert.trainer.saved_model import load_model

    config = run.read_config()
    world = World(0, 1, pick_device(config.parallel))
    model, tokenizer, _ = load_model(run, world.device)
    encoded = tuple(tokenizer.encode(texts, config.corpus.max_length) for texts in columns)
    split = TokenisedSplit([str(row) for row in np.arange(len(columns[0]))], encoded, None)
    return predict(model, task, split, world).tolist()


def _predict_csv(run: RunFolder, task: Task, path: Path, out: Path | None) -> None:
    """Copy the rows of `path`, with a column `prediction` added."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from None
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header else ","
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    names = reader.fieldnames or []
    if missing := [column for column in task.sentences if column not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)} for task {task.name}; it has {', '.join(names)}")
    rows = list(reader)
    if not rows:
        raise UserError(f"{path} has no rows")
    if short := [reader.line_num for row in rows if any(row[column] is None for column in task.sentences)]:
        raise UserError(f"{path} ends a row too early near line {short[0]}")
    predicted = _predict_texts(run, task, [[row[column] for row in rows] for column in task.sentences])

    def write(file) -> None:
        writer = csv.DictWriter(file, [*names, "prediction"], delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        for row, value in zip(rows, predicted, strict=True):
            writer.writerow(row | {"prediction": shown(task, value)})

    if out is None:
        write(sys.stdout)
        return
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        write(file)
    print(f"{len(rows)} predictions: {out}")
