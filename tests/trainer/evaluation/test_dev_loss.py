"""The dev loss of an evaluation: what training's objective says of the whole split as one batch, without dropout."""

import numpy as np
import pytest
import torch
from known_tasks import COSENT
from small_runs import CORPUS, minbert

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.task import Task
from minbert.launch.api import Run
from minbert.trainer.evaluation.scoring import mean_loss
from minbert.trainer.objectives.supervised import supervised
from minbert.trainer.run.data import load_splits
from minbert.trainer.run.saved_model import load_model

TAGS = {"name": "tags", "title": "Tags", "kind": "multilabel", "sentences": ["text"], "label": "tags"}


def dense(run: Run) -> dict[str, float]:
    """Of the best model: the mean loss of each task over one batch that holds its whole dev split."""
    model, _, _ = load_model(run.folder, torch.device("cpu"))
    found = {}
    for name, split in load_splits(run.config, run.folder, "dev").items():
        rows = np.arange(len(split))
        with torch.no_grad():
            losses = model(make_batch({name: split}, {name: Portion(rows, rows, len(rows))}), supervised)[name]
        found[name] = losses.double().mean().item()
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_the_loss_of_the_split_as_one_batch(tmp_path, processes):
    words = ["--data", CORPUS, "--steps", 4, "--eval-every", 2, "--batch-size", 8, "--trackers"]
    words += ["--losses", "sst=squared_emd", "sts=pearson", "--label-smoothing", 0, 0.3, 0, "--smart-weight", 1]
    words += ["--processes", processes, "--zero-stage", 2 if processes > 1 else 0]
    assert minbert("train", "--run", tmp_path / "run", *words) == 0
    run = Run(tmp_path / "run")
    records = [record for record in run.records if "dev/overall" in record]
    best = next(record for record in records if record["step"] == run.step)
    found = {name.removeprefix("dev_loss/"): value for name, value in best.items() if name.startswith("dev_loss/")}
    assert found == pytest.approx(dense(run), rel=1e-5)
    assert found["sts"] == pytest.approx(1 - run.scores["sts"], abs=1e-6)
    curve = run.curves["dev_loss/quora"]
    assert curve.steps.tolist() == [2, 4] and curve.values.tolist() == [r["dev_loss/quora"] for r in records]


def test_several_labels_have_the_mean_of_their_cross_entropies():
    task = Task.model_validate(TAGS | {"classes": ["a", "b"], "files": {"train": "a.csv", "dev": "b.csv"}})
    raw, labels = torch.tensor([[0.0, 2.0], [-1.0, 3.0], [4.0, 0.5]]), np.array([[0, 1], [1, 1], [0, 0]], np.float32)
    expected = torch.nn.BCEWithLogitsLoss()(raw, torch.from_numpy(labels)).item()
    assert mean_loss(task, raw, labels) == pytest.approx(expected, rel=1e-6)


def test_what_is_no_loss_of_a_split_has_none():
    assert mean_loss(COSENT, torch.zeros(3, 1), np.arange(3, dtype=np.float32)) is None
    assert mean_loss(COSENT.model_copy(update={"loss": "pearson"}), torch.zeros(0, 1), np.zeros(0, np.float32)) is None
