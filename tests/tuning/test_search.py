"""Trials, searches that are killed and go on, and what they do with mistakes."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from filelock import FileLock, Timeout
from ray.tune.schedulers import TrialScheduler

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.slurm.status import inspect_runs
from minbert.trainer.checkpoint.format import published
from minbert.trainer.config import ParallelConfig, RunConfig
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder, read_config_file
from minbert.tuning.background import line_on_disk
from minbert.tuning.cluster import _base, _family
from minbert.tuning.proposals import TpeProposals
from minbert.tuning.room import limits_of
from minbert.tuning.scheduler import REACHED, WORST, RememberingASHA
from minbert.tuning.search import Resources, Search
from minbert.tuning.space import (
    check_space,
    parse_space,
)
from minbert.tuning.trainable import TrialWorker
from minbert.tuning.trial import METRIC, Trial, best, better, ranked, read_trials, score_of

TINY = ["--train-limit", "60", "--eval-limit", "20", "--batch-size", "8", "--trackers"]
TOKEN = "0123456789abcdef" * 4
ray = pytest.mark.xdist_group("ray")  # two clusters of Ray at once would starve each other


# Trials


def test_a_trial_file_survives_writing_and_reading(tmp_path):
    trial = Trial(tmp_path / "t", "t", 3, {"lr": 1e-4}, "stopped", score=0.5, step=10, steps=40, stopped_by="asha")
    trial.write()
    assert Trial.read(tmp_path / "t") == trial
    assert read_trials(tmp_path) == [trial]


def test_the_best_trial_has_a_score_and_did_not_fail(tmp_path):
    scores = [None, 0.4, 0.6, 0.6, 0.9]
    trials = [Trial(tmp_path, f"t{n}", n, {}, "finished", score=score) for n, score in enumerate(scores)]
    trials[4].status = "failed"
    assert best(trials).number == 2
    assert best(trials[:1]) is None


def scored(folder: Path, number: int, scores: list[float], status: str = "finished") -> Trial:
    """A trial with these evaluations; NaN is what none of our own writes any more."""
    trial = Trial(folder / f"t{number}", f"t{number}", number, {"lr": 10.0 ** -(number + 1)}, status)
    trial.step = trial.steps = len(scores)
    trial.score = max((score for score in scores if score == score), default=math.nan)
    trial.write()
    lines = [json.dumps({"step": step, "dev/overall": score}) for step, score in enumerate(scores, 1)]
    (trial.folder / "metrics.jsonl").write_text("\n".join(lines))
    return Trial.read(trial.folder)


def test_a_score_that_is_no_number_ranks_last_everywhere(tmp_path):
    pytest.importorskip("optuna")
    trials = [scored(tmp_path, n, scores) for n, scores in enumerate([[math.nan], [0.2, math.nan], [0.1, 0.3]])]
    assert [trial.name for trial in ranked(trials)] == ["t2", "t1"]
    assert trials[0].score is None and "NaN" not in json.dumps([trial.score for trial in trials])
    assert [len(trial.evaluations()) for trial in trials] == [0, 1, 2]
    assert better(None, score_of({"dev/overall": math.nan})) is None

    search = Search(samples=10, space=check_space(parse_space(["lr=loguniform(1e-5,1)"])), algorithm="tpe")
    study = TpeProposals(search, trials, [], lambda trial: {}, partial(search.new_trial, tmp_path)).study
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert study.best_value == 0.3


def test_asha_judges_by_the_best_score_so_far_as_the_ranking_does(tmp_path):
    earlier = [scored(tmp_path, n, [score] * 10) for n, score in enumerate([0.5, 0.6, 0.7])]
    asha = RememberingASHA(0.1, 3.0, [*earlier, scored(tmp_path, 3, [math.nan] * 10)])
    asked = SimpleNamespace(config={"name": "new"})

    def decide(name: str, reached: float) -> str:
        asked.config["name"] = name
        asha.on_trial_add(None, asked)
        return asha.on_trial_result(None, asked, {"progress": 0.1, METRIC: 0.0, REACHED: reached})

    assert decide("fell back, and is among the best", 0.9) == TrialScheduler.CONTINUE
    assert decide("never was", 0.1) == TrialScheduler.STOP
    assert decide("has no number", WORST) == TrialScheduler.STOP


def test_a_worker_tells_scores_that_are_no_number_and_a_full_disk_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    trial = Trial(tmp_path / "trial", "trial", 0, {})
    trial.write()

    def train(config: RunConfig, stop: StopRequest, begin: Callable[[int], None]) -> tuple[int, str]:
        begin(4)
        run = RunFolder(config.run)
        for step, score in ((1, math.nan), (2, None), (3, 0.5), (4, 0.25)):
            run.append_metrics({"step": step, METRIC: score})
        return 1, "Traceback ...\nOSError: [Errno 28] No space left on device"

    class Worker(TrialWorker):
        def setup(self, config: dict) -> None:
            super().setup(config, train)

    config = {"folder": str(trial.folder), "options": {}, "taken_over": [], "gpus": 0}
    worker = Worker(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # nobody set a GPU aside
    results = []
    while not results or "ending" not in results[-1]:
        results.append(worker.step())
    told = [(result["at"], result[METRIC], result["best"], result[REACHED]) for result in results if METRIC in result]
    assert told == [(1, None, None, WORST), (2, None, None, WORST), (3, 0.5, 0.5, 0.5), (4, 0.25, 0.5, 0.5)]
    assert results[-1]["ending"] == "no room"
    worker.stop()


# What a trial takes


@pytest.mark.parametrize(
    ("resources", "parallel", "nodes", "limits"),
    [
        ({}, {}, [{"CPU": 4}], {"cpu": 1}),
        ({}, {"processes": 2}, [{"CPU": 4}, {"CPU": 4, "GPU": 2}], {"cpu": 2, "gpu": 2}),
        ({}, {"device": "cpu"}, [{"CPU": 4, "GPU": 2}], {"cpu": 1}),
        ({"gpus": 0}, {}, [{"CPU": 4, "GPU": 2}], {"cpu": 1}),
        ({"gpus": 0.5, "cpus": 2}, {}, [{"CPU": 4, "GPU": 2}], {"cpu": 2, "gpu": 0.5}),
        ({"gpus": 0.5}, {"processes": 2}, [{"CPU": 4, "GPU": 2}], "part of a GPU"),
        ({"gpus": 0}, {"device": "cuda"}, [{"CPU": 4, "GPU": 2}], "--gpus 0"),
        ({}, {"device": "cuda"}, [{"CPU": 4}], "nodes have none"),
    ],
)
def test_a_gpu_is_used_where_there_is_one(resources, parallel, nodes, limits):
    asked = (Resources(**resources), ParallelConfig(**parallel), nodes)
    if isinstance(limits, str):
        with pytest.raises(UserError, match=limits):
            limits_of(*asked)
    else:
        assert limits_of(*asked) == limits


# Searches


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "minbert.launch.main", "tune", "--search", str(folder), *words]


def small_search(folder: Path, *words: str) -> list[str]:
    space = ["--space", "lr=loguniform(1e-4,5e-3)", "hidden_layers=1,2"]
    return command(folder, *TINY, *words, *space)


def ended(words: list[str], code: int) -> subprocess.CompletedProcess:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def finish(words: list[str]) -> str:
    return ended(words, 0).stdout


def refused(words: list[str]) -> str:
    said = ended(words, 2).stderr
    assert "Traceback" not in said
    return said


def await_trials(folder: Path, process: subprocess.Popen, reached) -> list[Trial]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        trials = _read(folder)
        if reached(trials):
            return trials
        time.sleep(0.2)
    raise AssertionError("the search got nowhere")


def kill(process: subprocess.Popen, what: str) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    if what == "driver":
        process.kill()
    elif what == "head":
        next(child for child in children if child.name() == "gcs_server").kill()
    else:
        workers = [child for child in children if any("Train" in word or "TrialW" in word for word in child.cmdline())]
        for worker in workers:
            worker.kill()


def vanished(processes: list[psutil.Process], folder: Path) -> bool:
    """Whether Ray's processes, and its folder, have gone within reasonable time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = [process for process in processes if process.is_running() and process.status() != "zombie"]
        if not alive and not list(_base().glob(f"{_family(folder)}-*")):
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of a search that nobody disturbed, one trial at a time."""
    folder = tmp_path_factory.mktemp("search") / "undisturbed"
    finish(small_search(folder, "--samples", "2", "--epochs", "10", "--concurrent", "1", "--grace", "0.5"))
    return read_trials(folder / "trials")


@ray
@pytest.mark.parametrize("what", ["driver", "head", "worker"])
def test_a_search_that_is_killed_ends_as_if_it_had_not_been(tmp_path, undisturbed, what):
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "2", "--epochs", "10", "--concurrent", "1", "--grace", "0.5")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = await_trials(
        folder, process, lambda trials: trials and trials[0].over and any(t.step and not t.over for t in trials)
    )
    started = psutil.Process(process.pid).children(recursive=True)
    kill(process, what)
    output, _ = process.communicate(timeout=120)
    assert "Traceback" not in output and "\x1b[" not in output
    assert vanished(started, folder)
    if what == "worker":  # the search goes on by itself
        assert process.returncode == 0, output
        assert "goes on from step" in output
    else:
        assert [report.state for report in inspect_runs([folder / "trials" / "trial-0001"])] == ["interrupted"]
        assert process.returncode == {"driver": -signal.SIGKILL, "head": 75}[what], output
        assert "of 2 trials are over; 1 go on from their checkpoints" in finish(words)
    after = read_trials(folder / "trials")
    for trial, other in zip(after, undisturbed, strict=True):
        assert (trial.parameters, trial.status, trial.step) == (other.parameters, other.status, other.step)
        assert trial.score == other.score
    for trial in before:
        if trial.over:  # and was not touched again
            assert Trial.read(trial.folder) == trial
    assert not any((trial.folder / "checkpoints").exists() for trial in after)  # the best model is what stays
    assert all((trial.folder / "best.safetensors").exists() for trial in after)


@pytest.fixture
def existing(tmp_path):
    """A cluster of Ray that is not ours and has a token: its address. What lies in `tmp_path / "packages"` hides the
    packages that are installed."""
    with socket.create_server(("127.0.0.2", 0)) as free, socket.create_server(("127.0.0.2", 0)) as also_free:
        port, client_port = (str(server.getsockname()[1]) for server in (free, also_free))
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        words = ["start", "--head", "--block", "--num-cpus", "2", "--node-ip-address", "127.0.0.2"]
        words += ["--port", port, "--ray-client-server-port", client_port, "--include-dashboard", "false"]
        words += ["--temp-dir", temporary, "--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        environment |= {"PYTHONPATH": str(packages := tmp_path / "packages")}
        packages.mkdir()
        output = Path(temporary, "output")
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words], env=environment, stdout=output.open("w")
        )
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield f"127.0.0.2:{port}"
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        for child in psutil.wait_procs(children, timeout=30)[1]:
            child.kill()


def existing_port(process: psutil.Process) -> str:
    ports = [word.partition("=")[2] for word in process.cmdline() if word.startswith("--gcs_server_port=")]
    return f":{ports[0]}" if ports else "none"


@ray
def test_a_search_on_an_existing_cluster(tmp_path, existing, monkeypatch):
    """Also one that cannot be joined, or lacks this program; one trial is broken, and the other becomes a run."""
    folder = tmp_path / "s"
    space = ["--space", "max_length=64,4096", "--algorithm", "grid"]  # longer than the encoder's positions
    words = command(folder, *TINY, "--steps", "2", *space, "--address", existing)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[::-1])
    assert "One with authentication needs RAY_AUTH_TOKEN" in refused(words)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    older = tmp_path / "packages/minbert"
    (older / "tuning").mkdir(parents=True)
    (older / "__init__.py").touch()
    (older / "tuning/__init__.py").write_text("raise ImportError('not in this version')")
    assert "cannot import minbert there (not in this version)" in refused(words)
    shutil.rmtree(older)
    output = finish(words)
    assert "trial-0001 failed: max_length=4096, but the encoder has" in output
    trials = read_trials(folder / "trials")
    assert [trial.status for trial in trials] == ["finished", "failed"]
    assert "max_length=4096" in trials[1].error
    assert "2 of 2 trials are over" in finish(command(folder))
    config = read_config_file(folder / "best.yaml")
    assert (config.corpus.max_length, config.corpus.train_limit, config.run) == (64, None, None)

    run = tmp_path / "full"
    assert main(["tune", "--best", str(folder), "--run", str(run), "--steps", "1", *TINY]) == 0
    assert read_config_file(run / "config.yaml").corpus.max_length == 64
    assert (run / "predictions").exists()

    long = small_search(tmp_path / "long", "--samples", "2", "--epochs", "200", "--address", existing)
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_trials(tmp_path / "long", process, lambda trials: any(trial.step for trial in trials))
    head = next(p for p in psutil.process_iter() if p.name() == "gcs_server" and existing_port(p) in existing)
    head.kill()
    lost = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - lost < 30  # Ray itself takes more than a minute
    assert process.returncode == 75, output
    assert f"--search {tmp_path / 'long'} --address {existing}" in output
    assert "Traceback" not in output


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, in which the trials of a small search have room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_of_a_long_error_the_line_on_the_disk_is_told():
    said = "step 4 could not be saved: No space left on device\nThis was failure 3 in a row. Make room, then resume."
    assert line_on_disk(said) == "step 4 could not be saved: No space left on device"
    assert line_on_disk("Traceback\nValueError: no room for another word") is None


@ray
def test_a_full_disk_stops_a_search_and_fails_no_trial(disk):
    folder, ballast = disk / "s", disk / "ballast"
    words = small_search(folder, "--samples", "2", "--epochs", "8", "--scheduler", "none")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_trials(folder, process, lambda trials: any(trial.step for trial in trials))
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 65536):
            pass
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 2, said
    assert "No space left on device" in said and str(folder) in said and "Make room" in said
    assert "Traceback" not in said
    assert not any(trial.over for trial in _read(folder))
    ballast.unlink()
    finish(words)
    assert [trial.status for trial in read_trials(folder / "trials")] == ["finished"] * 2


@ray
def test_a_search_that_is_asked_to_stop_saves_and_goes_on_with_tpe_and_several_processes(tmp_path):
    pytest.importorskip("optuna")
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "2", "--epochs", "8", "--algorithm", "tpe", "--processes", "2")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    before = await_trials(folder, process, lambda trials: trials and trials[0].step)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and job managers send it, to the whole group
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "To go on: minbert tune --search" in output
    assert "Traceback" not in output
    assert vanished(started, folder)
    for trial in before:
        saved = published(trial.folder / "checkpoints")
        assert Trial.read(trial.folder).over or (saved and int(saved[-1].name.removeprefix("step-")) >= trial.step)
    finish(words)
    trials = read_trials(folder / "trials")
    assert [trial.status for trial in trials] in (["finished"] * 2, ["finished", "stopped"])
    assert json.loads((trials[0].folder / "environment.json").read_text())
    assert yaml.safe_load((trials[0].folder / "config.yaml").read_text())["parallel"]["processes"] == 2


def test_a_refused_start_changes_nothing(tmp_path, capsys, monkeypatch):
    """Neither a search, nor an ablation, nor what else a folder holds; the lock comes before anything is written."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    folder, other = tmp_path / "s", tmp_path / "other"
    space = check_space(parse_space(["lr=loguniform(1e-4,1e-3)"]), {})
    Search(samples=4, space=space, base={"batch_size": 8, "evaluations": 10}).write(folder)
    other.mkdir()
    (other / "mine").touch()
    before = (folder / "search.yaml").read_bytes()
    more = ["tune", "--search", str(folder), "--samples", "9", "--batch-size", "8"]
    assert main([*more, "--address", "127.0.0.2:1"]) == 2
    assert "nothing answers" in capsys.readouterr().err
    assert main([*more, "--data", str(tmp_path / "nowhere")]) == 2
    with FileLock(folder / ".lock"):
        assert main(more) == 2
        assert "is being run by another process" in capsys.readouterr().err
        assert main([*more, "--slurm"]) == 2
    for command in ("tune", "ablate"):
        assert main([command, f"--{'search' if command == 'tune' else 'ablation'}", str(other)]) == 2
    assert main(["ablate", "--ablation", str(tmp_path / "a"), "--seeds"]) == 2
    assert main(["ablate", "--ablation", str(tmp_path / "a"), "--data", "/nowhere"]) == 2
    assert main(["ablate", "--ablation", str(tmp_path / "a"), "--ray", "--address", "127.0.0.2:1", *TINY]) == 2
    assert (folder / "search.yaml").read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) in (
        [".lock", "mine", "other", "s", "search.yaml"],
        ["mine", "other", "s", "search.yaml"],
    )


