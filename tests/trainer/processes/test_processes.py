"""The launcher against real processes: what the user sees, what it returns, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE, until

from minbert.data.errors import UserError
from minbert.data.machine import bf16_units
from minbert.launch.processes import GRACE, _environment, launch
from minbert.slurm.verdict import Error
from minbert.trainer.options import ParallelConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.world import pick_device, require_precision, warn_of_emulation

LAUNCHER = """
import sys
from pathlib import Path
from minbert.launch.processes import launch
folder, processes, grace = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
sys.exit(launch([sys.executable, str(folder / "worker.py")], processes, folder / "logs", grace=grace))
"""

WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from minbert.data.errors import UserError
from minbert.launch.processes import record_errors
RANK, FOLDER = int(os.environ["RANK"]), Path(__file__).parent
def note(name, value=""):
    (FOLDER / f"unfinished-{RANK}").write_text(str(value))
    (FOLDER / f"unfinished-{RANK}").rename(FOLDER / f"{name}-{RANK}")
def wait():
    time.sleep(60)
note("pid", os.getpid())
@record_errors()
def main():
"""

ALL_REDUCE = """
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor(float(RANK))
    dist.all_reduce(total)
    print(f"rank {RANK} has {total.item()} with {os.environ['OMP_NUM_THREADS']} threads")
"""

PART = """
    dist.barrier()
    dist.destroy_process_group()
"""

STOP_AND_SAVE = """
    received = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
    note("ready")
    while not received:
        time.sleep(0.01)
    time.sleep(0.5)
    note("received", received)
    sys.exit(75)
"""

GRANDCHILD = """
    child = subprocess.Popen(["sleep", "60"])
    note("child", child.pid)
"""


