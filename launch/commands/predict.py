"""`minbert predict RUN...`: the course's prediction files, a csv of one's own, or a sentence typed in."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from minbert.data.errors import UserError
from minbert.data.task import Split, Task
from minbert.launch.help import open_option
from minbert.launch.options import parse
from minbert.launch.outputs import require_place, whole_or_gone, writing
from minbert.trainer.evaluation.prediction_files import written
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

COLUMN = "prediction"
STANDARD = Path("-")  # input or output


@dataclass(frozen=True)
class PredictOptions:
    """Predict with the best model of a run, or with the mean of what those of several say: by default the course's
    files for dev and test, of every task."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], open_option("RUN...")]
    """Run folders; tasks and data are those of the first. Of several, probabilities and similarities are averaged."""
    data: Annotated[str | None, open_option("STR")] = None
    """Other data than the run's own: `builtin`, a folder with the course's files, `hub`, or `hub:DIR`."""
    splits: tuple[Split, ...] = ("dev", "test")
    """Splits to write prediction files for."""
    task: Annotated[str | None, open_option("TASK")] = None
    """Task for --text or --csv; not needed if the run has only one."""
    text: Annotated[tuple[str, ...], open_option("SENTENCE [SENTENCE]")] = ()
    """Predict a sentence, or for a pair task two; `-` reads standard input, a line each, with a tab between two."""
    csv: Annotated[Path | None, open_option("FILE")] = None
    """Predict the rows of a comma- or tab-separated file whose header names the task's sentence columns; `-` reads
    standard input."""
    out: Annotated[Path | None, open_option("FILE_OR_FOLDER")] = None
    """Of --csv: the file that gets its rows with a column `prediction`; the default, `-`, is standard output. Else the
    folder for the course's files; the default, for one run and its own data, is predictions/ in the run folder."""


def main(arguments: list[str]) -> int:
    options = parse(PredictOptions, arguments, "predict")
    runs = [RunFolder.existing(path) for path in options.runs]
    if options.text and options.csv:
        raise UserError("give --text or --csv, not both")
    if options.out and options.text:
        raise UserError("--out goes with --csv or the course's files; --text prints")
    if options.data and (options.text or options.csv):
        raise UserError("--data goes with the course's files, not with --text or --csv")
    if options.task and not (options.text or options.csv):
        raise UserError("--task goes with --text or --csv; the course's files are written for every task")

    if options.text:
        _print_texts(runs, find_task(runs[0], options.task), options.text)
    elif options.csv:
        _predict_csv(runs, find_task(runs[0], options.task), options.csv, options.out or STANDARD)
    else:
        _predict_course_files(runs, options)
    return ExitCode.FINISHED


def _predict_course_files(runs: Sequence[RunFolder], options: PredictOptions) -> None:
    run, config = runs[0], runs[0].read_config()
    if len(runs) > 1 and options.out is None:
        raise UserError("say with --out FOLDER where the predictions of several runs go")
    folder, others = options.out or run.predictions, not _same_data(options.data, config.corpus.data)
    if folder == STANDARD or (not folder.is_dir() and folder.suffix in (".csv", ".tsv", ".txt")):
        raise UserError(f"--out {folder}: the course's files need a folder; a file goes with --csv")
    whole = folder.resolve()
    own = len(runs) == 1 and whole.parent == run.path.resolve()
    if whole.name == "predictions" and not own and (whole.parent / "config.yaml").exists():
        whose = "another" if len(runs) == 1 else "one"
        raise UserError(f"--out {folder}: the folder belongs to {whose} run; name another")
    if others and whole == run.predictions.resolve():
        raise UserError(
            f"{run.predictions} holds the predictions of the run's own data, {config.corpus.data}; "
            f"say with --out FOLDER where those of {options.data} go"
        )
    from minbert.launch.results import predict_splits, whole_splits

    with whole_or_gone(folder):
        predict_splits(runs, whole_splits(config, options.data), options.splits, folder, Console(stderr=True))
    print(f"Predictions: {folder}")


def _same_data(wanted: str | None, own: str) -> bool:
    return wanted is None or wanted == own or Path(wanted).expanduser().resolve() == Path(own).expanduser().resolve()


def shown(task: Task, value: float | list[float]) -> str:
    return f"{value:.3f}" if task.kind == "regression" else written(task, value)


def find_task(run: RunFolder, wanted: str | None) -> Task:
    """The task that is meant. Raises UserError if the run has no such task, or several and none is named."""
    corpus = run.read_config().corpus
    trained = corpus.names
    if wanted is None and len(trained) > 1:
        raise UserError(f"say which task: --task {' | '.join(trained)}")
    name = wanted or trained[0]
    if name not in trained:
        raise UserError(f"the run was not trained on {name}, only on {', '.join(trained)}")
    if corpus.task(name).kind == "masked_lm":
        raise UserError(
            f"{name} is a masked language model, which predicts nothing of a text; `minbert export` writes it"
        )
    return corpus.task(name)


