"""Going on with a run: stopped, killed, finished or changed, it ends as if nothing had happened, or says why it cannot.

A run is stopped by a signal to itself after a chosen step, so that every test stops where it means to.
"""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CORPUS, logged, minbert, tensors_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minbert.trainer import assembly
from minbert.trainer import train as training
from minbert.trainer.checkpoint.format import published, read_manifest
from minbert.trainer.evaluation.scoring import Evaluation
from minbert.trainer.processes.exit_codes import ExitCode

SMALL = ["--data", CORPUS, "--train-limit", 120, "--eval-limit", 40, "--batch-size", 8]


def train(run: Path, *arguments: object) -> int:
    return minbert("train", "--run", run, *arguments)


def contents(run: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return tensors_of(published(run / "checkpoints")[-1])


def assert_same_end(run: Path, other: Path) -> None:
    """Losses, scores, the best model and the last checkpoint are equal to the bit."""
    assert logged(run) == logged(other)
    for weights in (final_weights, lambda path: load_file(path / "best.safetensors")):
        found, expected = weights(run), weights(other)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    files = [path.name for path in (other / "predictions").glob("*.csv")]
    assert all(
        (run / "predictions" / name).read_bytes() == (other / "predictions" / name).read_bytes() for name in files
    )


@pytest.fixture
def after(monkeypatch):
    """`after(step, action)`: do something once, after that step was trained and before anything else."""

    def arrange(step: int, action) -> None:
        original = training.Training._train_one_step

        def one_step(self) -> None:
            original(self)
            if self.state.step == step:
                monkeypatch.setattr(training.Training, "_train_one_step", original)
                action()

        monkeypatch.setattr(training.Training, "_train_one_step", one_step)

    return arrange


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise RuntimeError("power cut")


BUDGET = [*SMALL, "--steps", 12, "--eval-every", 4, "--log-every", 5]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run with dropout."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(run, *BUDGET) == 0
    return run


@pytest.mark.parametrize("step", [1, 7, 8, 12])
def test_a_stopped_run_ends_as_if_it_had_not_been(whole, after, tmp_path, capsys, step):
    """In the middle of a line of the log, before an evaluation, and after the last step."""
    run = tmp_path / "run"
    after(step, interrupt)
    assert train(run, *BUDGET) == ExitCode.INTERRUPTED
    assert capsys.readouterr().out.endswith(f"Stopped, and saved. To go on: minbert resume {run}\n")
    assert train(run) == 0
    assert f"Resuming {run} from step {step} of 12." in capsys.readouterr().out
    assert_same_end(run, whole)


def test_a_run_stopped_twice_and_started_by_the_same_command(whole, after, tmp_path):
    run = tmp_path / "run"
    for step in (3, 6):
        after(step, interrupt)
        assert train(run, *BUDGET) == ExitCode.INTERRUPTED
    assert train(run, *BUDGET) == 0
    assert_same_end(run, whole)


def test_a_killed_run_logs_every_step_once(whole, after, tmp_path):
    """What was logged beyond the checkpoint from which it goes on is forgotten, by TensorBoard too."""
    run = tmp_path / "run"
    after(11, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, *BUDGET, "--log-every", 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "los')  # torn
    (run / "checkpoints" / "step-00000011.0a1b2c3d.unfinished").mkdir()
    assert train(run) == 0
    steps = Counter(record["step"] for record in logged(run) if "loss/sst" in record)
    assert steps == Counter(range(1, 13))
    events = EventAccumulator(str(run / "tensorboard" / "metrics")).Reload()
    assert [event.step for event in events.Scalars("loss/sst")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("dev/overall")] == [4, 8, 12]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}
    found, expected = final_weights(run), final_weights(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Averaged weights


AVERAGED = [*BUDGET, "--average-decay", 0.7, "--freeze", 1]


def test_a_killed_run_goes_on_with_its_average_to_the_bit(after, tmp_path, capsys):
    """What is evaluated, saved as the best model, exported and converted is the average, and training does not notice:
    the weights and the losses are those of a run without one."""
    plain, whole, run = tmp_path / "plain", tmp_path / "whole", tmp_path / "run"
    assert train(plain, *BUDGET, "--freeze", 1) == 0
    assert train(whole, *AVERAGED) == 0
    after(11, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, *AVERAGED)
    assert train(run) == 0
    assert_same_end(run, whole)
    losses = [[record for record in logged(path) if "loss/sst" in record] for path in (plain, whole)]
    assert losses[0] == losses[1]
    tensors, without = final_weights(whole), final_weights(plain)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in without.items())
    names = {name for name in tensors if name.startswith("exp_avg/")}
    assert tensors.keys() - without.keys() == {name.replace("exp_avg/", "average/") for name in names}
    converted = tmp_path / "converted.safetensors"
    assert minbert("checkpoint", "convert", whole, converted) == 0
    for name, tensor in load_file(converted).items():
        average = tensors.get(f"average/{name}")
        assert torch.equal(tensor.flatten(), tensors[f"weight/{name}"] if average is None else average)
        assert (average is None) == name.startswith(("bert.embeddings.", "bert.layers.0.", "bert.pooler.")), name
    if read_manifest(published(whole / "checkpoints")[-1]).state.best_step == 12:
        best = load_file(whole / "best.safetensors")
        assert all(torch.equal(tensor, best[name]) for name, tensor in load_file(converted).items())


def test_another_average_is_refused_by_name_or_forced(tmp_path, capsys):
    """A checkpoint without one starts it from its weights; one with another decay goes on from there."""
    run = tmp_path / "run"
    assert train(run, *SMALL, "--steps", 3) == 0
    capsys.readouterr()
    again = ["--steps", 5, "--average-decay", 0.5]
    assert train(run, *again) == ExitCode.USER_MISTAKE
    assert "average_decay: None in the folder, 0.5 asked for" in capsys.readouterr().err
    assert train(run, *again, "--force") == 0
    assert "has no average of the weights: it starts from the weights of its step" in capsys.readouterr().err
    assert train(run, "--steps", 6, "--average-decay", 0.25, "--force") == 0
    assert "has no average" not in capsys.readouterr().err
    before, after_it = (tensors_of(path) for path in published(run / "checkpoints")[-2:])
    name = "heads.sst.layers.1.weight"
    expected = 0.25 * before[f"average/{name}"] + 0.75 * after_it[f"weight/{name}"]
    torch.testing.assert_close(after_it[f"average/{name}"], expected)
    assert train(run, "--steps", 7, "--average-decay", "None", "--force") == 0
    assert not any(name.startswith("average/") for name in final_weights(run))


def test_a_run_without_a_checkpoint_starts_over(after, tmp_path, capsys):
    """Its vocabulary and its log were of other data, which it is told to forget."""
    run = tmp_path / "run"
    after(3, crash)
    with pytest.raises(RuntimeError):
        train(run, *BUDGET, "--log-every", 1)
    vocabulary = (run / "encoder" / "vocab.txt").read_text()
    others = ["--train-limit", 60, "--steps", 4, "--seed", 3]
    before = contents(run)
    assert train(run, *others) == ExitCode.USER_MISTAKE
    assert "seed: 0 in the folder, 3 asked for" in capsys.readouterr().err and contents(run) == before
    assert train(run, *others, "--force") == 0
    assert (run / "encoder" / "vocab.txt").read_text() != vocabulary
    assert [record["step"] for record in logged(run) if "loss/sst" in record] == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone(whole, capsys):
    files = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and "logs" not in path.parts}
    kept = {path for path in files if path.name not in ("config.yaml", "environment.json", "code.diff")}
    capsys.readouterr()
    assert train(whole) == 0
    said = capsys.readouterr().out
    assert f"{whole} was finished before: 12 of 12 steps" in said and "A larger --steps trains on." in said
    assert "Best model" not in said
    assert all(path.stat().st_mtime_ns == files[path] for path in kept)