def test_another_search_in_the_same_folder_is_refused(tmp_path, capsys):
    space = check_space(parse_space(["lr=loguniform(1e-4,1e-3)"]), {})
    search = Search(samples=1, space=space, base={"batch_size": 8, "evaluations": 10})
    search.write(tmp_path)
    search.new_trial(tmp_path, 0, {"lr": 2e-4}).write()
    before = (tmp_path / "search.yaml").read_bytes()

    def said(*words: str) -> str:
        assert main(["tune", "--search", str(tmp_path), *words]) == 2
        return capsys.readouterr().err

    assert all(
        text in said("--batch-size", "16", "--seed", "1") for text in ("another search", "batch_size: 8", "seed: 0")
    )
    assert "all 1 trials are drawn already" in said("--space", "lr=loguniform(1e-4,1e-2)")
    assert "batch_size is searched, and given" in said("--space", "batch_size=8,16", "--batch-size", "8")
    assert (tmp_path / "search.yaml").read_bytes() == before


@ray
def test_a_search_goes_on_in_another_space(tmp_path, capsys):
    folder = tmp_path / "s"
    small = [*TINY, "--steps", "4", "--eval-every", "2", "--concurrent", "1", "--hidden-layers", "1"]
    finish(command(folder, *small, "--samples", "2", "--scheduler", "none", "--space", "lr=1e-3,1e-4"))
    again = ["--again", "2", "--seeds", "1", "2"]  # and the best two with other seeds
    said = finish(command(folder, "--samples", "3", "--space", "lr=1e-4,1e-5", "hidden_layers=1,2", *again))
    assert "Another space, from trial-0002 on. 1 of the 2 trials before lie in it" in said
    runs = read_trials(folder / "again", "*/*")
    assert [run.seed for run in runs] == [1, 1, 2, 2] and all(run.status == "finished" for run in runs)
    assert all(RunFolder(run.folder).read_config().seed == run.seed and run.seconds > 0 for run in runs)
    assert "[4/4] trial-" in said and "the best of the search with" in said
    assert "2 of them trained again with other seeds" in (folder / "best.yaml").read_text()
    trials = read_trials(folder / "trials")
    assert [sorted(trial.parameters) for trial in trials] == [["lr"], ["lr"], ["hidden_layers", "lr"]]
    assert trials[2].parameters["lr"] in (1e-4, 1e-5) and all(trial.status == "finished" for trial in trials)
    assert "3 of 3 trials are over" in finish(command(folder))
    assert main(["report", str(folder)]) == 0
    with (folder / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["space"] for row in rows[:3]) == ["1", "1, outside", "2"]
    assert [row["seed"] for row in rows] == ["0", "0", "0", "1", "1", "2", "2"]
    assert [row["hidden_layers"] for row in rows][:2] == ["1", "1"]


