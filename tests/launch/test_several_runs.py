"""Prediction from several runs, and the mean of their weights: against the models called one by one."""

import csv
import json
import resource

import numpy as np
import pytest
import torch
from known_tasks import COSENT, TASKS
from small_runs import CORPUS, minbert

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.sources.loading import load_examples
from minbert.launch.outputs import whole_or_gone
from minbert.trainer.evaluation.averaging import mean_predictions
from minbert.trainer.evaluation.scoring import score
from minbert.trainer.run.data import load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import load_model, read_model

SIZE = ["--data", CORPUS, "--train-limit", "60", "--eval-limit", "30", "--batch-size", "8", "--steps", "4"]
SIZE += ["--trackers", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, RunFolder]:
    """Three runs: two alike, one with another encoding and other tasks."""
    folder = tmp_path_factory.mktemp("several")
    options = {
        "one": ["--tasks", "sst", "sts"],
        "other": ["--tasks", "sst", "sts", "--lr", "1e-3"],
        "joint": ["--tasks", "sts", "sst", "quora", "--pair-encoding", "joint", "--max-length", "64"],
    }
    for name, more in options.items():
        assert minbert("train", "--run", folder / name, *SIZE, *more) == 0
    return {name: RunFolder(folder / name) for name in options}


def raw(run: RunFolder, name: str) -> torch.Tensor:
    """Outputs of the whole dev split in one batch."""
    model, tokenizer, _ = load_model(run, torch.device("cpu"))
    config = run.read_config()
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"eval_limit": None})})
    split = load_split(config, name, "dev", tokenizer)
    with torch.no_grad():
        return model(make_batch({name: split}, {name: Portion.whole(np.arange(len(split)))}))[name]


def test_files_and_scores_are_those_of_the_mean_of_probabilities_and_similarities(runs, tmp_path, capsys):
    paths = [runs["one"].path, runs["joint"].path]
    out = tmp_path / "out"
    assert minbert("predict", *paths, "--splits", "dev") == 2
    assert "say with --out FOLDER where the predictions of several runs go" in capsys.readouterr().err
    assert minbert("predict", *paths, "--splits", "dev", "--out", paths[0] / "predictions") == 2
    assert minbert("predict", *paths, "--splits", "dev", "--out", out) == 0
    written = {
        name: [line.split(" , ")[1].strip() for line in (out / f"{name}-dev-output.csv").read_text().splitlines()[1:]]
        for name in ("sst", "sts")
    }
    members = [runs[name] for name in ("one", "joint")]
    probabilities = sum(raw(run, "sst").softmax(-1) for run in members) / 2
    assert [int(value) for value in written["sst"]] == probabilities.argmax(-1).tolist()
    similarities = sum(5 * raw(run, "sts")[:, 0].sigmoid() for run in members) / 2
    np.testing.assert_allclose([float(value) for value in written["sts"]], similarities, atol=1e-5)
    assert len(json.loads((out / "predictions.json").read_text())["sst-dev-output.csv"]["mean_of"]) == 2
    capsys.readouterr()
    assert minbert("evaluate", *paths, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    for name, predicted in (("sst", probabilities.argmax(-1).float()), ("sts", similarities)):
        labels = load_examples(CORPUS, TASKS[name], "dev").labels
        assert scores[name] == pytest.approx(score(TASKS[name], predicted, labels), abs=1e-6)


def test_a_text_is_predicted_by_all(runs, tmp_path, capsys):
    source = tmp_path / "in.csv"
    source.write_text("sentence1,sentence2\na man plays,a man sings\n")
    found = []
    for paths in ([runs["one"].path], [runs["joint"].path], [runs["one"].path, runs["joint"].path]):
        capsys.readouterr()
        assert minbert("predict", *paths, "--task", "sts", "--csv", source) == 0
        found.append(float(next(csv.DictReader(capsys.readouterr().out.splitlines()))["prediction"]))
    assert found[2] == pytest.approx((found[0] + found[1]) / 2, abs=2e-3)


def test_models_of_other_tasks_are_refused(runs, tmp_path, capsys):
    assert minbert("evaluate", runs["joint"].path, runs["one"].path) == 2
    assert f"{runs['one'].path} was not trained on quora" in capsys.readouterr().err
    assert minbert("average", runs["one"].path, runs["joint"].path, "--out", tmp_path / "soup") == 2
    said = capsys.readouterr().err
    assert "models of different shapes have no mean" in said and f"pair_encoding: siamese in {runs['one'].path}" in said
    assert minbert("average", runs["one"].path, "--out", tmp_path / "soup") == 2
    assert minbert("average", runs["one"].path, runs["other"].path) == 2
    assert "say with --out FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "soup").exists()


def test_a_mean_of_weights_is_a_model_like_any_other_but_no_run_to_train(runs, tmp_path, capsys):
    soup = RunFolder(tmp_path / "soup")
    assert minbert("average", runs["one"].path, runs["other"].path, "--out", soup.path) == 0
    assert "start" not in capsys.readouterr().out  # from the same weights
    one, other, mean = (read_model(run.best_model)[0] for run in (runs["one"], runs["other"], soup))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(mean[name], one[name]) for name in mean)
    assert minbert("evaluate", soup.path) == 0
    assert minbert("export", soup.path, tmp_path / "encoder") == 0
    assert "the mean of several models' weights" in (tmp_path / "encoder" / "README.md").read_text()
    before = soup.best_model.read_bytes()
    assert minbert("train", "--run", soup.path) == 2
    assert "which is no run to train" in capsys.readouterr().err and soup.best_model.read_bytes() == before
    assert minbert("average", runs["one"].path, runs["other"].path, "--out", soup.path) == 2


def test_one_models_predictions_are_its_own_and_cosines_mix_with_heads():
    outputs = torch.tensor([[0.3], [-0.2], [1.0]])
    assert torch.equal(mean_predictions(TASKS["quora"], [outputs]), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(mean_predictions(TASKS["quora"], [outputs, -2 * outputs]), torch.tensor([0.0, 1.0, 0.0]))
    assert mean_predictions(COSENT, [outputs, outputs]).tolist() == pytest.approx([1.5, 0.0, 5.0])


def test_no_two_commands_fill_a_folder_at_once(runs, tmp_path, capsys):
    """One would leave the model of one run with the heads of another; the loser takes nothing away."""
    one, other = runs["one"].path, runs["other"].path
    for command in (["export", one], ["average", one, other, "--out"], ["predict", one, "--out"]):
        out = tmp_path / str(command[0])
        with whole_or_gone(out):
            assert minbert(*command, out) == 2
            assert f"another command writes into {out}; wait for it" in capsys.readouterr().err
            assert out.is_dir()
        assert list(out.iterdir()) == []
        assert minbert(*command, out) == 0
        assert not (out / ".lock").exists()


def test_an_empty_folder_that_a_full_disk_has_failed_is_empty_again(runs, tmp_path, capsys):
    """So that the same command goes on, once there is room."""
    out = tmp_path / "out"
    out.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["export", runs["one"].path], ["average", runs["one"].path, runs["other"].path, "--out"]):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
            assert minbert(*command, out) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in capsys.readouterr().err
        assert list(out.iterdir()) == []
    assert minbert("export", runs["one"].path, out) == 0
