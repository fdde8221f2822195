"""Runs that go on elsewhere: on other numbers of processes, at other ZeRO stages, from DeepSpeed's own checkpoints; and
runs whose processes are asked to stop, in whatever way."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CORPUS, await_step, logged, minbert, started, tensors_of
from waiting import PATIENCE

from minbert.launch.options import parse_run_config
from minbert.launch.processes import launch
from minbert.trainer import train as training
from minbert.trainer.checkpoint.format import published, read_manifest, remember, verify
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare

WORKER = Path(__file__).parents[2] / "support" / "deepspeed_worker.py"
SHARED = ("layer 0", "layer 1")  # with the embeddings frozen
SMALL = ["--data", CORPUS, "--train-limit", 120, "--eval-limit", 40, "--batch-size", 8, "--log-every", 1, "--trackers"]


# Elastic resume


def test_one_two_four_processes_and_every_kind_of_engine_within_one_run(tmp_path, capfd):
    """1 process -> 2 at stage 0 -> 4 at stage 3 -> 2 at stage 2 -> 2 without DeepSpeed: no example is trained twice or
    left out, the learning rate does not shift, moments and PCGrad's order carry over. Float tolerance, as sums are made
    of other parts."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    still = ["--encoder-dropout", 0, "--head-dropout", 0, "--freeze", "embeddings", "--aggregator", "pcgrad"]
    still += ["--average-decay", 0.8]  # the average carries over, too, and is what the scores are of
    arguments = [*SMALL, *still, "--steps", 15, "--eval-every", 9, "--save-every", 3]
    assert minbert("train", "--run", whole, *arguments) == 0
    assert minbert("train", "--run", moved, *arguments, "--keep", "9") == 0
    said = []
    for turn, (processes, stage) in enumerate([(2, 0), (4, 3), (2, 2), (2, None)]):
        stop_before(moved, 3 + 3 * turn)
        capfd.readouterr()
        assert minbert("resume", moved, "--processes", processes, "--zero-stage", stage) == 0
        said.append("".join(capfd.readouterr()))
        assert f"from step {3 + 3 * turn} of 15" in said[-1]
        written = read_manifest(published(moved / "checkpoints")[-1])
        assert (written.processes, written.zero_stage) == (processes, stage)
    assert all(text.count("dropout's random numbers do not carry over") == 1 for text in said[:3])
    assert "do not carry over" not in said[3]
    for expected, found in zip(logged(whole), logged(moved), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected, found = (tensors_of(published(run / "checkpoints")[-1]) for run in (whole, moved))
    assert found.keys() == expected.keys() and "average/bert.layers.1.attention.qkv.weight" in found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def test_heads_go_on_with_their_own_numbers_of_updates(tmp_path, capfd):
    """One task a step: AdamW's bias correction counts the steps of each head, elsewhere too."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    still = ["--encoder-dropout", 0, "--head-dropout", 0, "--freeze", "embeddings", "--task-schedule", "round_robin"]
    arguments = [*SMALL, *still, "--steps", 8, "--eval-every", 8, "--save-every", 4]
    assert minbert("train", "--run", whole, *arguments) == 0
    shutil.copytree(whole, moved)
    stop_before(moved, 4)
    assert minbert("resume", moved, "--processes", 2, "--zero-stage", 3) == 0
    assert "from step 4 of 8" in capfd.readouterr().out
    for run in (whole, moved):
        counts = [read_manifest(path).state.updates for path in published(run / "checkpoints")]
        assert counts == [
            dict.fromkeys(SHARED, 4) | {"heads.sst": 2, "heads.quora": 1, "heads.sts": 1},
            dict.fromkeys(SHARED, 8) | {"heads.sst": 3, "heads.quora": 3, "heads.sts": 2},
        ]
    expected, found = (tensors_of(published(run / "checkpoints")[-1]) for run in (whole, moved))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def stop_before(run: Path, step: int) -> None:
    """Take the run back to the checkpoint of `step`, as if it had been killed after it."""
    for path in published(run / "checkpoints"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    remember(run / "checkpoints", step)


def test_an_evaluation_elsewhere_leaves_a_checkpoint_what_it_was(tmp_path, monkeypatch, capfd):
    """Stopped after a step and before its evaluation, which two other processes make up for: the tensors of the
    checkpoint, and the random numbers in it, are still those of one process."""
    run = tmp_path / "run"
    original = training.Training._train_one_step

    def one_step(self) -> None:
        original(self)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_train_one_step", one_step)
        assert minbert("train", "--run", run, *SMALL, "--steps", 3, "--eval-every", 3) == ExitCode.INTERRUPTED
    before = read_manifest(published(run / "checkpoints")[-1])
    assert minbert("resume", run, "--processes", 2) == 0
    after = read_manifest(published(run / "checkpoints")[-1])
    assert (before.step, before.state.evaluated_at, before.processes) == (3, 0, 1)
    assert (after.step, after.state.evaluated_at, after.processes, after.files) == (3, 3, 1, before.files)
    capfd.readouterr()
    assert minbert("resume", run, "--steps", 4) == 0
    assert "from step 3 of 4" in capfd.readouterr().out


# DeepSpeed's checkpoints


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory) -> Path:
    """What DeepSpeed saved at stages 0 to 3 with two processes, and beside it what the engines held."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run = prepare(parse_run_config([*map(str, SMALL), "--freeze", "1", "--run", str(folder / "run")]))
    assert launch([sys.executable, str(WORKER), str(run.path), "3", str(folder)], 2, run.logs) == 0
    return folder


@pytest.mark.parametrize("source", ["stage-0", "stage-1", "stage-2", "stage-3", "universal-2", "universal-3"])
def test_what_deepspeed_saved_becomes_a_checkpoint(deepspeed, tmp_path, capsys, source):
    """Bit by bit, and training goes on from it."""
    kind, _, stage = source.partition("-")
    folder = deepspeed / f"stage-{stage}" / "deepspeed"
    if kind == "universal":
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        folders = ["--input_folder", str(folder / "global_step3"), "--output_folder", str(tmp_path / "universal")]
        subprocess.run([*convert, *workers, *folders], check=True, capture_output=True, timeout=PATIENCE)
        folder = tmp_path / "universal"
    run = tmp_path / "run"
    assert minbert("checkpoint", "convert", folder, run, *SMALL, "--freeze", 1) == 0
    checkpoint = published(run / "checkpoints")[0]
    manifest = read_manifest(checkpoint)
    assert verify(checkpoint, manifest) == [] and (manifest.step, manifest.state.updates) == (
        3,
        dict.fromkeys(["layer 1", "heads.sst", "heads.quora", "heads.sts"], 3),
    )
    expected, found = tensors_of(deepspeed / f"stage-{stage}"), tensors_of(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if source == "stage-3":
        assert minbert("resume", run, "--steps", 5) == 0
        assert "from step 3 of 5" in capsys.readouterr().out
        assert minbert("checkpoint", "convert", run, tmp_path / "model.safetensors") == 0
        weights = load_file(tmp_path / "model.safetensors")
        last = tensors_of(published(run / "checkpoints")[-1])
        assert all(torch.equal(tensor.flatten(), last[f"weight/{name}"]) for name, tensor in weights.items())
        assert minbert("checkpoint", "convert", folder, run) == ExitCode.USER_MISTAKE  # it has some already


class Evil:
    def __reduce__(self):
        return os.system, ("echo run",)


def test_a_pickle_that_could_run_code_is_not_read(deepspeed, tmp_path, capfd):
    source = tmp_path / "source"
    source.mkdir()
    states = deepspeed / "stage-1" / "deepspeed" / "global_step3" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(states, weights_only=True) | {"extra": Evil()}, source / states.name)
    assert minbert("checkpoint", "convert", source, tmp_path / "run", *SMALL) == ExitCode.USER_MISTAKE
    said = capfd.readouterr()
    assert "posix.system that could run code when loaded; it is not read" in said.err and said.out.count("run\n") == 0


def test_a_checkpoint_of_another_model_is_refused(deepspeed, tmp_path, capsys):
    source = deepspeed / "stage-2" / "deepspeed"
    assert minbert("checkpoint", "convert", source, tmp_path / "run", *SMALL, "--features", "baseline") == 2
    said = capsys.readouterr().err
    assert "is not a checkpoint of this run's model" in said and "values of weight in the checkpoint" in said


# Signals


def launched(run: Path, *arguments: object, **options: object) -> subprocess.Popen:
    """`options`: of Popen, in place of the pipe that takes what the run says."""
    options = options or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return started("train", "--run", run, *SMALL, *arguments, **options)


def one_process_per_task(run: Path, size: int) -> list[subprocess.Popen]:
    """The workers alone, as `srun` starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minbert.launch.worker", str(run)],
            env=os.environ | {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]


def test_a_signal_to_the_launcher_saves_on_all_processes(tmp_path):
    """The one that batch systems send; SIGTERM is among the kinds of `test_chaos`."""
    run = tmp_path / "run"
    process = launched(run, "--processes", 2, "--steps", 5000, "--eval-every", 5000)
    await_step(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == ExitCode.INTERRUPTED, said
    last = RunFolder(run).read_metrics()[-1]["step"]
    assert read_manifest(published(run / "checkpoints")[-1]).step == last  # not one step is lost


@pytest.mark.parametrize("processes", [1, 2])
def test_a_lost_terminal_saves_on_all_processes(tmp_path, terminal, processes):
    """As when the connection to the machine breaks; the run's own output then goes nowhere."""
    run, (outside, inside) = tmp_path / "run", terminal
    process = launched(run, "--processes", processes, "--steps", 5000, "--eval-every", 5000, **inside)

    def read() -> None:  # a terminal that nobody reads would hold the run up
        if select.select([outside], [], [], 0.05)[0]:
            outside.read(4096)

    await_step(run, 2, process, read)
    outside.close()
    assert process.wait(timeout=PATIENCE) == ExitCode.INTERRUPTED
    last = RunFolder(run).read_metrics()[-1]["step"]
    assert read_manifest(published(run / "checkpoints")[-1]).step == last


def test_under_nohup_the_end_of_the_terminal_is_nothing():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_with_one_process_per_task_a_signal_to_one_stops_all(tmp_path):
    """The others learn of it at the next step, and all leave with the code that asks to be started again."""
    run = prepare(parse_run_config([*map(str, SMALL), "--steps", "5000", "--run", str(tmp_path / "run")]))
    workers = one_process_per_task(run.path, 2)
    await_step(run.path, 2, workers[0])
    workers[1].send_signal(signal.SIGUSR2)
    assert [worker.wait(timeout=PATIENCE) for worker in workers] == [ExitCode.INTERRUPTED] * 2
    assert read_manifest(published(run.checkpoints)[-1]).step == run.read_metrics()[-1]["step"]


def test_a_second_signal_leaves_at_once_and_what_was_saved_stays(tmp_path):
    run = tmp_path / "run"
    process = launched(run, "--steps", 5000, "--save-every", 5, "--eval-every", 6, "--eval-limit", 5000)
    await_step(run, 5, process)
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    assert process.returncode in (ExitCode.LEFT_AT_ONCE, ExitCode.INTERRUPTED)  # the first may have been enough
    newest = published(run / "checkpoints")[-1]
    assert verify(newest, read_manifest(newest)) == []


def test_a_stop_in_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch):
    """What it had scored is scored again, and the run ends as it would have."""
    arguments = [*SMALL, "--steps", 4, "--eval-every", 2]
    assert minbert("train", "--run", tmp_path / "whole", *arguments) == 0
    original = training.evaluate

    def evaluate(*given, stop):
        monkeypatch.setattr(training, "evaluate", original)
        os.kill(os.getpid(), signal.SIGTERM)
        result = original(*given, stop=stop)
        assert result is None
        return result

    monkeypatch.setattr(training, "evaluate", evaluate)
    run = tmp_path / "run"
    assert minbert("train", "--run", run, *arguments) == ExitCode.INTERRUPTED
    assert read_manifest(published(run / "checkpoints")[-1]).state.evaluated_at == 0
    assert minbert("resume", run) == 0
    assert logged(run) == logged(tmp_path / "whole")
