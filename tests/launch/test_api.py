"""minbert from Python: the notebook of the documentation, as it stands, and what a run tells of itself."""

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import minbert
from minbert.launch.main import main

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> dict:
    """What the notebook's names stand for after its last cell, and `shown`: what each cell showed."""
    folder = tmp_path_factory.mktemp("notebook")
    before = Path.cwd()
    os.chdir(folder)
    names: dict = {"__name__": "notebook"}
    shown = []
    try:
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                shown.append(_run_cell("".join(cell["source"]), names))
    finally:
        os.chdir(before)
    return names | {"shown": shown, "folder": folder}


def _run_cell(source: str, names: dict):
    """The value of a cell's last line, as a notebook shows it."""
    *lines, last = ast.parse(source).body
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    exec(compile(ast.Module([last], []), "cell", "exec"), names)


@pytest.fixture
def there(notebook, monkeypatch):
    """In the notebook's folder."""
    monkeypatch.chdir(notebook["folder"])
    return notebook


def test_the_notebook_shows_what_its_text_says(there):
    _, scores, classes, similarities, curve, step, table, _ = there["shown"]
    assert scores[0].keys() == {"sst", "quora", "sts", "overall"} and 0 < scores[1] <= 40
    assert classes.shape == (2,) and set(classes) <= set(range(5))
    assert similarities.shape == (2,) and ((similarities > 0) & (similarities < 5)).all()
    assert [at for at, _ in curve] == [10, 20, 30, 40]
    assert step <= 60 and max(there["run"].curves["dev/overall"].steps) == 60
    assert table.names == ["notebook", "cls"] and table.options == {"pooling": ["mean", "cls"]}
    assert table.scores["sst"] == [there["run"].scores["sst"], there["other"].scores["sst"]]
    assert table.differences["cls"]["sst"].low <= table.differences["cls"]["sst"].high
    assert "pooling" in str(table) and "overall" in str(table)


def test_a_run_agrees_with_the_commands(there, capsys):
    run = there["run"]
    assert main(["evaluate", "runs/notebook", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert run.evaluate() == told
    assert main(["predict", "runs/notebook", "--task", "sts", "--text", "a dog runs", "a dog is running"]) == 0
    value = run.predict([("a dog runs", "a dog is running")], "sts")[0]
    assert f"{value:.3f}" == capsys.readouterr().out.strip()
    each = run.probabilities(["a good film"] * 3, "sst")
    np.testing.assert_allclose(each.sum(1), 1, rtol=1e-6)
    assert (each.argmax(1) == run.predict(["a good film"] * 3, "sst")).all()


def test_a_model_that_training_has_written_meanwhile_is_the_one_that_answers(there, tmp_path):
    run = minbert.Run(shutil.copytree("runs/notebook", tmp_path / "run"))
    before = run.probabilities(["a good film"], "sst")
    shutil.copyfile(there["other"].folder.best_model, run.folder.best_model)
    after = run.probabilities(["a good film"], "sst")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, minbert.Run(run.path).probabilities(["a good film"], "sst"))


def test_curves_are_all_that_was_logged(there):
    run = there["run"]
    total = sum(len(curve.steps) for curve in run.curves.values())
    assert total == sum(1 for record in run.records for name in record if name not in ("step", "time"))
    frame = pytest.importorskip("pandas") and run.frame()
    assert frame["dev/overall"].dropna().tolist() == run.curves["dev/overall"].values.tolist()


def test_runs_of_a_folder_are_in_the_order_they_were_made(there):
    assert [run.path.name for run in minbert.runs()] == ["notebook", "cls"]


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda run: minbert.train(learning_rate=1), "learning_rate"),
        (lambda run: minbert.train(epochs="many"), "epochs"),
        (lambda run: minbert.compare(run), "two runs or more"),
        (lambda run: minbert.Run("nowhere"), "nowhere is not a run folder"),
        (lambda run: run.resume(seed=7), "seed: 0 in the folder, 7 asked for"),
        (lambda run: run.resume(run="elsewhere"), "own folder"),
        (lambda run: run.predict(["a"]), "say which task"),
        (lambda run: run.predict(["a"], "sts"), "list of pairs"),
        (lambda run: run.predict("a film", "sst"), "list of sentences"),
        (lambda run: run.predict([], "sst"), "no text"),
        (lambda run: run.probabilities([("a", "b")], "sts"), "regression"),
        (lambda run: run.predict(["a", float("nan")], "sst"), "text 1 is nan, not a text"),
        (lambda run: run.predict([("a", None)], "sts"), "text 0 is None, not a text"),
        (lambda run: run.evaluate("test"), "no labels"),
        (lambda run: run.evaluate("development"), "there is no split 'development'; there are train, dev, test"),
    ],
)
def test_mistakes_are_told_as_by_the_commands(there, mistake, words):
    with pytest.raises(minbert.UserError, match=words):
        mistake(there["run"])


def test_a_run_that_fails_says_where_to_look(there):
    with pytest.raises(minbert.Unfinished, match=r"exit code 1.*logs") as error:
        raise minbert.Unfinished(there["run"], 1)
    assert error.value.run.path == Path("runs/notebook")


def test_other_threads_are_refused(there):
    told = []

    def elsewhere() -> None:
        try:
            minbert.train(steps=1)
        except minbert.UserError as error:
            told.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in told[0]


def test_importing_it_imports_nothing_else():
    script = (
        "import sys, minbert; assert 'train' in dir(minbert) and minbert.__version__\n"
        "assert not {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


INTERRUPTED = """
import os, signal, sys
import minbert

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
for _ in range(2):
    try:
        minbert.train(learning_rate=1e-3)
    except (KeyboardInterrupt, minbert.UserError) as error:
        print(type(error).__name__)
"""


def test_an_interrupt_while_pytorch_is_imported_leaves_it_whole():
    """Which it would not be in this process any more."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.stdout.split() == ["KeyboardInterrupt", "UserError"], done.stderr
