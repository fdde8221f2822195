"""Disks that are full or read-only: small ones in memory, mounted for the test. They fail the save and not the run."""

import shutil
import subprocess

import pytest
import torch
from memory_disk import fill, memory_disk
from safetensors.torch import load_file
from small_runs import CORPUS, minbert

from minbert.data.errors import disk_trouble
from minbert.data.files import LineFile
from minbert.trainer import train as training
from minbert.trainer.checkpoint.format import published
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder

SMALL = ["--data", CORPUS, "--train-limit", 120, "--eval-limit", 40, "--batch-size", 8]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 28 MB, of which a run needs 21."""
    with memory_disk(tmp_path / "disk", megabytes=28) as disk:
        yield disk


def run_with(monkeypatch, happenings: dict, *arguments: object) -> int:
    """`minbert train` in this process; before the save of a step in `happenings`, its function is called."""
    original = training.Training._save

    def save(self, wait: bool = False) -> bool:
        if self.state.step in happenings:
            happenings.pop(self.state.step)()
        return original(self, wait)

    monkeypatch.setattr(training.Training, "_save", save)
    return minbert("train", *arguments)


def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk, tmp_path, monkeypatch, capsys):
    """Nothing is lost: neither lines of the log, nor the best model, nor the checkpoint from before."""
    run, whole = small_disk / "run", tmp_path / "whole"
    arguments = [*SMALL, "--steps", 12, "--eval-every", 4, "--log-every", 1, "--keep", 1, "--trackers"]
    # The score rises: there is a best model to write when the disk is full.
    arguments += ["--data", "builtin", "--seed", 1]
    assert minbert("train", "--run", whole, *arguments) == 0
    assert "step      8/12" in (said := capsys.readouterr().out) and said.count("best so far") == 3
    seen = []

    def full() -> None:
        fill(small_disk)
        (run / "best.safetensors").unlink()  # as if it had not been written either

    def space() -> None:
        seen.extend(path.name for path in published(run / "checkpoints"))
        (small_disk / "ballast").unlink()

    assert run_with(monkeypatch, {8: full, 12: space}, "--run", run, *arguments) == 0
    said = capsys.readouterr().err
    assert "The checkpoint of step 8 could not be written: No space left on device" in said
    assert "The newest checkpoint is step-00000004." in said
    assert seen == ["step-00000004"]
    assert [path.name for path in published(run / "checkpoints")] == ["step-00000012"]
    assert {path.suffix for path in (run / "checkpoints").iterdir()} == {""}
    logged, expected = RunFolder(run).read_metrics(), RunFolder(whole).read_metrics()
    assert [record["step"] for record in logged] == [record["step"] for record in expected]
    found, best = load_file(run / "best.safetensors"), load_file(whole / "best.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in best.items())


def test_a_read_only_folder_stops_the_run_when_it_stays_so(small_disk, monkeypatch, capsys):
    run = small_disk / "run"

    def read_only() -> None:
        subprocess.run(["mount", "--bind", run, run], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)

    try:
        code = run_with(
            monkeypatch,
            {6: read_only},
            *("--run", run, *SMALL, "--steps", 30, "--save-every", 2, "--eval-every", 100, "--failed-saves", 2),
            *("--log-every", 1, "--keep", 1),
        )
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)
    said = capsys.readouterr().err
    assert code == ExitCode.USER_MISTAKE and "Traceback" not in said
    assert "The checkpoint of step 8 could not be written: Read-only file system" in said
    assert (
        "failure 2 in a row to save, so the run stops (failed_saves=2). The newest checkpoint is step-00000004" in said
    )
    assert minbert("resume", run, "--steps", 6) == 0


def test_lines_wait_for_room(small_disk):
    lines = LineFile(small_disk / "log")
    lines.append("one")
    ballast = fill(small_disk)
    for number in range(2000):
        lines.append(f"line {number}")
    ballast.unlink()
    lines.append("last")
    assert (small_disk / "log").read_text().splitlines() == ["one", *(f"line {n}" for n in range(2000)), "last"]


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    (tmp_path / "log").write_text('{"a": 1}\n{"a"')
    LineFile(tmp_path / "log").append('{"a": 2}')
    assert (tmp_path / "log").read_text().splitlines() == ['{"a": 1}', '{"a"', '{"a": 2}']


def test_a_folder_that_is_copied_to_a_full_disk_names_the_file(small_disk, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "vocab.txt").write_bytes(b"word\n" * 100_000)
    fill(small_disk)
    with pytest.raises(shutil.Error) as raised:
        shutil.copytree(tmp_path / "encoder", small_disk / "encoder")
    told = str(disk_trouble(raised.value))
    assert told.startswith(f"{small_disk}/encoder/vocab.txt could not be written: No space left on device")
