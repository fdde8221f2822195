"""Trackers themselves, where they are installed: one run stays one run, and nobody waits for them."""

import json
import sqlite3
from threading import Event

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from minbert.data.errors import UserError
from minbert.trainer.run.trackers import Trackers


def tracked(folder, kinds, steps, identities=None):
    """A start of the run in `folder`, which logs `steps`; returns what the checkpoint would remember."""
    folder.mkdir(exist_ok=True)
    identities = {} if identities is None else identities
    trackers = Trackers(Accelerator(log_with=kinds, project_dir=folder), folder)
    trackers.start({"lr": 1e-3}, steps[0] - 1, identities)
    for step in steps:
        trackers.log({"dev/overall": step / 10}, step)
    trackers.end()
    assert not trackers._failed
    return identities


def test_mlflow_has_one_run_over_two_starts(tmp_path, monkeypatch):
    """The second one from another folder, and without a checkpoint of the first."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked(tmp_path / "run", ["mlflow"], [1, 2])
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow_uri"].endswith("mlruns")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(None)
    tracked(tmp_path / "run", ["mlflow"], [3, 4])
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'metrics'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "dev/overall")] == [1, 2, 3, 4]
    assert run.data.params == {"lr": "0.001"} and run.info.run_name == "run"


def test_wandb_without_a_key_is_offline_and_one_run_over_two_starts(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = tracked(tmp_path / "run", ["wandb"], [1, 2])
    assert tracked(tmp_path / "run", ["wandb"], [3]) == first
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(first["wandb"]) for name in folders)


def test_trackio_has_one_run_over_two_starts_and_keeps_its_configuration(tmp_path, monkeypatch, capsys):
    """The second one where its folder is not named. Its own reader tells what it holds."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")  # which looks at the folder once
    first = tracked(tmp_path / "run", ["trackio"], [1, 2])
    monkeypatch.delenv("TRACKIO_DIR")
    assert tracked(tmp_path / "run", ["trackio"], [3]) == first
    assert first["trackio_dir"] == str(tmp_path / "trackio")
    assert capsys.readouterr().out == ""  # where a line of JSON may be wanted
    from trackio import Api

    (run,) = Api().runs("metrics")
    assert run.name == first["trackio"] and run.config["lr"] == "0.001"
    with sqlite3.connect(tmp_path / "trackio" / "metrics.db") as database:
        assert database.execute("SELECT step FROM metrics ORDER BY id").fetchall() == [(1,), (2,), (3,)]


class Slow(GeneralTracker):
    """A server that takes its time, until it is `free`."""

    name, requires_logging_directory, main_process_only = "slow", False, True
    tracker = None
    logged = 0
    free = Event()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **more):
        Slow.free.wait(60)
        Slow.logged += 1


def test_nobody_waits_for_a_slow_tracker(tmp_path, caplog):
    trackers = Trackers(Accelerator(log_with=Slow()), tmp_path)
    trackers.start({}, 0, {})
    for step in range(100):
        trackers.log({"loss/sst": 1.0}, step)
    trackers.end(patience=0.7)
    assert Slow.logged == 0
    Slow.free.set()
    assert "a tracker did not end within 1 s" in caplog.text
    assert not (tmp_path / "trackers.json").exists()  # it has no name of its own


class Broken(Slow):
    name = "broken"

    def store_init_configuration(self, values):
        raise ConnectionError("nobody there")

    def log(self, values, step=None, **more):
        raise ConnectionError("nobody there")


def test_a_tracker_that_cannot_start_is_refused_and_one_that_breaks_later_is_not(tmp_path, caplog):
    with pytest.raises(UserError, match="of broken could not be started: ConnectionError: nobody there"):
        Trackers(Accelerator(log_with=Broken()), tmp_path).start({"lr": 1.0}, 0, {})
    trackers = Trackers(Accelerator(log_with=Broken()), tmp_path)
    trackers.start({"lr": 1.0}, 4, {})  # it goes on: its configuration is known
    trackers.log({"loss/sst": 1.0}, 5)
    trackers.log({"loss/sst": 1.0}, 6)
    trackers.end()
    assert caplog.text.count("a tracker failed") == 1
