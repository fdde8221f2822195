"""Steps that do not fit into memory: runs go on in smaller parts, and say so; what cannot be cut is told.

The processes may have so much memory and no more: it really runs out.
"""

import json
import resource
import weakref
from dataclasses import replace

import pytest
import torch
from small_runs import CORPUS, logged, minbert, outside
from waiting import until

from minbert.data.errors import OutOfMemory, UserError
from minbert.launch.options import build_run_config
from minbert.launch.processes import record_errors
from minbert.slurm.endings import Ending
from minbert.slurm.records import Records
from minbert.slurm.status import inspect_runs
from minbert.trainer.model.bert import Bert
from minbert.trainer.model.weights import read_config, save_checkpoint
from minbert.trainer.options import ParallelConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.world import start as start_world
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.out_of_memory import as_cut, cut_further, telling
from minbert.trainer.run.preparation import prepare

ENOUGH = 1 << 30  # bytes: for a process and two hundred examples of each task at a time, not for six hundred
MANY = 640
LARGE = ["--data", CORPUS, "--steps", 1, "--log-every", 1, "--eval-limit", 20, "--trackers", "--batch-size"]


def limited(*words: object, code: int = 0):
    """A command whose processes may have so much memory each."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (ENOUGH, ENOUGH))

    return outside(*words, code=code, preexec_fn=limit)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_does_not_fit_goes_on_in_smaller_parts(processes, tmp_path, monkeypatch):
    """It ends as one that had them from the start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, other = tmp_path / "run", tmp_path / "other"
    done = limited("train", "--run", run, *LARGE, MANY * processes, "--processes", processes)
    assert "Traceback" not in done.stdout + done.stderr
    parts = RunFolder(run).read_config().batch.accumulation
    assert parts > 1 and f"Going on with accumulation={parts}" in done.stdout
    assert "does not fit into the memory of the process" in done.stdout + done.stderr
    same = [*LARGE, MANY * processes, "--processes", processes, "--accumulation", parts]
    assert minbert("train", "--run", other, *same) == 0
    assert logged(run) == logged(other)


def test_trials_that_do_not_fit_go_on_in_smaller_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--ablation", tmp_path / "ablation", *LARGE, MANY, "--groups", "alone", "--extensions", "unfrozen"]
    limited("ablate", *words)
    trial = tmp_path / "ablation" / "runs" / "unfrozen" / "seed-0"
    assert RunFolder(trial).read_config().batch.accumulation > 1
    assert json.loads((trial / "trial.json").read_text())["status"] == "finished"


def test_a_local_job_that_does_not_fit_goes_on_in_smaller_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    limited("submit", "--run", run, *LARGE, MANY, "--executor", "local")
    until(lambda: not inspect_runs([run])[0].active, "the job's end", seen=lambda: inspect_runs([run]), pause=0.2)
    assert inspect_runs([run])[0].state == Ending.FINISHED
    assert RunFolder(run).read_config().batch.accumulation > 1
    assert {attempt.ending for attempt in Records(run).attempts()[:-1]} == {Ending.OUT_OF_MEMORY}


def test_what_cannot_be_cut_is_told(tmp_path, monkeypatch):
    """The correlation of a whole batch is not that of its parts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    done = limited("train", "--run", run, *LARGE, MANY, "--losses", "sts=pearson", code=ExitCode.USER_MISTAKE)
    assert "step 1 does not fit into the memory of the process" in done.stderr
    assert "compares all examples of a batch" in done.stderr and "Traceback" not in done.stderr
    assert RunFolder(run).read_config().batch.accumulation == 1


def test_parts_have_an_example_for_every_process(tmp_path):
    assert minbert("train", "--run", tmp_path / "run", "--data", CORPUS, "--batch-size", 8, "--steps", 1) == 0
    run = RunFolder(tmp_path / "run")
    assert [cut_further(run, 2), cut_further(run, 2)] == [2, 4]
    with pytest.raises(UserError, match="batch_size=8 on 2 processes cannot be cut into 8 parts"):
        cut_further(run, 2)
    assert run.read_config().batch.accumulation == 4


def test_a_run_that_was_cut_stays_so_when_its_trial_is_tried_again(tmp_path):
    folder = tmp_path / "run"
    assert minbert("train", "--run", folder, "--data", CORPUS, "--batch-size", 8, "--steps", 1) == 0
    asked = build_run_config({"run": folder, "batch_size": 8})
    assert as_cut(asked) == asked
    cut_further(RunFolder(folder), 1)
    assert as_cut(asked).batch.accumulation == 2
    assert as_cut(build_run_config({"run": folder, "accumulation": 4})).batch.accumulation == 4
    smaller = build_run_config({"run": folder, "batch_size": 2, "accumulation": 1})
    assert as_cut(smaller) == smaller  # which may fit, and cannot have as many parts


def test_scores_that_do_not_fit_are_made_in_smaller_batches(tmp_path, monkeypatch):
    """Of an encoder so wide that half of a batch of the dev rows would be more than a process may have."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wide, run = tmp_path / "wide", tmp_path / "run"
    small = prepare(build_run_config({"data": CORPUS, "run": tmp_path / "small"})).encoder
    shape = replace(read_config(small), hidden_size=16, num_hidden_layers=1, intermediate_size=1 << 18)
    save_checkpoint(wide, shape, Bert(shape).state_dict(), small)
    small_run = ["--data", CORPUS, "--tasks", "sst", "--steps", 1, "--trackers", "--batch-size", 2]
    assert minbert("train", "--run", run, "--model", wide, *small_run) == 0
    whole, parts = outside("evaluate", run, "--json"), limited("evaluate", run, "--json")
    assert json.loads(parts.stdout) == pytest.approx(json.loads(whole.stdout), abs=1e-6)


def test_other_memory_that_does_not_suffice_is_told_without_a_traceback(capsys):
    """A model that the process has no room for."""
    with pytest.raises(SystemExit) as left, record_errors():
        torch.empty(1 << 60)
    assert left.value.code == ExitCode.USER_MISTAKE
    assert capsys.readouterr().err.startswith("minbert: memory does not suffice: DefaultCPUAllocator")


def test_what_filled_the_memory_is_given_back_before_it_is_told():
    """Whoever tells of it, and cuts the batches, needs some: the error itself would keep the step's tensors."""
    kept: list[weakref.ref] = []

    def step() -> None:
        activations = torch.zeros(8)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(OutOfMemory) as told, telling(3, start_world(ParallelConfig(device="cpu"))):
        step()
    assert told.value.__context__ is not None and kept[0]() is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "CUDA out of memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("NCCL error in: x.cpp:1, Cuda failure 2 'out of memory'"), "Cuda failure 2 'out of memory'"),
        (MemoryError(), "no memory is left"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_who_is_told_of_memory(error, told, capsys):
    with pytest.raises(SystemExit) as left, record_errors(), telling(3, start_world(ParallelConfig(device="cpu"))):
        raise error
    said = capsys.readouterr().err
    if told is None:
        assert left.value.code == ExitCode.FAILED and "Traceback" in said
    else:
        assert left.value.code == ExitCode.OUT_OF_MEMORY
        assert said.startswith("minbert: step 3 does not fit") and told in said
