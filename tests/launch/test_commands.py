"""The commands as a user meets them: options and files, what a model says of one's own data, disks that are full.

They are called in this process; where the process itself is the point (exit codes, pipes, terminals), they are started.
"""

import csv
import hashlib
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from known_tasks import TASKS
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import pearsonr
from small_runs import COMMAND, CORPUS

from minbert.data.errors import disk_trouble
from minbert.data.files import replacing
from minbert.data.sources.loading import load_examples
from minbert.data.task import SPLITS
from minbert.launch.main import main
from minbert.launch.options import parse_run_config
from minbert.launch.results import predict_splits, whole_splits
from minbert.launch.worker import work
from minbert.trainer.evaluation.prediction_files import prediction_file_name
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run import data
from minbert.trainer.run.folder import RunFolder


def minbert(*arguments: object) -> int:
    """The exit code of a command called here."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit:  # tyro ends the program itself
        return exit.code


# Scores and predictions


def test_evaluate_agrees_with_the_score_that_the_model_was_saved_with(trained, capsys):
    with safe_open(trained.best_model, framework="pt") as file:
        saved = json.loads(file.metadata()["scores"])
    assert minbert("evaluate", trained.path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() - saved.keys() == {"sst/mean_absolute_error", "sst/quadratic_kappa"}  # its classes are ordered
    assert {name: found[name] for name in saved} == pytest.approx(saved, abs=1e-6)
    logged = [record for record in trained.read_metrics() if "dev/overall" in record]
    assert logged[-1]["dev/overall"] == saved["overall"]


def test_evaluate_shows_a_table_of_other_splits(trained, capsys):
    assert minbert("evaluate", trained.path, "--split", "train") == 0
    table = capsys.readouterr().out
    assert "best model, train" in " ".join(table.split()) and all(TASKS[name].title in table for name in ("sst", "sts"))


def test_evaluate_reads_other_data(trained, course_folder, capsys):
    assert minbert("evaluate", trained.path, "--data", course_folder, "--json") == 2
    assert "quora-dev.csv does not exist" in capsys.readouterr().err


@pytest.fixture
def course_folder(tmp_path) -> Path:
    """A folder of the course's files that holds sentiment only."""
    folder = tmp_path / "course"
    folder.mkdir()
    rows = [f"{n}\tid{n}\ta film of sort {n % 7}\t{n % 5}" for n in range(40)]
    for split in ("train", "dev"):
        (folder / f"ids-sst-{split}.csv").write_text("\n".join(["\tid\tsentence\tsentiment", *rows]) + "\n")
    (folder / "ids-sst-test-student.csv").write_text("\tid\tsentence\n0\tZ9\tsome words\n1\ta1\tother words\n")
    return folder


