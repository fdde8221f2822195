"""What SLURM gives a job, what its batch script says of what it refuses, and the code that the job runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_records import ALLOCATION

from minbert.data.errors import UserError
from minbert.slurm.allocation import Allocation, expand_counts
from minbert.slurm.batch_script import watched
from minbert.slurm.check import Node, mismatches
from minbert.slurm.controller import without_job
from minbert.slurm.settings import JobSettings
from minbert.slurm.snapshot import take_snapshot
from minbert.slurm.submission import is_refusal


def test_an_allocation_from_slurms_variables(monkeypatch):
    variables = {"JOB_ID": "12", "ARRAY_JOB_ID": "9", "ARRAY_TASK_ID": "3", "JOB_NODELIST": "gpu[01-02,7],login"}
    variables |= {"TASKS_PER_NODE": "2(x3),1", "NODEID": "1", "PROCID": "3", "LOCALID": "1", "RESTART_COUNT": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = Allocation.current()
    assert found == Allocation("9_3", 2, ("gpu01", "gpu02", "gpu7", "login"), (2, 2, 2, 1), 1, 3, 1)
    assert found.head == "gpu01" and found.workers == ("gpu02", "gpu7", "login") and found.host == "gpu02"
    assert found.tasks == 7 and [found.host_of(rank) for rank in (0, 1, 2, 6)] == ["gpu01", "gpu01", "gpu02", "login"]


def test_there_is_no_allocation_here(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="this is no SLURM job"):
        Allocation.current()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5))
def test_counts(parts):
    text = ",".join(f"{n}(x{times})" if times > 1 else str(n) for n, times in parts)
    assert expand_counts(text) == tuple(n for n, times in parts for _ in range(times))


def test_mismatches():
    settings = JobSettings(nodes=2, gpus_per_node=2)
    nodes = [Node("n1", "secret", True, 2), Node("n2", "", False, 1)]
    found = mismatches(nodes, "secret", Path("/run"), Path("/code"), ALLOCATION, settings)
    assert len(found) == 2 and "SLURM starts 3: 2 on n1, 1 on n2" in found[0]
    assert found[1].startswith("n2 does not see the run folder /run as n1 does")
    crowded = replace(ALLOCATION, tasks_per_host=(2, 2))
    nodes = [Node("n1", "secret", True, 2), Node("n2", "secret", True, 1)]
    (problem,) = mismatches(nodes, "secret", Path("/run"), Path("/code"), crowded, settings)
    assert problem.startswith("n2 has 1 GPU(s) for 2 processes: ask for tasks_per_node=1")
    assert mismatches(nodes[:1], "secret", Path("/run"), Path("/code"), crowded, settings) == ["no answer from n2"]


def test_a_job_submitted_from_a_job_inherits_nothing_of_it():
    environment = {"SLURM_JOB_ID": "1", "SLURM_CONF": "c", "SBATCH_ACCOUNT": "a", "SUBMITIT_EXECUTOR": "x", "HOME": "h"}
    environment |= {"SQUEUE_PARTITION": "p", "SQUEUE_FORMAT": "%i", "SACCT_FORMAT": "JobID", "SINFO_PARTITION": "p"}
    environment |= {"SLURM_TIME_FORMAT": "relative", "SCANCEL_STATE": "PENDING", "SLURM_CLUSTERS": "c2"}
    kept = {"SLURM_CONF": "c", "SLURM_JWT": "t", "HOME": "h"}
    assert without_job(environment | kept) == kept


@pytest.mark.parametrize(
    ("complaint", "refused"),
    [
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid", True),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", True),
        ("sbatch: fatal: Could not establish a configuration source", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", False),
        ('Could not make sense of sbatch output ""', False),
        ("", False),  # sbatch was killed
    ],
)
def test_what_sbatch_says_is_a_refusal_or_no_answer(complaint, refused):
    assert is_refusal(complaint) is refused


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["true", "no_such_command x"], "127 no_such_command x"),
        (["exit 3"], "3 exit 3"),
        (["exit 0"], "0 exit 0"),
        (["if true; then", "false", "fi"], "1 false"),
        (["set -e", "false"], "1 false"),
        (["false | true", "false || true", "if false; then :; fi", "! true", ". ./file"], "whole"),
        (["f() { false; true; }", "f", "x=$(false; true)"], "whole"),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_script(lines, said, tmp_path):
    (tmp_path / "file").write_text("false\ntrue\n")
    script = "\n".join([*watched(lines, "echo"), "echo whole"])
    (tmp_path / "script").write_text(script)
    done = subprocess.run(["bash", "script"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{said}\n"


# Snapshots


def test_a_snapshot_comes_before_the_installed_code(tmp_path):
    snapshot = take_snapshot(tmp_path)
    assert take_snapshot(tmp_path) == snapshot and [path.name for path in tmp_path.iterdir()] == [snapshot.name]
    names = "minbert", "minbert.slurm.status", "minbert.launch.job", "minbert.data.files"
    code = f"import sys, {', '.join(names)}; print(*(sys.modules[name].__file__ for name in {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(snapshot)},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert all(path.startswith(str(snapshot)) for path in done.stdout.split())
