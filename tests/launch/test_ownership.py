"""What a live run cannot lose: to another start, to a start that fails, to files that were removed or damaged."""

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from known_tasks import TASKS
from small_runs import CORPUS, minbert

from minbert.data.errors import UserError
from minbert.data.files import to_json
from minbert.launch.worker import work
from minbert.slurm.records import Records, Submission
from minbert.trainer.checkpoint.format import Damaged, Manifest, TrainingState, published, read_manifest
from minbert.trainer.evaluation.scoring import overall, score
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import read_model, save_model

SMALL = ["--data", CORPUS, "--train-limit", 60, "--eval-limit", 20, "--batch-size", 8, "--trackers"]
SMALL += ["--aggregator", "gradvac"]
OTHER = ["--lr", 0.5, "--train-limit", 30, "--force"]  # what would change a run's vocabulary and rates


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert minbert("train", "--run", run, *SMALL, "--steps", 3, "--eval-every", 1, "--keep", 3) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy, which knows its own place."""
    run = shutil.copytree(trained, tmp_path / "run")
    edit(run, run=str(run))
    return run


def edit(folder: Path, section: str | None = None, **options: object) -> None:
    """Change config.yaml by hand."""
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (content if section is None else content[section]).update(options)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


STARTS = (["train", "--run"], ["resume"], ["submit", "--executor", "local", "--run"])


# Who owns the folder


def test_a_start_that_is_refused_changes_nothing(run, tmp_path, capsys):
    before = contents(run)
    with RunFolder(run).locked():
        for words in STARTS:
            assert minbert(*words, run, *OTHER) == ExitCode.USER_MISTAKE
            assert "is being trained by another process" in capsys.readouterr().err
        (tmp_path / "source").mkdir()
        assert minbert("checkpoint", "convert", tmp_path / "source", run, *OTHER) == ExitCode.USER_MISTAKE
    assert contents(run) == before


def test_a_run_with_a_job_is_the_jobs(run, capsys):
    """As a job here is known by the process that watches it, this one is as good as any."""
    here = psutil.Process()
    submission = Submission(str(here.pid), here.cmdline()[0], "", {"executor": "local"}, socket.gethostname(), 0.0)
    Records(run).write_submission(submission)
    before = contents(run)
    for words in STARTS:
        assert minbert(*words, run, *OTHER) == ExitCode.USER_MISTAKE
        said = capsys.readouterr().err
        assert "has a job already: running" in said and f"minbert cancel {run}" in said
    assert contents(run) == before


def test_a_start_that_fails_changes_nothing_and_leaves_no_folder(run, tmp_path, capsys):
    before = contents(run)
    shutil.rmtree(run / "checkpoints")  # so that the encoder would be made anew
    (run / "saved.json").unlink()
    kept = contents(run)
    bad = ["--data", tmp_path / "nothing"], ["--freeze", 9]
    for options in bad:
        assert minbert("train", "--run", run, *OTHER, *options) == ExitCode.USER_MISTAKE
    assert contents(run) == kept and before.keys() > kept.keys()
    assert not (run / "encoder.unfinished").exists()
    capsys.readouterr()
    for options in bad:
        assert minbert("train", "--run", tmp_path / "new" / "run", *SMALL, *options) == ExitCode.USER_MISTAKE
    # The first element of the sweep is prepared when the second one fails.
    sweep = ["--run", tmp_path / "new" / "sweep", *SMALL, "--sweep", "freeze=none,9", "--executor", "local"]
    assert minbert("submit", *sweep) == ExitCode.USER_MISTAKE
    assert "freeze=9, but the encoder has 2 layers" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_folders_of_others_stay_as_they_are(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert minbert("train", "--run", full, *SMALL) == ExitCode.USER_MISTAKE
    assert minbert("train", "--run", empty, *SMALL, "--freeze", 9) == ExitCode.USER_MISTAKE
    assert list(empty.iterdir()) == [] and [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_of_two_starts_in_a_new_folder_one_wins(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path).locked():
        with pytest.raises(UserError, match="is being trained by another process"), RunFolder(path).locked():
            pytest.fail("two own it")
        assert path.is_dir()  # the one that was refused has not taken it from under the other
        (path / "config.yaml").touch()
    with pytest.raises(ZeroDivisionError), RunFolder(path).locked():
        raise ZeroDivisionError
    assert path.is_dir()  # it was there before


def test_a_job_waits_for_its_last_attempt(tmp_path, caplog):
    """And says so once; a request to stop ends the waiting."""
    run, waited, stop = RunFolder(tmp_path / "run"), [], StopRequest()

    def wait() -> None:
        with RunFolder(run.path).locked(patience=100):
            waited.append(time.monotonic())

    with run.locked():
        thread = threading.Thread(target=wait)
        thread.start()
        while not caplog.messages:
            time.sleep(0.01)
        stop.signal = 15
        with pytest.raises(UserError), RunFolder(run.path).locked(patience=100, stop=stop):
            pytest.fail("two own it")
        assert not waited
    thread.join(100)
    assert waited and sum("waiting for them" in message for message in caplog.messages) == 1


# Checkpoints that were removed


def test_a_run_whose_checkpoints_are_gone_does_not_start_over_in_silence(run, capsys):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    for words in STARTS:
        assert minbert(*words, run) == ExitCode.USER_MISTAKE
        said = capsys.readouterr().err
        assert f"{run}/checkpoints/step-00000003 is missing" in said and "start over" in said and "--force" in said
    assert contents(run) == before
    with pytest.raises(UserError, match="is missing"):  # a job that starts again
        work(RunFolder(run))
    assert minbert("train", "--run", run, "--steps", 2, "--force") == 0
    assert [path.name for path in published(run / "checkpoints")] == ["step-00000001", "step-00000002"]
    for name in ("metrics.jsonl", "best.safetensors", "saved.json"):
        assert (run / "earlier-1" / name).read_bytes() == before[name]
    assert max(record["step"] for record in RunFolder(run).read_metrics()) == 2
    assert minbert("resume", run) == 0


def test_a_run_whose_newest_checkpoint_is_gone_goes_back_only_by_force(run, capsys):
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert minbert("resume", run, "--steps", 4) == ExitCode.USER_MISTAKE
    assert "the newest that is there is step-00000002" in capsys.readouterr().err
    assert minbert("resume", run, "--steps", 4, "--force") == 0
    assert "from step 2 of 4" in capsys.readouterr().out


def test_copies_of_checkpoints_are_none(run):
    names = ["step-00000003-backup", "step-00000003 (copy)", "step-3", "step-old"]
    for name in names:
        shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / name)
    assert Records(run).newest_step() == 3
    assert minbert("resume", run, "--steps", 5, "--keep", 1) == 0
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {*names, "step-00000005"} and Records(run).newest_step() == 5


# The best model


def test_no_damage_to_a_model_goes_unnoticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}, 7, {"overall": 0.5, "sts": math.nan})
    content = path.read_bytes()
    tensors, metadata = read_model(path)
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and metadata["step"] == "7"
    flipped = (
        content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
        for bit in range(8 * len(content))
    )
    cut = (content[:length] for length in range(len(content)))
    for damaged in (*flipped, *cut, content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"model\.safetensors"):
            read_model(path)


def test_a_damaged_best_model_is_replaced_by_its_checkpoint_or_refused(run, tmp_path, capsys, caplog):
    def evaluate() -> str:
        assert minbert("evaluate", run, "--json") == 0
        return capsys.readouterr().out

    assert minbert("checkpoint", "verify", run) == 0
    capsys.readouterr()
    scores, best = evaluate(), run / "best.safetensors"
    content = best.read_bytes()
    best.write_bytes(content[:-5] + bytes([content[-5] ^ 64]) + content[-4:])
    assert minbert("checkpoint", "verify", run) == ExitCode.FAILED
    assert "best.safetensors: damaged" in capsys.readouterr().out
    assert evaluate() == scores and "holds the same weights, is used instead" in caplog.text
    step = read_manifest(published(run / "checkpoints")[-1]).state.best_step
    shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    for damaged in (best.read_bytes(), content[:1000], b""):
        best.write_bytes(damaged)
        for words in (["evaluate", run], ["predict", run], ["export", run, tmp_path / "out"]):
            assert minbert(*words) == ExitCode.USER_MISTAKE
            said = capsys.readouterr().err
            assert str(best) in said and f"minbert checkpoint convert {run} {best}" in said
    assert minbert("checkpoint", "convert", run, best) == 0
    assert minbert("checkpoint", "verify", run) == 0


# Scores, and what JSON cannot say


@pytest.mark.parametrize(
    "predicted",
    [
        [2.5] * 4,
        np.nextafter(np.float32([2.5] * 4), np.float32([2.5, 9, 2.5, 9])).tolist(),  # constant but for rounding
        [0.1] * 4,
        [1.0, math.nan, 2.0, 3.0],
        [1.0, math.inf, 2.0, 3.0],
    ],
)
def test_a_score_is_always_a_number(predicted):
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    found = score(TASKS["sts"], torch.tensor(predicted, dtype=torch.float32), labels)
    assert found == 0.0 and overall([TASKS["sts"]], {"sts": found}) == 0.5
    constant = score(TASKS["sts"], torch.arange(4.0), np.full(4, 0.1))
    assert constant == 0.0
    for task in TASKS.values():
        assert score(task, torch.zeros(0), np.zeros(0)) == 0.0
    assert score(TASKS["sts"], torch.tensor([0.1, 0.2, 0.3, 0.4]) * 1e-3 + 1, labels) == pytest.approx(1, abs=1e-4)


def test_what_is_not_finite_is_null_in_every_file(tmp_path):
    assert json.loads(to_json({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}})) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None},
    }
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss/sst": math.nan})
    run.rewind(1)
    run.append_gramians({"step": 1, "gramians": [[math.inf]]})
    state = TrainingState(1, window={"losses": {"sst": [math.nan, 0.5]}})
    manifest = Manifest(1, "", 1, None, state, {}, {}, {}, {}, {}, {})
    manifest.write(tmp_path)
    assert read_manifest(tmp_path).state.window == {"losses": {"sst": [None, 0.5]}}
    for path in (run.metrics_file, run.gramians_file, tmp_path / "manifest.json"):
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert run.read_metrics() == [{"step": 1, "loss/sst": None}]


# Settings that were changed by hand


@pytest.mark.parametrize(
    ("section", "option", "value", "before"), [(None, "seed", 7, 0), ("batch", "aggregator", "famo", "gradvac")]
)
def test_what_shapes_a_run_is_compared_with_the_checkpoint(run, capsys, section, option, value, before):
    edit(run, section, **{option: value})
    assert minbert("resume", run, "--steps", 4) == ExitCode.USER_MISTAKE
    assert f"settings.{option}: {before} in the checkpoint, {value} here" in capsys.readouterr().err
    assert minbert("resume", run, "--steps", 4, "--force") == 0
    said = capsys.readouterr()
    assert "from step 3 of 4" in said.out
    assert ("famo starts with a fresh state" in said.err) == (option == "aggregator")
    assert minbert("resume", run, "--steps", 5) == 0


RECORDING = """
import sys
from pathlib import Path
from minbert.launch.results import recorded

for number in range(60):
    with recorded(Path(sys.argv[1]), f"{sys.argv[2]}-{number}", {"data": "builtin"}):
        pass
"""


def test_prediction_files_that_are_written_at_once_are_all_recorded(tmp_path):
    """A run that ends and a command write the same folder: neither loses what the record tells of the other's files."""
    record = tmp_path / "predictions.json"
    writers = [subprocess.Popen([sys.executable, "-c", RECORDING, record, name]) for name in ("a", "b", "c")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(json.loads(record.read_text())) == 180
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
