"""Runs whose encoder joins part by part: what is not trained yet stays as it was, and a kill at any moment of it, or
another number of processes, changes nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from small_runs import CORPUS, logged, minbert
from small_runs import tensors_of as all_tensors_of

from minbert.launch.main import main
from minbert.trainer.checkpoint.format import published, read_manifest, remember

# Of twelve steps, three train the heads alone; then layer 1 joins, layer 0 at step 5, the embeddings at step 8.
JOINS = {"heads.sst": 0, "heads.quora": 0, "heads.sts": 0, "layer 1": 3, "layer 0": 5, "embeddings": 8}
SMALL = f"--data {CORPUS} --train-limit 120 --eval-limit 40 --batch-size 8 --steps 12 --eval-every 6"
SMALL += " --save-every 1 --keep 20 --trackers"
GRADUAL = "--log-every 1 --head-warmup 0.25 --unfreeze gradual --unfreeze-share 0.67 --aggregator pcgrad"
STILL = "--encoder-dropout 0 --head-dropout 0"


def train(run: Path, *options: str) -> Path:
    assert minbert("train", "--run", run, *" ".join(options).split()) == 0
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("unfreezing") / "run", SMALL, GRADUAL)


@pytest.fixture(scope="module")
def whole_without_dropout(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("unfreezing") / "run", SMALL, GRADUAL, STILL)


def part_of(name: str) -> str:
    """The part of a parameter, or of a tensor of a checkpoint."""
    name = name.rpartition("/")[2]
    if name.startswith("heads."):
        return ".".join(name.split(".")[:2])
    return "embeddings" if name.startswith("bert.embeddings") else f"layer {name.split('.')[2]}"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Those of what is trained at all."""
    return {name: tensor for name, tensor in all_tensors_of(checkpoint).items() if "pooler" not in name}


def checkpoints(run: Path) -> dict[int, Path]:
    return {read_manifest(path).step: path for path in published(run / "checkpoints")}


def killed_after(run: Path, copy: Path, step: int) -> Path:
    """A copy of the run as a kill after the checkpoint of `step` leaves it."""
    shutil.copytree(run, copy)
    for later, path in checkpoints(copy).items():
        if later > step:
            shutil.rmtree(path)
    remember(copy / "checkpoints", step)
    return copy


def test_what_has_not_joined_stays_as_it_was_moments_included(whole):
    found = {step: tensors_of(path) for step, path in checkpoints(whole).items()}
    assert list(found) == list(range(1, 13))
    for step, tensors in found.items():
        for key, tensor in tensors.items():
            joined = JOINS[part_of(key)] < step
            if key.startswith("weight/"):
                assert torch.equal(tensor, found[1][key]) != (joined and step > 1), (step, key)
            else:
                assert tensor.any() == joined, (step, key)


def test_updates_are_counted_from_where_a_part_joins(whole):
    for step, path in checkpoints(whole).items():
        assert read_manifest(path).state.updates == {part: max(0, step - first) for part, first in JOINS.items()}


def test_the_log_says_what_is_trained(whole):
    records = {record["step"]: record for record in logged(whole) if "trained_parts" in record}
    encoder = [first for part, first in JOINS.items() if not part.startswith("heads.")]
    for step, record in records.items():
        assert record["trained_parts"] == sum(first < step for first in encoder)
        assert (record["lr"] > 0) == (step > 3) and record["head_lr"] > 0
        conflicts = "cosine/sst-quora" in record and record["cosine/sst-quora"] != 0
        assert conflicts == (step > 3)  # what is frozen is left out of the Gramian


@pytest.mark.parametrize("step", [2, 3, 6, 8])
def test_a_run_killed_in_between_ends_as_if_it_had_not_been(whole, tmp_path, capsys, step):
    """In the frozen phase, where a part joins, in the middle, and where the last one joins."""
    run = killed_after(whole, tmp_path / "run", step)
    assert main(["resume", str(run)]) == 0
    said = capsys.readouterr().out
    start = "the heads alone" if step < 3 else f"the encoder from layer {1 if step < 5 else 0} up"
    assert f"step {step:>6}/12  trains {start if step < 8 else 'all of the encoder'}\n" in said
    assert logged(run) == logged(whole)
    assert (run / "gramians.jsonl").read_text() == (whole / "gramians.jsonl").read_text()
    found, expected = (tensors_of(checkpoints(path)[12]) for path in (run, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("step", "stage"), [(2, 3), (3, 2)])
def test_it_goes_on_elsewhere(whole_without_dropout, tmp_path, step, stage):
    run = killed_after(whole_without_dropout, tmp_path / "run", step)
    assert minbert("resume", run, "--processes", 2, "--zero-stage", stage) == 0
    for path in (run, whole_without_dropout):
        assert read_manifest(checkpoints(path)[12]).state.updates == {p: 12 - first for p, first in JOINS.items()}
    for expected, found in zip(logged(whole_without_dropout), logged(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected, found = (tensors_of(checkpoints(path)[12]) for path in (whole_without_dropout, run))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    "more",
    [
        "--surgery-scope layer --aggregator upgrad",
        "--task-schedule round_robin --aggregator sum",
        "--freeze 1 --pooling cls",
        "--smart-weight 0.1 --proximal-weight 0.1",
    ],
)
def test_it_goes_with_what_else_says_what_a_step_trains(tmp_path, more):
    """Surgery per layer weighs the layers that are trained; one task a step trains that task's head."""
    run = train(tmp_path / "run", SMALL, GRADUAL, more)
    updates = read_manifest(checkpoints(run)[12]).state.updates
    if "round_robin" in more:
        assert updates == {part: 4 if "heads" in part else 12 - first for part, first in JOINS.items()}
    elif "freeze" in more:  # what is frozen for good is no part of the order
        assert updates == {part: 12 for part in JOINS if "heads" in part} | {"pooler": 9, "layer 1": 4}
    else:
        assert updates == {part: 12 - first for part, first in JOINS.items()}
    assert all(record["loss/sst"] > 0 for record in logged(run) if "loss/sst" in record)