def _print_texts(runs: Sequence[RunFolder], task: Task, words: tuple[str, ...]) -> None:
    number = f"{len(task.sentences)} sentence{'s' if task.is_pair else ''}"
    examples = [list(words)]
    if words == (str(STANDARD),):
        examples = [line.split("\t") if task.is_pair else [line] for line in _read(STANDARD).splitlines()]
        for line, example in enumerate(examples, 1):
            if len(example) != len(task.sentences):
                raise UserError(f"standard input:{line}: task {task.name} takes {number}, with a tab between two")
        if not examples:
            raise UserError("standard input is empty")
    elif len(words) != len(task.sentences):
        raise UserError(f"task {task.name} takes {number}, and --text has {len(words)}; quote each")
    for value in _predict_texts(runs, task, [list(column) for column in zip(*examples)])[0]:
        print(shown(task, value))


def _predict_texts(runs: Sequence[RunFolder], task: Task, columns: list[list[str]]) -> tuple[list, dict[str, Any]]:
    """Predictions for n examples given as one list of n texts per sentence column, and what to tell of them."""
    from minbert.launch.results import about_models, load_members
    from minbert.trainer.evaluation.averaging import mean_predictions
    from minbert.trainer.evaluation.scoring import count_batches, outputs
    from minbert.trainer.processes.world import World, pick_device
    from minbert.trainer.run.data import tokenise_texts
    from minbert.trainer.run.progress import PredictionProgress

    config = runs[0].read_config()
    world = World(0, 1, pick_device(config.parallel))
    members = load_members(runs, world)
    seen = [tokenise_texts(each.sees(config), task, columns, each.tokenizer) for each in members]
    about = {"task": task.name, "rows": len(columns[0]), "examples": seen[0].fingerprint()} | about_models(members)
    with PredictionProgress(sum(map(count_batches, seen)), Console(stderr=True)) as progress:
        ask = progress.counting(task.name, lambda: False)
        raw = [outputs(each.model, task, split, world, ask) for each, split in zip(members, seen)]
    return mean_predictions(task, [said for said in raw if said is not None]).tolist(), about


def _predict_csv(runs: Sequence[RunFolder], task: Task, path: Path, out: Path) -> None:
    """Copy the rows of `path`, with a column `prediction` added."""
    if out != STANDARD:
        require_place(out)
    header, rows, delimiter = _read_csv(path, task)
    sentences = [[row[header.index(column)] for row in rows] for column in task.sentences]
    predicted, about = _predict_texts(runs, task, sentences)

    def write(file) -> None:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*header, COLUMN])
        writer.writerows([*row, shown(task, value)] for row, value in zip(rows, predicted, strict=True))

    if out == STANDARD:
        write(sys.stdout)
        return
    from minbert.launch.results import recorded

    record, about = out.with_name(f"{out.name}.json"), {"data": str(path.absolute())} | about
    with (
        recorded(record, out.name, about),
        writing(out) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        write(file)
    print(f"{len(rows)} predictions: {out}")


def _read(path: Path) -> str:
    """The text of a file, or of standard input. Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
        return content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = len(content) - len(error.object) + error.start  # the byte order mark is not in the object
        raise UserError(f"{_name(path)} is not UTF-8 (byte {place}); convert it first, e.g. with iconv") from None


def _name(path: Path) -> str:
    return "standard input" if path == STANDARD else str(path)


def _read_csv(path: Path, task: Task) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and delimiter (a tab, if the header has one). Raises UserError naming the file and the line."""
    text, path = _read(path), _name(path)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    # newline="\n": a lone carriage return inside a quoted field is text, not the end of a line.
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    records, line = [], 1
    try:
        for record in reader:
            if record:
                records.append((line, record))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'{path}:{line}: {error}; a field with quotes in it is written as "...", each twice') from None
    header = [name.strip() for name in records[0][1]] if records else []
    if missing := [column for column in task.sentences if column not in header]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} for task {task.name}; "
            f"its first line names {', '.join(map(repr, header)) or 'none'}; rename the columns"
        )
    if twice := [column for column in task.sentences if header.count(column) > 1]:
        raise UserError(f"{path}:1: two columns are called {twice[0]}; which is meant? Rename the other")
    if COLUMN in header:
        raise UserError(f"{path} has a column {COLUMN!r} already; rename it")
    for line, record in records[1:]:
        if len(record) != len(header):
            advice = ' A field that contains the separator is written as "...".' if len(record) > len(header) else ""
            raise UserError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}.{advice}")
    if len(records) == 1:
        raise UserError(f"{path} has no rows, only a header; add some")
    return header, [record for _, record in records[1:]], delimiter
