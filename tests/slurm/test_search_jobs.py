"""Searches as jobs of a real SLURM: requeued, cancelled, and gone on with here."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from searches import command, finish, small_search, trials_of
from waiting import until

from minbert.launch.main import main
from minbert.slurm.status import inspect_runs

pytestmark = pytest.mark.xdist_group("slurm")


@pytest.fixture
def slurm(devcluster, monkeypatch):
    """Everything here talks to the development cluster."""
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return devcluster


def eventually(folder: Path, reached: Callable[[], bool]) -> None:
    until(reached, f"the search in {folder}", seen=lambda: _output(folder), pause=0.5)


def test_a_search_on_two_nodes_is_requeued_and_goes_on(slurm, tmp_path, capsys):
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "4", "--epochs", "10", "--concurrent", "2")
    words += ["--slurm", "--nodes", "2", "--cpus-per-task", "1", "--cpus", "1", "--time", "30"]
    finish(words)
    eventually(folder, lambda: any(trial.step and not trial.over for trial in trials_of(folder)))
    report = inspect_runs([folder])[0]
    assert report.nodes == "n[1-2]"
    slurm.run("scontrol", "requeue", report.job_id)
    eventually(folder, lambda: inspect_runs([folder])[0].state == "pending")
    slurm.run("scontrol", "update", f"jobid={report.job_id}", "starttime=now")
    eventually(folder, lambda: inspect_runs([folder])[0].finished)
    assert "Ray runs on n1, n2: 2 cores" in _output(folder)
    capsys.readouterr()
    assert main(["jobs", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f" {report.job_id}" in shown
    assert shown.count("trial-000") == 4
    assert main(["logs", str(folder)]) == 0
    assert "4 of 4" in capsys.readouterr().out or "[4/4]" in _output(folder)
    assert all(trial.status in ("finished", "stopped") for trial in trials_of(folder))
    assert len(trials_of(folder)) == 4
    assert (folder / "best.yaml").exists()


def test_a_search_is_cancelled_and_goes_on_here(slurm, tmp_path, capsys):
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "2", "--epochs", "10", "--scheduler", "none")
    finish([*words, "--slurm", "--cpus-per-task", "1", "--time", "30"])
    eventually(folder, lambda: any(trial.step for trial in trials_of(folder)))
    assert main(["tune", "--search", str(folder), "--slurm"]) == 2
    assert "has a job already" in capsys.readouterr().err
    assert main(["cancel", str(folder)]) == 0
    eventually(folder, lambda: inspect_runs([folder])[0].state == "cancelled")  # after "ending"
    assert main(["jobs", str(folder)]) and "cancelled" in capsys.readouterr().out
    eventually(folder, lambda: not _is_locked(folder))  # for SLURM the job is over before its processes are
    assert "go on from their checkpoints" in finish(command(folder))
    assert [trial.status for trial in trials_of(folder)] == ["finished"] * 2


def _is_locked(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in (folder / "slurm").glob("*_log.out")) + os.linesep