@pytest.mark.parametrize("name", ["sst", "quora", "sts"])
def test_prediction_files_hold_what_was_scored(trained, capsys, name):
    assert minbert("evaluate", trained.path, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    task, examples = TASKS[name], load_examples("builtin", TASKS[name], "dev")
    text = (trained.predictions / prediction_file_name(trained.read_config(), task, "dev")).read_bytes().decode()
    lines = text.split("\n")
    values = [line.split(" , ")[1][:-1] for line in lines[1:-1]]
    header = {"sst": "Predicted_Sentiment", "quora": "Predicted_Is_Paraphrase", "sts": "Predicted_Similiary"}[name]
    rows = (f"{identifier} , {value} \n" for identifier, value in zip(examples.ids, values, strict=True))
    assert text == f"id \t {header} \n" + "".join(rows)
    predicted = np.array([float(value) for value in values])
    score = pearsonr(predicted, examples.labels)[0] if name == "sts" else (predicted == examples.labels).mean()
    assert score == pytest.approx(scores[name], abs=1e-4)
    shape = {"sst": str.isdecimal, "quora": ("0.0", "1.0").__contains__, "sts": lambda value: "." in value}[name]
    assert all(map(shape, values))


def test_predict_writes_the_same_files_again(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.predictions.glob("*.csv")}
    assert len(before) == 6
    for path in trained.predictions.iterdir():
        path.unlink()
    assert minbert("predict", trained.path) == 0
    assert {path.name: path.read_bytes() for path in trained.predictions.glob("*.csv")} == before
    record = json.loads((trained.predictions / "predictions.json").read_text())
    assert record.keys() == before.keys()
    told = record["para-test-output.csv"]
    assert told["model_sha256"] == hashlib.sha256(trained.best_model.read_bytes()).hexdigest() and told["step"] == 6
    assert (told["data"], told["task"], told["split"]) == ("builtin", "quora", "test")
    assert told["rows"] == len(before["para-test-output.csv"].splitlines()) - 1


def test_one_sentence_classifier_writes_the_first_parts_files_in_the_files_order(tmp_path, course_folder):
    run = tmp_path / "run"
    arguments = ["--data", course_folder, "--tasks", "sst", "--steps", 1, "--batch-size", 4]
    assert minbert("train", "--run", run, *arguments) == 0
    assert {path.name for path in (run / "predictions").glob("*.csv")} == {
        f"finetune-sst-{s}-out.csv" for s in ("dev", "test")
    }
    lines = (run / "predictions" / "finetune-sst-test-out.csv").read_text().splitlines()
    assert [line.split(" , ")[0] for line in lines[1:]] == ["z9", "a1"]
    assert RunFolder(run).read_config().corpus.data == str(course_folder)
    before = (run / "predictions" / "finetune-sst-test-out.csv").read_bytes()
    other = tmp_path / "other" / "there"
    assert minbert("predict", run, "--data", "builtin") == 2 and not other.parent.exists()
    assert minbert("predict", run, "--data", "builtin", "--out", run / "encoder" / ".." / "predictions") == 2
    assert minbert("predict", run, "--data", "builtin", "--out", other, "--splits", "test") == 0
    assert (run / "predictions" / "finetune-sst-test-out.csv").read_bytes() == before
    assert {path.name for path in other.iterdir()} == {"finetune-sst-test-out.csv", "predictions.json"}
    assert json.loads((other / "predictions.json").read_text())["finetune-sst-test-out.csv"]["data"] == "builtin"
    assert minbert("predict", run, "--data", f"{course_folder}/") == 0  # the run's own


def test_text_needs_no_task_where_there_is_one(tmp_path, course_folder, capsys):
    arguments = ["--data", course_folder, "--tasks", "sst", "--steps", 1, "--batch-size", 4]
    minbert("train", "--run", tmp_path / "run", *arguments)
    capsys.readouterr()
    assert minbert("predict", tmp_path / "run", "--text", "words never seen: \u2603") == 0
    assert capsys.readouterr().out.strip() in {"0", "1", "2", "3", "4"}


PAIRS = [
    ("a man, singing", "a man sings"),
    ('he said "no"', "he refused"),
    ("one\u2028line\x0b", "spaces\tand\ntwo lines"),
]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv_keeps_rows_and_adds_a_column(trained, tmp_path, monkeypatch, capsys, delimiter):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("sentence2", "nr", "sentence1"), *((b, n, a) for n, (a, b) in enumerate(PAIRS))])
    assert minbert("predict", trained.path, "--task", "sts", "--csv", source, "--out", out) == 0
    assert f"3 predictions: {out}" in capsys.readouterr().out
    with out.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter=delimiter)
    assert header == ["sentence2", "nr", "sentence1", "prediction"]
    assert [(row[2], row[0]) for row in rows] == PAIRS
    assert minbert("predict", trained.path, "--task", "sts", "--text", *PAIRS[0]) == 0
    assert capsys.readouterr().out.strip() == rows[0][3]
    assert minbert("predict", trained.path, "--task", "sts", "--csv", source) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")
    told = json.loads((tmp_path / "out.csv.json").read_text())["out.csv"]
    assert (told["data"], told["task"], told["rows"], told["step"]) == (str(source), "sts", 3, 6)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    assert minbert("predict", trained.path, "--task", "sts", "--csv", "-", "--out", "-") == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")


def test_sentences_come_from_standard_input(trained, monkeypatch, capsys):
    def given(text: str, task: str) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return minbert("predict", trained.path, "--task", task, "--text", "-")

    assert given("a man sings\ta woman sings\nit rains\tthe sun shines\n", "sts") == 0
    together = capsys.readouterr().out.splitlines()
    assert minbert("predict", trained.path, "--task", "sts", "--text", "it rains", "the sun shines") == 0
    assert len(together) == 2 and capsys.readouterr().out.strip() == together[1]
    assert given("fine\nbad\n", "sst") == 0 and len(capsys.readouterr().out.splitlines()) == 2
    assert given("a\tb\nc\n", "sts") == 2
    assert "standard input:2: task sts takes 2 sentences, with a tab between" in capsys.readouterr().err
    assert given("", "sst") == 2 and "standard input is empty" in capsys.readouterr().err


# Disks and files