def test_predictions_that_are_missing_are_made_up_for(whole, capsys):
    path = whole / "predictions" / "sts-dev-output.csv"
    before = path.read_bytes()
    path.unlink()
    assert train(whole) == 0
    assert "Best model, dev" in capsys.readouterr().out and path.read_bytes() == before


def test_more_epochs_go_on_where_the_run_had_ended(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*SMALL, "--epochs", 0.2, "--lr-schedule", "constant", "--log-every", 1]
    assert train(run, *arguments) == 0
    first = logged(run)
    assert "A larger --epochs trains on." in capsys.readouterr().out
    assert train(run, "--epochs", 0.4) == 0
    assert logged(run)[: len(first)] == first
    steps = [record["step"] for record in logged(run) if "loss/sst" in record]
    assert steps == list(range(1, 7)) and first[-1]["step"] == 3


def test_other_settings_are_refused_and_harmless_ones_are_not(whole, capsys):
    for option, value in (
        ("--batch-size", 9),
        ("--lr", 0.5),
        ("--seed", 4),
        ("--train-limit", 50),
    ):
        assert train(whole, option, value) == ExitCode.USER_MISTAKE
        said = capsys.readouterr().err
        assert f"{option[2:].replace('-', '_')}: " in said and f"{value} asked for" in said
    assert train(whole, "--keep", 3, "--log-every", 7) == 0


