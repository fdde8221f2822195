"""`minbert predict RUN`: the course's prediction files, a csv of one's own, or a sentence typed in."""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minbert.data.batch import TokenisedSplit
from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.data.task import Split, Task
from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import open_option, parse
from minbert.trainer.prediction_files import written
from minbert.trainer.run_folder import RunFolder

COLUMN = "prediction"


@dataclass(frozen=True)
class PredictOptions:
    """Predict with the best model of a run: by default the course's files for dev and test, of every task."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    data: Annotated[str | None, open_option("STR")] = None
    """Other data than the run's own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    splits: tuple[Split, ...] = ("dev", "test")
    """Splits to write prediction files for."""
    task: Annotated[str | None, open_option("TASK")] = None
    """Task for --text or --csv; not needed if the run has only one."""
    text: Annotated[tuple[str, ...], open_option("SENTENCE [SENTENCE]")] = ()
    """Predict a sentence, or for a pair task two."""
    csv: Annotated[Path | None, open_option("FILE")] = None
    """Predict the rows of a comma- or tab-separated file whose header names the task's sentence columns."""
    out: Annotated[Path | None, open_option("FILE")] = None
    """Where the csv with a `prediction` column goes; the default is the terminal."""


def main(arguments: list[str]) -> int:
    options = parse(PredictOptions, arguments, "predict")
    run = RunFolder.existing(options.run)
    if options.text and options.csv:
        raise UserError("give --text or --csv, not both")
    if options.out and not options.csv:
        raise UserError("--out goes with --csv; the course's files go to the run's folder predictions/")
    if options.task and not (options.text or options.csv):
        raise UserError("--task goes with --text or --csv; the course's files are written for every task")

    if options.text:
        task = _task(run, options.task)
        if len(options.text) != len(task.sentences):
            number = f"{len(task.sentences)} sentence{'s' if task.is_pair else ''}"
            raise UserError(f"task {task.name} takes {number}, and --text has {len(options.text)}; quote each")
        print(shown(task, _predict_texts(run, task, [[text] for text in options.text])[0]))
    elif options.csv:
        _predict_csv(run, _task(run, options.task), options.csv, options.out)
    else:
        from minbert.launch.results import predict_splits, whole_splits

        config = whole_splits(run.read_config(), options.data)
        predict_splits(run, config, options.splits)
        print(f"Predictions: {run.predictions}")
    return ExitCode.FINISHED


def shown(task: Task, value: float | list[float]) -> str:
    return f"{value:.3f}" if task.kind == "regression" else written(task, value)


def _task(run: RunFolder, wanted: str | None) -> Task:
    corpus = run.read_config().corpus
    trained = corpus.names
    if wanted is None and len(trained) > 1:
        raise UserError(f"say which task: --task {' | '.join(trained)}")
    name = wanted or trained[0]
    if name not in trained:
        raise UserError(f"the run was not trained on {name}, only on {', '.join(trained)}")
    return corpus.task(name)


def _predict_texts(run: RunFolder, task: Task, columns: list[list[str]]) -> list:
    """Predictions for n examples given as one list of n texts per sentence column."""
    from minbert.trainer.distributed import World, pick_device
    from minbert.trainer.evaluation import predict
    from minbert.trainer.saved_model import load_model

    config = run.read_config()
    world = World(0, 1, pick_device(config.parallel))
    model, tokenizer, _ = load_model(run, world.device)
    encoded = tuple(tokenizer.encode(texts, config.corpus.max_length) for texts in columns)
    split = TokenisedSplit([str(row) for row in range(len(columns[0]))], encoded, None)
    return predict(model, task, split, world).tolist()


def _predict_csv(run: RunFolder, task: Task, path: Path, out: Path | None) -> None:
    """Copy the rows of `path`, with a column `prediction` added."""
    header, rows, delimiter = _read_csv(path, task)
    sentences = [[row[header.index(column)] for row in rows] for column in task.sentences]
    predicted = _predict_texts(run, task, sentences)

    def write(file) -> None:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*header, COLUMN])
        writer.writerows([*row, shown(task, value)] for row, value in zip(rows, predicted, strict=True))

    if out is None:
        write(sys.stdout)
        return
    try:
        with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            write(file)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    print(f"{len(rows)} predictions: {out}")


def _read_csv(path: Path, task: Task) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and delimiter (a tab, if the header has one). Raises UserError naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from None
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    # newline="\n": a lone carriage return inside a quoted field is text, not the end of a line.
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter)
    records, line = [], 1
    try:
        for record in reader:
            if record:
                records.append((line, record))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: {error}") from None
    header = [name.strip() for name in records[0][1]] if records else []
    if missing := [column for column in task.sentences if column not in header]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} for task {task.name}; "
            f"its first line names {', '.join(map(repr, header)) or 'none'}"
        )
    if COLUMN in header:
        raise UserError(f"{path} has a column {COLUMN!r} already; rename it")
    for line, record in records[1:]:
        if len(record) != len(header):
            advice = ' A field that contains the separator is written as "...".' if len(record) > len(header) else ""
            raise UserError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}.{advice}")
    if len(records) == 1:
        raise UserError(f"{path} has no rows")
    return header, [record for _, record in records[1:]], delimiter