WRITERS = [
    ("train --run {there}/run", "run/"),
    ("predict {run} --out {there}/new", "new/sst-dev-output.csv"),
    ("predict {run} --task sst --csv {run}/fine.csv --out {there}/x.csv", "x.csv"),
    ("export {run} {there}/new", "new/model.safetensors"),
    ("report {run} --out {there}/x.html", "x.html"),
    ("checkpoint convert {run} {there}/x.safetensors", "x.safetensors"),
]


@pytest.fixture
def copied(trained) -> Iterator[Path]:
    """The run, and a folder `there`, where any user may read."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        shutil.copytree(trained.path, place / "run")
        (place / "run" / "fine.csv").write_text("sentence\n" + 20 * "fine\n")
        (place / "there").mkdir()
        yield place


@contextmanager
def no_room() -> Iterator[None]:
    """No file may grow beyond 64 bytes, which the system reports as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("command", "file"), WRITERS, ids=[command.split()[0] + file for command, file in WRITERS])
def test_a_full_disk_is_told_with_the_file(copied, capsys, command, file):
    there = copied / "there"
    with no_room():
        code = minbert(*command.format(run=copied / "run", there=there).split())
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and "Make room" in said.err
    told = r"\S* could not be written: File too large \(the disk at /"
    assert re.search(re.escape(f"{there}/{file}") + told, said.err)


def test_errors_of_other_languages_about_a_full_disk_are_understood(tmp_path):
    with no_room(), pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(9)}, tmp_path / "a")
    assert "File too large" in str(disk_trouble(caught.value))
    assert disk_trouble(ValueError("no space")) is None


def test_folders_that_may_not_be_read_or_written_are_named(copied, capsys):
    there, run, closed = copied / "there", copied / "run", copied / "closed"
    closed.mkdir()
    readers = ["evaluate {closed}/x", "resume {closed}/x", "checkpoint list {closed}/x", "report {closed}/x"]
    readers += ["predict {run} --task sst --csv {closed}/x.csv", "train --config {closed}/x.yaml"]
    there.chmod(0o555)
    closed.chmod(0)
    user = os.getuid()
    if user == 0:
        os.setresuid(65534, 65534, 0)  # root may do anything
    try:
        for command in [*readers, *(command for command, _ in WRITERS)]:
            assert minbert(*command.format(run=run, there=there, closed=closed).split()) == 2, command
            said = capsys.readouterr()
            assert str(closed if command in readers else there) in said.err, command
            assert re.search("Permission denied|may not be written to|not writable", said.err), command
            assert said.out == "", command
    finally:
        if user == 0:
            os.setresuid(0, 0, 0)
        closed.chmod(0o755)
        there.chmod(0o755)
    assert list(there.iterdir()) == []


def test_a_bad_row_is_named_by_file_and_line_or_skipped(tmp_path, course_folder, capsys):
    with (course_folder / "ids-sst-train.csv").open("a") as file:
        file.write("40\tid40\tgreat\t7\n41\tid41\tshort\n")
    arguments = ["--data", course_folder, "--tasks", "sst", "--run", tmp_path / "run", "--steps", 1, "--batch-size", 4]
    assert minbert("train", *arguments) == 2
    said = capsys.readouterr().err
    assert "ids-sst-train.csv:42: label 7 is outside 0..4" in said and "ids-sst-train.csv:43: 3 fields" in said
    assert minbert("train", *arguments, "--bad-rows", "skip") == 0