# Searches on SLURM


@pytest.fixture
def slurm(devcluster, monkeypatch):
    """Everything here talks to the development cluster."""
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return devcluster


def eventually(folder: Path, reached: Callable[[], bool], seconds: float) -> None:
    """Wait, and show what the search's job has printed if it takes too long."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, _output(folder)
        time.sleep(0.5)


@pytest.mark.xdist_group("slurm")
def test_a_search_on_two_nodes_is_requeued_and_goes_on(slurm, tmp_path, capsys):
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "4", "--epochs", "10", "--concurrent", "2")
    words += ["--slurm", "--nodes", "2", "--cpus-per-task", "1", "--cpus", "1", "--time", "30"]
    finish(words)
    eventually(folder, lambda: any(trial.step and not trial.over for trial in _read(folder)), 240)
    report = inspect_runs([folder])[0]
    assert report.nodes == "n[1-2]"
    slurm.run("scontrol", "requeue", report.job_id)
    eventually(folder, lambda: inspect_runs([folder])[0].state == "pending", 240)
    slurm.run("scontrol", "update", f"jobid={report.job_id}", "starttime=now")
    eventually(folder, lambda: inspect_runs([folder])[0].finished, 240)
    assert "Ray runs on n1, n2: 2 cores" in _output(folder)
    capsys.readouterr()
    assert main(["jobs", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f" {report.job_id}" in shown
    assert shown.count("trial-000") == 4
    assert main(["logs", str(folder)]) == 0
    assert "4 of 4" in capsys.readouterr().out or "[4/4]" in _output(folder)
    assert all(trial.status in ("finished", "stopped") for trial in _read(folder))
    assert len(_read(folder)) == 4
    assert (folder / "best.yaml").exists()


@pytest.mark.xdist_group("slurm")
def test_a_search_is_cancelled_and_goes_on_here(slurm, tmp_path, capsys):
    folder = tmp_path / "s"
    words = small_search(folder, "--samples", "2", "--epochs", "10", "--scheduler", "none")
    finish([*words, "--slurm", "--cpus-per-task", "1", "--time", "30"])
    eventually(folder, lambda: any(trial.step for trial in _read(folder)), 120)
    assert main(["tune", "--search", str(folder), "--slurm"]) == 2
    assert "has a job already" in capsys.readouterr().err
    assert main(["cancel", str(folder)]) == 0
    eventually(folder, lambda: inspect_runs([folder])[0].state == "cancelled", 120)  # after "ending"
    assert main(["jobs", str(folder)]) and "cancelled" in capsys.readouterr().out
    eventually(folder, lambda: not _is_locked(folder), 120)  # for SLURM the job is over before its processes are
    assert "go on from their checkpoints" in finish(command(folder))
    assert [trial.status for trial in _read(folder)] == ["finished"] * 2


def _is_locked(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _read(folder: Path) -> list[Trial]:
    try:
        return read_trials(folder / "trials")
    except (json.JSONDecodeError, FileNotFoundError):
        return []


def _output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in (folder / "slurm").glob("*_log.out")) + os.linesep
