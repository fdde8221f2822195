"""Tasks as declarations: what a wrong one is told, rows of one's own in every format, metrics against libraries, and
a fourth task all the way from its files to predictions and a search."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from known_tasks import SST, STS, TASKS
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from small_runs import CORPUS, minbert, outside

from minbert.data.errors import DataError, UserError
from minbert.data.sources.examples import parse_label
from minbert.data.sources.loading import load_examples
from minbert.data.task import Task, resolve_task
from minbert.launch.main import main
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.prediction_files import written
from minbert.trainer.evaluation.scoring import overall, score
from minbert.trainer.objectives.supervised import example_losses, predictions

MOOD = {
    "name": "mood",
    "kind": "classification",
    "sentences": ["text"],
    "label": "verdict",
    "classes": ["bad", "neutral", "good"],
    "metric": "f1",
    "files": {"train": "train.csv", "dev": "dev.csv", "test": "test.csv"},
}
TOPICS = {"name": "topics", "kind": "multilabel", "sentences": ["text"], "label": "tags", "classes": ["a", "b", "c"]}


def declare(folder: Path, **changes) -> Path:
    content = {key: value for key, value in (MOOD | changes).items() if value is not None}
    path = folder / f"{content.get('name', 'mood')}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_declarations_of_the_program_survive_a_dump():
    for task in TASKS.values():
        assert Task.model_validate(json.loads(task.model_dump_json())) == task
    assert [task.name for task in TASKS.values() if task.symmetric] == ["quora", "sts"]
    assert (SST.outputs, STS.outputs, STS.label_range, SST.label_range) == (5, 1, (0, 5), (0, 4))


def test_a_pair_is_symmetric_unless_its_declaration_says_otherwise(tmp_path):
    pair = {"sentences": ["text", "hypothesis"]}
    assert resolve_task(str(declare(tmp_path, **pair))).symmetric
    assert not resolve_task(str(declare(tmp_path, symmetric=False, **pair))).symmetric
    assert not resolve_task(str(declare(tmp_path))).symmetric


WRONG = {
    "kind": ("klassification", r"kind: input should be 'classification'.*not 'klassification'"),
    "name": ("My Task", r"name: lower-case letters.*not 'My Task'"),
    "classes": (["one"], r"classes: .*at least 2"),
    "metric": ("pearson", r"metric: a classification task takes accuracy or f1 or matthews, not pearson"),
    "loss": ("squared_error", r"loss: a classification task takes cross_entropy"),
    "label": (None, r"label: field required"),
    "range": ([0, 5], r"range: only a regression has one"),
    "weight": (-1, r"weight: input should be greater than or equal to 0, not -1"),
    "sentences": (["a", "b", "c"], r"sentences: .*at most 2"),
    "metrik": ("f1", r"unknown key 'metrik'; did you mean 'metric'\?"),
    "files": ({"train": "a.csv", "dev": "b.xls"}, r"files\.dev: .*b\.xls must end in \.csv, \.tsv, \.jsonl, \.parquet"),
    "symmetric": (True, r"symmetric: only a pair of sentences has an order"),
    "predictions": ({"values": "float"}, r"predictions\.values: a classification task takes name or index, not float"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in WRONG.items()])
def test_a_wrong_declaration_names_file_and_key(tmp_path, key, value, message):
    path = declare(tmp_path, **{key: value})
    with pytest.raises(UserError, match=message) as error:
        resolve_task(str(path))
    assert str(error.value).startswith(f"{path}: ")


def test_names_are_looked_up_in_a_folder_and_an_unknown_one_is_told_the_nearest(tmp_path):
    declare(tmp_path)
    config = RunConfig(corpus={"task_folder": tmp_path, "tasks": ["sst", "mood"]})
    assert config.corpus.names == ("sst", "mood") and config.corpus.task("mood").files.train == tmp_path / "train.csv"
    again = RunConfig(**json.loads(config.model_dump_json()))  # the declaration goes with the run
    (tmp_path / "mood.yaml").unlink()
    assert again == config
    with pytest.raises(ValueError, match=r"there is no task 'quara'; did you mean 'quora'\?"):
        RunConfig(corpus={"tasks": ["quara"]})
    with pytest.raises(ValueError, match="names a task twice: sst, sst"):
        RunConfig(corpus={"tasks": ["sst", "sst"]})


def test_a_name_that_modules_have_already_is_refused(tmp_path, capsys):
    assert main(["train", "--run", str(tmp_path / "run"), "--tasks", str(declare(tmp_path, name="train"))]) == 2
    assert "a task cannot be called 'train'" in capsys.readouterr().err and not (tmp_path / "run").exists()


ROWS = [{"id": "a", "text": "fine film", "verdict": "good"}, {"id": "b", "text": 'so, "so"', "verdict": 1}]


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = {key: [str(row[key]) for row in rows] for key in rows[0]}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_ones_own_are_read(tmp_path, kind):
    files = {split: f"{split}.{kind}" for split in ("train", "dev", "test")}
    task = resolve_task(str(declare(tmp_path, files=files)))
    write_rows(tmp_path / files["train"], ROWS)
    write_rows(tmp_path / files["test"], [{"text": row["text"]} for row in ROWS])
    train = load_examples("builtin", task, "train")
    assert train.ids == ["a", "b"] and train.sentences == (["fine film", 'so, "so"'],)
    assert train.labels.tolist() == [2, 1]
    test = load_examples("builtin", task, "test")
    assert test.ids == ["0", "1"] and test.labels is None
    with pytest.raises(DataError, match=rf"dev\.{kind} does not exist; it is files\.dev of task mood"):
        load_examples("builtin", task, "dev")
    write_rows(tmp_path / files["dev"], [*ROWS, {"id": "c", "text": "x", "verdict": "goood"}])
    with pytest.raises(DataError, match=rf"dev\.{kind}:\d: label 'goood' is not a number and no class \(bad, neu"):
        load_examples("builtin", task, "dev")


@pytest.mark.parametrize(
    ("classes", "raw", "label"),
    [
        (["1", "2", "5"], 5.0, 2),  # a whole column of a table is of floats where one is missing
        (["1", "2", "5"], "5", 2),
        (["1", "2", "5"], 0, "label 0 is no class (1, 2, 5)"),
        (["1", "2", "5"], "x", "label 'x' is not a number and no class (1, 2, 5)"),
        (["bad", "fair", "good"], 2.0, 2),
        (["true", "false"], True, 0),
        (["False", "True"], True, 1),
        (["true", "unknown"], False, "label False is no class (true, unknown)"),
        (["no", "yes"], True, 1),
    ],
)
def test_a_label_that_names_a_class_is_not_taken_for_its_number(classes, raw, label):
    task = Task.model_validate(MOOD | {"classes": classes})
    if isinstance(label, int):
        assert parse_label(task, raw) == label
        return
    with pytest.raises(ValueError) as error:
        parse_label(task, raw)
    assert str(error.value) == label


def test_broken_files_of_ones_own_are_located(tmp_path):
    task = resolve_task(str(declare(tmp_path, files={"train": "t.jsonl", "dev": "d.parquet"})))
    (tmp_path / "t.jsonl").write_text(
        '{"text": "x", "verdict": 0}\n{"text": 7, "verdict": 0}\n[1]\n{broken\n{"text": "\\ud83d", "verdict": 0}\n'
    )
    with pytest.raises(DataError) as error:
        load_examples("builtin", task, "train")
    for line in (
        r"t.jsonl:2: no text in text",
        "t.jsonl:3: no JSON object",
        "t.jsonl:4: no JSON: Expecting",
        "t.jsonl:5: text has half",
    ):
        assert line in str(error.value)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read as parquet"):
        load_examples("builtin", task, "dev")
    with pytest.raises(DataError, match=r"names no file for test: files\.test"):
        load_examples("builtin", task, "test")


def test_long_documents_missing_ids_and_repeated_columns(tmp_path):
    task = resolve_task(str(declare(tmp_path, files={"train": "t.csv", "dev": "d.jsonl"})))
    (tmp_path / "t.csv").write_text(f"text,verdict\n{'long ' * 30000},good\n")
    assert len(load_examples("builtin", task, "train").sentences[0][0]) == 149999
    (tmp_path / "d.jsonl").write_text(
        '{"id": null, "text": "x", "verdict": 0}\n{"id": "b", "text": "y", "verdict": 0}\n'
    )
    assert load_examples("builtin", task, "dev").ids == ["0", "b"]
    (tmp_path / "t.csv").write_text("text,verdict,text\nx,good,y\n")
    with pytest.raises(DataError, match=r"t\.csv:1: two columns are called 'text'; which is meant\?"):
        load_examples("builtin", task, "train")


def test_several_labels_from_names_or_lists(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"text": "x", "tags": ["a", "c"]}\n{"text": "y", "tags": "b"}\n{"text": "z", "tags": ""}\n'
    )
    task = Task.model_validate(TOPICS | {"files": {"train": tmp_path / "t.jsonl", "dev": tmp_path / "t.jsonl"}})
    labels = load_examples("builtin", task, "train").labels
    assert labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    raw = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0], [0.1, 0.1, -0.1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(raw, torch.from_numpy(labels), reduction="none")
    assert torch.equal(example_losses(task, raw, torch.from_numpy(labels)), expected.mean(1))
    answers = predictions(task, raw)
    assert [written(task, row) for row in answers.tolist()] == ["a,c", "", "a,b"]
    assert score(task, answers, labels) == f1_score(labels, answers.numpy(), average="macro", zero_division=0)
    exact = Task.model_validate(TOPICS | {"metric": "accuracy"})
    assert score(exact, answers, labels) == pytest.approx(1 / 3)


def test_metrics_are_those_of_the_libraries():
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 3, 200), random.integers(0, 3, 200)
    declared = {"name": "t", "sentences": ["x"], "label": "y"}
    many = declared | {"kind": "classification", "classes": ["a", "b", "c"]}
    two = declared | {"kind": "binary"}
    for raw, labels, guesses, metric, expected in (
        (many, truth, guess, "f1", f1_score(truth, guess, average="macro")),
        (many, truth, guess, "matthews", matthews_corrcoef(truth, guess)),
        (two, truth % 2, guess % 2, "f1", f1_score(truth % 2, guess % 2)),
        (two, truth % 2, guess % 2, "matthews", matthews_corrcoef(truth % 2, guess % 2)),
    ):
        task = Task.model_validate(raw | {"metric": metric})
        assert score(task, torch.from_numpy(guesses).float(), labels.astype(np.float32)) == expected
    alone = Task.model_validate(declared | {"kind": "multilabel", "classes": ["a"]})
    column = torch.from_numpy(guess == 1).float()[:, None]
    assert score(alone, column, (truth == 1).astype(np.float32)[:, None]) == f1_score(truth == 1, guess == 1)
    spearman = Task.model_validate(declared | {"kind": "regression", "range": [0, 5], "metric": "spearman"})
    x, y = random.random(50).astype(np.float32), random.integers(0, 6, 50).astype(np.float32)
    assert score(spearman, torch.from_numpy(x), y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_the_overall_score_weighs_tasks_and_maps_correlations():
    heavy = SST.model_copy(update={"weight": 3.0})
    assert overall([SST, STS], {"sst": 0.5, "sts": 0.2}) == pytest.approx((0.5 + 0.6) / 2)
    assert overall([heavy, STS], {"sst": 0.5, "sts": 0.2}) == pytest.approx((3 * 0.5 + 0.6) / 4)
    assert overall([heavy, STS], {"sts": 0.2}) == pytest.approx(0.6)


@pytest.mark.parametrize(("loss", "expected"), [("squared_error", 2.25), ("absolute_error", 1.5)])
def test_a_regression_chooses_its_loss(loss, expected):
    task = Task.model_validate(
        {"name": "t", "sentences": ["x"], "label": "y", "kind": "regression", "range": [1, 3], "loss": loss}
    )
    assert predictions(task, torch.zeros(1, 1)).tolist() == [2.0]  # the middle of the range
    assert example_losses(task, torch.zeros(1, 1), torch.tensor([0.5])).item() == expected


WORDS = {"bad": "awful weak boring", "neutral": "long quiet old", "good": "lovely great charming"}


def corpus(folder: Path) -> Path:
    """A small fourth task: reviews of three moods."""
    random = np.random.default_rng(0)
    for split, count in (("train", 240), ("dev", 60), ("test", 20)):
        rows = []
        for number in range(count):
            mood = MOOD["classes"][number % 3]
            word, thing = random.choice(WORDS[mood].split()), random.choice(["plot", "cast", "ending"])
            rows.append({"text": f"the {thing} was {word} , {number}", "verdict": mood})
        write_rows(folder / f"{split}.csv", rows if split != "test" else [{"text": row["text"]} for row in rows])
    return declare(folder)


def test_the_test_split_may_be_missing_and_is_looked_at_before_a_run(tmp_path, capfd):
    corpus(tmp_path)
    train = ["train", "--run", tmp_path / "run", "--steps", 2, "--batch-size", 4, "--trackers"]
    write_rows(tmp_path / "test.csv", [{"text": ""}])
    assert minbert(*train, "--tasks", tmp_path / "mood.yaml") == 2
    assert "test.csv:2: text is empty" in capfd.readouterr().err and not (tmp_path / "run").exists()

    declare(tmp_path, files={"train": "train.csv", "dev": "dev.csv"})
    for _ in range(2):  # the second start has nothing to do
        assert minbert(*train, "--tasks", tmp_path / "mood.yaml") == 0
        assert [path.name for path in (tmp_path / "run" / "predictions").glob("*.csv")] == ["mood-dev-output.csv"]
    assert main(["predict", str(tmp_path / "run")]) == 0
    capfd.readouterr()
    for command in ("predict", "--splits", "test"), ("evaluate", "--split", "test"):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 2
        assert "the declaration of mood names no file in files.test" in capfd.readouterr().err


@pytest.mark.xdist_group("ray")
def test_a_fourth_task_from_its_files_to_predictions_and_a_search(tmp_path, capfd):
    declaration, run = corpus(tmp_path), tmp_path / "run"
    options = ["--data", CORPUS, "--batch-size", 16, "--log-every", 5, "--trackers"]
    words = ["--tasks", "sst", "sts", declaration, *options, "--steps", 60, "--eval-every", 30, "--lr", "3e-3"]
    words += ["--aggregator", "pcgrad", "--processes", 2, "--zero-stage", 2]
    assert minbert("train", "--run", run, *words) == 0
    capfd.readouterr()
    assert "cosine/sst-mood" in (run / "metrics.jsonl").read_text()
    declaration.unlink()  # the run has it

    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capfd.readouterr().out)
    assert [name for name in scores if "/" not in name] == ["sst", "sts", "mood", "overall"] and scores["mood"] > 0.9
    lines = (run / "predictions" / "mood-test-output.csv").read_text().splitlines()
    assert len(lines) == 21 and {line.split(" , ")[1].strip() for line in lines[1:]} <= set(MOOD["classes"])
    assert main(["predict", str(run), "--task", "mood", "--text", "the plot was lovely , 3"]) == 0
    assert capfd.readouterr().out.strip() == "good"
    assert main(["export", str(run), str(tmp_path / "encoder")]) == 0
    assert main(["report", str(run)]) == 0
    assert "neutral" in (run / "report.html").read_text()

    search = tmp_path / "search"
    declare(tmp_path)
    words = ["--samples", 2, "--space", "lr=0.001,0.003", "--tasks", "sst", declaration, *options, "--steps", 6]
    outside("tune", "--search", search, *words, "--evaluations", 2, "--scheduler", "none")
    trial = json.loads((search / "trials" / "trial-0001" / "trial.json").read_text())
    assert trial["status"] == "finished" and trial["score"] > 0