def test_the_process_ends_with_the_code_and_without_a_traceback(tmp_path):
    done = subprocess.run([*COMMAND, "train", "--lr", "fast"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minbert: --lr must be a valid number, not 'fast'\n"
    assert not list(tmp_path.iterdir())


def test_help_may_be_cut_short():
    command = f"{sys.executable} -m minbert.launch.main train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: minbert train") and done.stderr == ""


def test_help_names_every_option_and_no_python(monkeypatch, capsys):
    from minbert.trainer.config import OPTIONS

    monkeypatch.setenv("COLUMNS", "100")
    assert minbert("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in shown for name in (*OPTIONS, "config"))
    assert "None" not in shown
    assert minbert("--help") == 0 and minbert() == 2


# Options


def test_the_later_source_of_an_option_wins(trained, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: 5\nlr: 1e-2\nbatch: {{batch_size: 7, accumulation: 2}}\nrun: {trained.path}\n")
    config = parse_run_config(["--config", str(file), "--batch-size", "9", "--lr=0.5"])
    assert (config.seed, config.optimizer.lr, config.run) == (5, 0.5, trained.path)
    assert (config.batch.batch_size, config.batch.accumulation) == (9, 2)
    assert config.budget.steps == 6  # of the run's own folder, which the file names
    assert config.heads.hidden_layers == 1  # the default
    assert parse_run_config(["--run", str(trained.path), "--lr", "None"]).optimizer.lr is None


def test_an_option_may_mend_what_a_file_leaves_inconsistent(tmp_path):
    (tmp_path / "c.yaml").write_text("extend_to: 9\nepochs: 3\n")
    assert parse_run_config(["--config", str(tmp_path / "c.yaml"), "--lr-schedule", "constant"]).budget.extend_to == 9


# What else is seen of a run


def test_a_finished_run_that_is_asked_to_stop_leaves_its_predictions_for_later(copied, capsys, monkeypatch):
    run = RunFolder(copied / "run")
    shutil.rmtree(run.predictions)

    def interrupted(run: RunFolder) -> bool:
        os.kill(os.getpid(), signal.SIGINT)  # when training is over
        return False

    with StopRequest() as stop, monkeypatch.context() as patch:
        patch.setattr("minbert.launch.results.is_reported", interrupted)
        assert work(run, stop=stop) == 0
    said = capsys.readouterr().out
    assert "the run is finished" in said and f"minbert predict {run.path}" in said and "evaluate" in said
    assert not run.predictions.exists()
    assert minbert("train", "--run", run.path) == 0  # the same command makes up for it
    assert len(list(run.predictions.glob("*.csv"))) == 6


def test_predictions_hear_a_stop_between_two_batches_and_show_how_far_they_are(trained, tmp_path, monkeypatch):
    config, asked = whole_splits(trained.read_config()), []

    def predict(name: str, most: int, terminal: bool) -> tuple[object, str]:
        asked.clear()
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        stopped = lambda: asked.append(1) or len(asked) > most  # noqa: E731
        found = predict_splits([trained], config, ("dev", "test"), tmp_path / name, console, stopped)
        return found, console.file.getvalue()

    monkeypatch.setattr("minbert.trainer.run.progress.QUIET", 0.0)
    found, shown = predict("whole", 10**9, terminal=False)
    batches = len(asked) - 1  # once before all
    assert found["dev"].keys() >= {"sst", "quora", "sts", "overall"} and found["test"] == {}
    assert len(shown.splitlines()) == batches and "predicting sts test: 9" in shown
    found, shown = predict("part", batches - 1, terminal=True)
    assert found is None and len(asked) == batches
    assert "predicting" in shown and "━" in shown
    assert {path.name for path in (tmp_path / "whole").iterdir()} > {
        path.name for path in (tmp_path / "part").iterdir()
    }
    monkeypatch.setattr("minbert.trainer.run.progress.QUIET", 30.0)
    assert predict("quiet", 10**9, terminal=False)[1] == ""


def test_a_start_reads_each_split_once(tmp_path, monkeypatch):
    """For the vocabulary, the tokens, the training and the scores."""
    asked, read = [], data.load_examples
    monkeypatch.setattr(data, "load_examples", lambda *found: asked.append((found[1].name, found[2])) or read(*found))
    options = ["--data", CORPUS, "--train-limit", "40", "--batch-size", "8", "--steps", "2", "--trackers"]
    assert minbert("train", "--run", tmp_path / "run", *options) == 0
    assert sorted(asked) == sorted((task, split) for task in ("sst", "quora", "sts") for split in SPLITS)
    asked.clear()
    with data.reading_once() as kept:
        config = RunFolder(tmp_path / "run").read_config()
        splits = [data.load_splits(config, RunFolder(tmp_path / "run"), "train") for _ in range(2)]
        assert len(asked) == len(kept) == 3 and all(splits[0][name] is splits[1][name] for name in splits[0])


def test_the_terminal_shows_progress_and_no_chatter(tmp_path):
    """DeepSpeed and its friends speak to the log only, on every rank."""
    run = tmp_path / "run"
    size = ["--data", CORPUS, "--train-limit", "40", "--eval-limit", "20", "--batch-size", "8", "--steps", "3"]
    parallel = ["--zero-stage", "2", "--processes", "2"]
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, "train", "--run", run, *size, *parallel], stdout=slave, stderr=subprocess.PIPE, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end was closed
            break
    errors = process.stderr.read().decode()
    assert process.wait() == 0, errors
    assert [line for line in errors.splitlines() if "processes share" not in line] == []
    text = shown.decode()
    assert "3/3" in text and "(best so far)" in text and "overall" in text and "Best model, dev" in text
    assert "DeepSpeed" not in text and "Warning" not in text
    assert all((run / "logs" / f"rank-{rank}.log").stat().st_size for rank in (0, 1))


def test_replacing_leaves_the_old_file_after_an_error(tmp_path):
    target = tmp_path / "file"
    with replacing(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]