class Run:
    """`body`, run in every worker by a launcher: in this process (`here`), or in its own one (`start`, `wait`)."""

    def __init__(self, folder: Path, body: str, processes: int = 2, grace: float = 5.0):
        self.folder, self.processes, self.grace = folder, processes, grace
        folder.mkdir(exist_ok=True)
        (folder / "worker.py").write_text(WORKER + body + "\nmain()\n")

    def here(self, capfd: pytest.CaptureFixture) -> tuple[int, str]:
        command = [sys.executable, str(self.folder / "worker.py")]
        code = launch(command, self.processes, self.folder / "logs", grace=self.grace)
        return code, "".join(capfd.readouterr())

    def start(self, **options) -> "Run":
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        arguments = [sys.executable, "-c", LAUNCHER, str(self.folder), str(self.processes), str(self.grace)]
        self.process = subprocess.Popen(arguments, **options)
        return self

    def wait(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
        return self.process.returncode, output

    def notes(self, name: str) -> list[str]:
        """What every worker wrote under this name, once all have."""
        paths = [self.folder / f"{name}-{rank}" for rank in range(self.processes)]
        until(lambda: all(path.exists() for path in paths), f"{paths}")
        return [path.read_text() for path in paths]

    def pids(self, *names: str) -> list[int]:
        return [int(pid) for name in names for pid in self.notes(name)]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan's zombie is whatever adopted it to reap


def _gone(pids: list[int]) -> None:
    until(lambda: not any(map(_alive, pids)), f"the end of {pids}")


def test_workers_compute_together_and_rank_0_is_seen(tmp_path, capfd):
    code, output = Run(tmp_path, ALL_REDUCE + PART, processes=3).here(capfd)
    assert code == ExitCode.FINISHED
    assert "rank 0 has 3.0 with 1 threads" in output
    assert "rank 1 has" not in output
    assert "rank 1 has 3.0" in (tmp_path / "logs/rank-1.log").read_text()


def test_launches_at_the_same_time_do_not_meet(tmp_path):
    body = ALL_REDUCE + PART
    runs = [Run(tmp_path / n, body.replace("float(RANK)", f"{n}.0")).start() for n in "01"]
    for number, run in enumerate(runs):
        code, output = run.wait()
        assert code == ExitCode.FINISHED
        assert f"rank 0 has {2.0 * number}" in output


def test_an_exception_is_reported_for_the_rank_that_raised_it(tmp_path, capfd):
    body = ALL_REDUCE + '    if RANK == 1: raise ValueError("boom")\n    dist.all_reduce(total)\n'
    run = Run(tmp_path, body, processes=3)
    code, output = run.here(capfd)
    assert code == ExitCode.FAILED
    assert "rank 1 of 3 failed first: exit code 1" in output
    assert "ValueError: boom" in output and "worker.py" in output and "logs/rank-1.log" in output
    assert output.count("Traceback") == 1
    _gone(run.pids("pid"))


def test_a_killed_rank_is_blamed_and_the_others_are_stopped(tmp_path, capfd):
    body = '    if RANK == 1: print("last line"); os.kill(os.getpid(), signal.SIGKILL)\n    wait()'
    run = Run(tmp_path, body, processes=3, grace=0.5)
    code, output = run.here(capfd)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 3 failed first: killed by SIGKILL" in output and "memory" in output
    assert "last line" in output
    assert "then rank 0: stopped" in output
    _gone(run.pids("pid"))


def test_the_cause_is_blamed_before_its_consequences(tmp_path, capfd):
    """Rank 1 vanishes; rank 0 fails of it, with a traceback on file before the launcher looks."""
    body = """
    if RANK == 1: note("gone"); os._exit(7)
    while not (FOLDER / "gone-1").exists(): time.sleep(0.001)
    raise ConnectionError("peer is gone")
"""
    code, output = Run(tmp_path, body).here(capfd)
    assert code == 7
    assert "rank 1 of 2 failed first: exit code 7" in output
    assert "then rank 0: exit code 1" in output


def test_workers_that_hear_no_signal_are_killed_after_a_failure(tmp_path, capfd):
    body = """
    if RANK == 1: sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait()
    note("ended by itself")
"""
    run = Run(tmp_path, body, grace=GRACE)
    code, output = run.here(capfd)
    assert code == 3 and "then rank 0: stopped" in output
    assert not (tmp_path / "ended by itself-0").exists()
    _gone(run.pids("pid"))


def test_a_lost_connection_is_no_cause_even_if_told_long_before_the_death_is_seen(tmp_path, capfd, monkeypatch):
    """Rank 1 is killed amid communication; here its death is noticed much later, as on a machine out of memory."""
    monkeypatch.setattr("minbert.launch.processes.UNSEEN", -60.0)
    body = ALL_REDUCE + "    if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)\n    dist.all_reduce(total)\n"
    code, output = Run(tmp_path, body, processes=2).here(capfd)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 2 failed first: killed by SIGKILL" in output and "memory" in output
    assert "then rank 0: exit code 1" in output and "Traceback" not in output


@pytest.mark.parametrize("told", ["Read error [127.0.0.1]:4711", "Socket closed [::1]:1", "Connection closed by peer"])
def test_what_gloo_says_of_a_peer_that_is_gone_is_known(told):
    assert Error(0, ExitCode.FAILED, f"RuntimeError: {told} GLHF!").lost_peer
    assert not Error(0, ExitCode.USER_MISTAKE, told).lost_peer


SAVE = """
    import torch
    import torch.distributed as dist
    from types import SimpleNamespace
    from minbert.trainer.processes import world as distributed
    from minbert.trainer.checkpoint import saving
    from minbert.trainer.checkpoint.format import Manifest, TrainingState
    from minbert.trainer.options import BudgetConfig, ParallelConfig
    from minbert.trainer.engine.parts import Part
    world = distributed.start(ParallelConfig(device="cpu"))
    part = Part("w", 0, {"weight": torch.zeros(4)}, replicated=True)
    def describe(state):
        return Manifest(state.step, "now", 2, None, state, {}, {}, {}, {}, {"w": [4]}, {})
    holds = SimpleNamespace(parts=lambda: [part], state_dict=dict)
    writer = saving.CheckpointWriter(FOLDER / "checkpoints", holds, holds, world, BudgetConfig(), describe)
    write_hashed = saving.write_hashed
    def slow(*arguments):
        note("writes")
        if RANK == SLOW == 1:
            wait()
        if RANK == SLOW == 0:
            while not (FOLDER / "dies-1").exists(): time.sleep(0.01)
            time.sleep(1.5)
        return write_hashed(*arguments)
    saving.write_hashed = slow
    writer.save(TrainingState(step=7))
    if RANK == 1:
        reported = ["minbert/save/1/1"]
        while not ((FOLDER / "writes-0").exists() and (SLOW or world.messages.store.check(reported))): time.sleep(0.01)
        note("dies")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError:
        writer.abandon()
        raise
"""


@pytest.mark.parametrize("slow", [0, 1])
def test_who_survives_a_killed_rank_finishes_the_checkpoint_if_that_is_possible(tmp_path, capfd, slow):
    """It is, if the killed rank had written its part; otherwise nobody waits for it."""
    code, output = Run(tmp_path, SAVE.replace("SLOW", str(slow)), grace=0.5).here(capfd)
    assert code == 128 + signal.SIGKILL and "rank 1 of 2 failed first: killed by SIGKILL" in output
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-????????")] == ["step-00000007"] * (slow == 0)


@pytest.mark.parametrize("end", ["os.abort()", "wait()"])
def test_what_happens_after_an_error_does_not_hide_it(tmp_path, capfd, end):
    body = f"""
    import atexit
    atexit.register(lambda: {end})
    if RANK == 1: raise ValueError("boom")
    wait()
"""
    code, output = Run(tmp_path, body, grace=0.2).here(capfd)
    assert code == ExitCode.FAILED and "rank 1 of 2 failed first" in output and "ValueError: boom" in output


@pytest.mark.parametrize("condition", ["True", "RANK == 1"])
def test_a_users_mistake_is_told_once_and_plainly(tmp_path, capfd, condition):
    body = f'    if {condition}: raise UserError("no such file: x.csv")\n    wait()'
    code, output = Run(tmp_path, body, grace=0.5).here(capfd)
    assert code == ExitCode.USER_MISTAKE
    assert output.count("no such file: x.csv") == 1
    assert "Traceback" not in output and "failed" not in output


def test_a_full_disk_is_told_with_the_file_and_without_a_traceback(tmp_path, capfd):
    body = """
    from minbert.data.files import naming
    if RANK == 0: wait()
    with naming(Path("/dev/full")), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
"""
    code, output = Run(tmp_path, body, grace=0.2).here(capfd)
    assert code == ExitCode.USER_MISTAKE and "Traceback" not in output
    assert "(rank 1) /dev/full could not be written: No space left on device (the disk at /" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_forwarded_once_and_the_save_awaited(tmp_path, number):
    run = Run(tmp_path, STOP_AND_SAVE, grace=0.1).start()
    run.notes("ready")
    run.process.send_signal(number)
    code, output = run.wait()
    assert code == ExitCode.INTERRUPTED
    assert run.notes("received") == [f"[{number:d}]"] * 2
    assert "failed" not in output


def test_ctrl_c_at_a_terminal_reaches_every_worker_once(tmp_path, terminal):
    outside, inside = terminal
    body = '    print("terminal", sys.stdout.isatty())\n' + STOP_AND_SAVE
    run = Run(tmp_path, body).start(**inside)
    run.notes("ready")
    outside.write(b"\x03")
    assert run.wait()[0] == ExitCode.INTERRUPTED
    assert run.notes("received") == ["[2]"] * 2
    assert b"terminal True" in outside.read(4096)


def test_the_third_request_kills(tmp_path):
    body = """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: note(f"heard {number:d}"))
    note("ready")
    wait()
"""
    run = Run(tmp_path, body).start()
    run.notes("ready")
    for number in (signal.SIGINT, signal.SIGTERM):
        run.process.send_signal(number)
        run.notes(f"heard {number:d}")
    run.process.send_signal(signal.SIGINT)
    code, output = run.wait()
    assert code == ExitCode.LEFT_AT_ONCE and "failed" not in output
    _gone(run.pids("pid"))


def test_a_request_before_the_workers_are_ready_is_no_failure(tmp_path):
    run = Run(tmp_path, "    note('ready')\n    wait()").start()
    run.notes("ready")
    run.process.send_signal(signal.SIGUSR2)
    assert run.wait() == (ExitCode.LEFT_AT_ONCE, "")


@pytest.mark.parametrize("end", ["    return", "    raise ValueError"])
def test_no_grandchild_outlives_its_worker(tmp_path, capfd, end):
    run = Run(tmp_path, GRANDCHILD + end)
    run.here(capfd)
    _gone(run.pids("pid", "child"))


def test_a_killed_launcher_takes_everything_along(tmp_path):
    run = Run(tmp_path, GRANDCHILD + "    wait()").start()
    pids = run.pids("pid", "child")
    assert all(map(_alive, pids))
    run.process.kill()
    run.process.wait()
    _gone(pids)


def test_environment_and_logs(tmp_path, monkeypatch):
    """The environment wins over defaults; logs are appended, old errors removed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "rank-1.log").write_text("earlier\n")
    (tmp_path / "rank-1.error").write_text("earlier")
    names = "OMP_NUM_THREADS RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    command = [sys.executable, "-c", f"import os; print(*[os.environ[n] for n in '{names}'.split()])"]
    assert launch(command, 2, tmp_path) == ExitCode.FINISHED
    assert (tmp_path / "rank-1.log").read_text() == "earlier\n7 1 1 2 2 127.0.0.1\n"
    assert not (tmp_path / "rank-1.error").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_gloo_takes_the_loopback_beside_nccl_too(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for has_gpus in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpus=has_gpus: has_gpus)
        assert _environment(1, 1234)["GLOO_SOCKET_IFNAME"] == "lo"
        with monkeypatch.context() as patch:
            patch.setenv("GLOO_SOCKET_IFNAME", "ib0")
            assert _environment(1, 1234)["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("given", ["0,1", "GPU-6c1b", "", "-1", "NoDevFiles"])
def test_gpus_that_pytorch_does_not_see_are_not_forgone_in_silence(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    if given in ("", "-1", "NoDevFiles"):
        assert pick_device(ParallelConfig()).type == "cpu"
    else:
        with pytest.raises(UserError, match=f"(?s)CUDA_VISIBLE_DEVICES={given}.*device=cpu does without"):
            pick_device(ParallelConfig())
    assert pick_device(ParallelConfig(device="cpu")).type == "cpu"


@pytest.mark.parametrize(("capability", "name"), [(None, "the CPU"), ((7, 5), "Tesla T4"), ((9, 0), None)])
def test_tf32_needs_a_gpu_that_has_it(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    require_precision(ParallelConfig(precision="fp32"))
    if name is None:
        require_precision(ParallelConfig(precision="tf32"))
    for device in ["cpu", "auto"] if name else ["cpu"]:
        found = name if device == "auto" else "the CPU"
        with pytest.raises(UserError, match=f"(?s)capability 8.0.*would run on {found}.*fp32 runs everywhere"):
            require_precision(ParallelConfig(precision="tf32", device=device))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_processor_without_bf16_is_told_of(precision, caplog):
    warn_of_emulation(ParallelConfig(precision=precision), torch.device("cpu"))
    assert ("emulates it" in caplog.text) == (precision == "bf16" and bf16_units() is None)
    caplog.clear()
    warn_of_emulation(ParallelConfig(precision=precision), torch.device("cuda"))
    assert not caplog.text


def test_deterministic_kernels_are_asked_for():
    """In a process of its own, as the choice is for the whole process."""
    program = """
import os, torch
from minbert.trainer.processes import world as distributed
from minbert.trainer.options import ParallelConfig
for flag in (False, True):
    distributed.start(ParallelConfig(deterministic=flag))
    print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert said.stdout.splitlines() == ["False None", "True :4096:8"]


def test_the_cores_are_shared_out(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    assert launch(command, 2, tmp_path) == ExitCode.FINISHED
    assert capfd.readouterr().out == f"{max(1, len(os.sched_getaffinity(0)) // 2)}\n"


def test_fewer_than_one_process_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        launch(["true"], 0, tmp_path)
