"""`benchmarks/performance.py`: that its sides do the same work, how it measures, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from performance_report import Aim, Comparison, keep
from turns import Measured, Turn, speed
from weights import starting_weights

from minbert.data.batches.plan import BatchPlan
from minbert.launch.options import parse_run_config
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.objectives.supervised import supervised
from minbert.trainer.processes import world as distributed
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.preparation import prepare

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "performance.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return starting_weights("tiny", "builtin", tmp_path_factory.mktemp("weights") / "tiny")


def _measured(name: str, *seconds: float) -> Measured:
    return Measured(name, [Turn(100.0, each, 2 * each) for each in seconds], memory=10.0)


def test_ratios_are_taken_within_a_round():
    ours, theirs = _measured("ours", 1.0, 10.0, 2.0), _measured("theirs", 4.0, 20.0, 6.0)  # a machine that is slow once
    ratio = speed(ours, theirs)
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert Aim.at_least("", 3.0, ours, theirs).reached
    assert not Aim.at_most("", 2.9, theirs, ours).reached  # the time of theirs is three times that of ours
    assert Aim.at_least("", 3.0, ours, Measured("none", why="skipped")).reached is None


def test_a_comparison_that_is_made_again_takes_the_place_of_the_old_one(tmp_path):
    for setting, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        sides = [_measured("base", 8.0), _measured("ours", seconds), Measured("none", why="pip install it")]
        keep(tmp_path, Comparison("step", setting, "tokens", "base", sides), {"processor": "known"}, "command")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["setting"] for each in results] == ["b", "a"]
    text = (tmp_path / "results.md").read_text()
    assert "| ours | 25 | 2.00 |" in text and "| ours | 50 | 4.00 |" in text and "left out: pip install it" in text


def test_both_sides_compute_the_same_losses(weights, tmp_path):
    """Of the same examples, weights and heads, without dropout, to the rounding of fp32."""
    from peers import hf  # imports transformers, which takes a while

    words = ["--model", str(weights), "--run", str(tmp_path / "run"), "--train-limit", "40", "--batch-size", "5"]
    run = prepare(parse_run_config([*words, "--trackers"]))
    config, world = run.read_config(), distributed.start(run.read_config().parallel)
    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    engine = assemble_engine(config, run, world, pretrained=True)
    engine.eval()
    step = assemble_step(config, engine, plan, splits, world)
    peer = hf.build_model(run, config).eval()
    with torch.no_grad():
        ours = engine(step.batch(plan.names, 0, 0), supervised)
        for name, split in splits.items():
            rows = plan.rows(name, 0)
            columns = [hf.padded(column, rows, world.device) for column in split.columns]
            theirs = peer.loss(name, peer(name, columns), torch.from_numpy(split.labels[rows]))
            assert float(ours[name].mean()) == pytest.approx(float(theirs), rel=1e-5)


def test_grouping_by_length_leaves_out_and_adds_no_example():
    from peers import hf

    plan = BatchPlan({"sst": 300}, batch_size=4)
    lengths = np.random.default_rng(0).integers(3, 60, 300)
    rows_of = hf.by_length(plan, {"sst": SimpleNamespace(lengths=lengths)})
    batches = [rows_of("sst", number) for number in range(hf.TOGETHER)]
    assert sorted(np.concatenate(batches)) == sorted(np.concatenate([plan.rows("sst", n) for n in range(hf.TOGETHER)]))
    assert np.mean([np.ptp(lengths[rows]) for rows in batches]) < 3  # of 57 in batches as they come


def test_the_command_leaves_turns_tables_and_a_plot(weights, tmp_path):
    words = "--only step techniques --sides minbert rdrop --batch-size 4 --precision fp32 --rounds 2 --steps 1"
    command = [sys.executable, BENCHMARK, *words.split(), "--train-limit", "60", "--profile", "--model", weights]
    done = subprocess.run(list(map(str, [*command, "--out", tmp_path])), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    step, techniques = json.loads((tmp_path / "results.json").read_text())
    assert {side["name"]: len(side["turns"]) for side in techniques["sides"]} == {"none": 2, "rdrop": 2}
    sides = {side["name"]: side for side in step["sides"]}
    assert sides.keys() == {"minbert", "transformers, padded"}
    for theirs, ours in zip(sides["transformers, padded"]["turns"], sides["minbert"]["turns"], strict=True):
        assert theirs["work"] == ours["work"] > 0  # the same examples
    assert all(len(side["turns"]) == 2 and side["memory"] > 0 for side in sides.values())
    assert "minbert to transformers, padded: speed | ≥ 4 |" in (tmp_path / "results.md").read_text()
    assert "</svg>" in (tmp_path / "results.svg").read_text()
    profiles = tmp_path / "profiles" / "step" / "tiny-4-per-task-fp32"
    assert {"minbert.txt", "minbert.json.gz"} <= {file.name for file in profiles.iterdir()}