# Early stopping and extension


def scores(monkeypatch, values: list[float]) -> None:
    """Let the evaluations give these overall scores, the last one from then on."""
    given = iter(values)
    last = [values[-1]]
    monkeypatch.setattr(
        training, "evaluate", lambda *_, **__: Evaluation({"sst": 0.5, "overall": next(given, last[0])}, {})
    )


def test_early_stopping_stays_stopped_and_can_be_lengthened(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    scores(monkeypatch, [0.5, 0.6, 0.6, 0.4, 0.3])
    assert train(run, *SMALL, "--steps", 20, "--eval-every", 1, "--patience", 2) == 0
    assert logged(run)[-1]["step"] == 4
    said = capsys.readouterr().out
    assert "4 of 20 steps, the best score at step 2. No better one in 2 evaluations (patience=2)" in said
    assert train(run) == 0
    assert "was finished before: 4 of 20 steps" in capsys.readouterr().out and logged(run)[-1]["step"] == 4
    assert train(run, "--patience", 4) == 0
    assert logged(run)[-1]["step"] == 6


@pytest.mark.parametrize(
    ("given", "end"), [([0.1, 0.2, 0.3, 0.4], 9), ([0.1, 0.2, 0.15], 9), ([0.1, 0.05], 6), ([0.0], 6)]
)
def test_the_budget_grows_while_the_last_score_is_the_best(tmp_path, monkeypatch, given, end):
    run = tmp_path / "run"
    rule = ["--epochs", 0.2, "--extend-to", 0.6, "--lr-schedule", "constant"]
    scores(monkeypatch, given)
    assert train(run, *SMALL, *rule, "--eval-every", 3) == 0
    assert logged(run)[-1]["step"] == end
    assert read_manifest(published(run / "checkpoints")[-1]).state.step == end
    monkeypatch.setattr(training, "evaluate", crash)
    assert train(run) == 0  # the extension is remembered: there is nothing to do


# What stays fixed


@pytest.mark.parametrize(
    ("freeze", "fixed"),
    [
        ("embeddings", ["bert.embeddings."]),
        (1, ["bert.embeddings.", "bert.layers.0."]),
        ("encoder", ["bert."]),
    ],
)
def test_a_frozen_part_keeps_its_first_weights(tmp_path, monkeypatch, freeze, fixed):
    first = {}
    original = assembly.build_model

    def build_model(*arguments):
        model = original(*arguments)
        first.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return model

    monkeypatch.setattr(assembly, "build_model", build_model)
    arguments = ["--steps", 3, "--freeze", freeze, "--pooling", "cls", "--weight-decay", 0.5]
    assert train(tmp_path / "run", *SMALL, *arguments) == 0
    last = load_file(tmp_path / "run" / "best.safetensors")
    moved = {name for name, tensor in first.items() if not torch.equal(last[name], tensor)}
    assert moved == {name for name in first if not name.startswith(tuple(fixed))}
    assert any(name.startswith("heads.") for name in moved)


# Several processes


def test_two_processes_train_one_task_a_step_as_one_does(tmp_path):
    """And are scored alike; `engine/test_exactness` compares the steps themselves, at all stages."""
    arguments = [*SMALL, "--steps", 6, "--task-schedule", "proportional", "--log-every", 1]
    still = ["--encoder-dropout", 0, "--head-dropout", 0]
    assert train(tmp_path / "one", *arguments, *still) == 0
    assert train(tmp_path / "two", *arguments, *still, "--processes", 2) == 0
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for expected, found in zip(one, two):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6)
