"""What a model says: scores of whole splits, prediction files, one's own sentences and tables, and a stop meanwhile."""

import csv
import hashlib
import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
from known_tasks import TASKS
from rich.console import Console
from safetensors import safe_open
from scipy.stats import pearsonr
from small_runs import minbert

from minbert.data.sources.loading import load_examples
from minbert.launch.results import predict_splits, whole_splits
from minbert.launch.worker import work
from minbert.trainer.evaluation.prediction_files import prediction_file_name
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder


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
