"""Searches on Ray that are killed and go on, on clusters of their own and of others, and what they do with mistakes."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock
from memory_disk import fill, memory_disk
from searches import TINY, await_trials, command, finish, refused, small_search, trials_of
from waiting import PATIENCE, until

from minbert.launch.main import main
from minbert.slurm.status import inspect_runs
from minbert.trainer.checkpoint.format import published
from minbert.trainer.run.folder import RunFolder, read_config_file
from minbert.tuning.background import line_on_disk, telling_line
from minbert.tuning.cluster import _base, _family
from minbert.tuning.search import Search
from minbert.tuning.space import check_space, parse_space
from minbert.tuning.trial import Trial, read_trials

TOKEN = "0123456789abcdef" * 4
ray = pytest.mark.xdist_group("ray")  # two clusters of Ray at once would starve each other


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
    """Whether Ray's processes, and its folder, have gone."""
    alive = [process for process in processes if process.is_running() and process.status() != "zombie"]
    return not alive and not list(_base().glob(f"{_family(folder)}-*"))


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
    output, _ = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in output and "\x1b[" not in output
    until(lambda: vanished(started, folder), "the end of Ray's processes and of its folder", pause=0.2)
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
        until(lambda: "Ray runtime started" in output.read_text(), "Ray", process, seen=output.read_text)
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

    words = ["--samples", "2", "--epochs", "200", "--eval-every", "10", "--address", existing]
    long = small_search(tmp_path / "long", *words)
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_trials(tmp_path / "long", process, lambda trials: any(trial.step for trial in trials))
    head = next(p for p in psutil.process_iter() if p.name() == "gcs_server" and existing_port(p) in existing)
    head.kill()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output  # Ray itself would end it, later and with another code
    assert f"--search {tmp_path / 'long'} --address {existing}" in output
    assert "Traceback" not in output


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, in which the trials of a small search have room."""
    with memory_disk(tmp_path / "disk", megabytes=96) as disk:
        yield disk


def test_of_a_long_error_the_line_on_the_disk_is_told():
    said = "step 4 could not be saved: No space left on device\nThis was failure 3 in a row. Make room, then resume."
    assert line_on_disk(said) == "step 4 could not be saved: No space left on device"
    assert line_on_disk("Traceback\nValueError: no room for another word") is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("the last 3 steps were skipped: the gradient is not finite.\nA smaller lr may help.", "the last 3 steps were"),
        ("step 2/9 sst 0.1\nminbert: (rank 0) 8 heads do not divide 9\nChoose others.", "(rank 0) 8 heads do"),
        ("exit code 1\nTraceback (most recent call last):\n  File\nValueError: no such shape\n", "ValueError: no"),
        ("the process that trained it was lost", "the process that trained it was lost"),
    ],
)
def test_of_an_error_the_line_that_says_what_happened_is_told(error, told):
    assert telling_line(error).startswith(told)


@ray
def test_a_full_disk_stops_a_search_and_fails_no_trial(disk):
    folder = disk / "s"
    words = small_search(folder, "--samples", "2", "--epochs", "8", "--scheduler", "none")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_trials(folder, process, lambda trials: any(trial.step for trial in trials))
    ballast = fill(disk)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 2, said
    assert "No space left on device" in said and str(folder) in said and "Make room" in said
    assert "Traceback" not in said
    assert not any(trial.over for trial in trials_of(folder))
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
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output
    assert "To go on: minbert tune --search" in output
    assert "Traceback" not in output
    until(lambda: vanished(started, folder), "the end of Ray's processes and of its folder", pause=0.2)
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
    assert main(["tune", "--search", str(other)]) == 2
    assert main(["ablate", "--ablation", str(other)]) == 2
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
