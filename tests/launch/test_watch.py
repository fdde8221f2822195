"""A run seen from outside while it trains: `minbert watch`, and `minbert why` when a process of it stands still."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from small_runs import CORPUS, started
from waiting import until

from minbert.launch.main import main
from minbert.launch.watching import ManyRuns, WatchedRun, table
from minbert.slurm.status import inspect_runs
from minbert.trainer.run import standing as standings
from minbert.trainer.run.standing import read_standings

SMALL = ["--data", CORPUS, "--train-limit", 60, "--eval-limit", 20, "--batch-size", 4, "--log-every", 1, "--trackers"]
SMALL += ["--eval-every", 30]


@pytest.fixture
def training(tmp_path):
    """A run of two processes that has begun."""
    run = tmp_path / "runs" / "run"
    words = ["train", "--run", run, *SMALL, "--steps", 60, "--processes", 2]
    process = started(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield run, process
    if process.poll() is None:
        for each in read_standings(run / "logs"):
            os.kill(each.pid, signal.SIGCONT)
        process.terminate()
        process.wait(60)


def test_a_process_that_stands_still_is_named_and_the_run_is_watched_to_its_end(training, monkeypatch, capsys):
    run, process = training

    def both_train() -> bool:
        found = read_standings(run / "logs")
        return len(found) == 2 and (run / "metrics.jsonl").exists()

    until(both_train, "two processes")
    asleep = read_standings(run / "logs")[1]
    os.kill(asleep.pid, signal.SIGSTOP)
    monkeypatch.setattr("minbert.slurm.timeline.SILENT", 7.0)
    monkeypatch.setattr(standings, "SLOW", 0.0)
    waiting = lambda: read_standings(run / "logs")[0].waits and read_standings(run / "logs")[1].age > 7.0  # noqa: E731
    until(waiting, "rank 0 to notice")
    assert main(["why", str(run), "--patience", "2"]) == 75
    said = capsys.readouterr().out
    assert "It seems to hang" in said and "Look at rank 1, which gives no sign of life" in said
    assert "rank 0 on " in said and "waits for others at " in said and "rank 1 on " in said

    many = ManyRuns(run.parent).look()
    assert many.under_way and many.rows[0][0].run == run
    assert "run" in table(many, 100, 20).plain and "1 running" in many.summary
    os.kill(asleep.pid, signal.SIGCONT)
    assert main(["why", str(run)]) == 75
    capsys.readouterr()
    assert main(["watch", str(run), "--json", "--interval", "0.2"]) == 0
    assert process.wait(60) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 60 and lines[-1]["state"] == "finished"
    assert lines[-1]["best"]["overall"] == pytest.approx(inspect_runs([run])[0].score)
    assert {"sst", "quora", "sts"} == set(lines[-1]["losses"]) and lines[-1]["tokens_per_second"] > 0
    assert 0 < lines[-1]["share_of_peak"] < 1 and lines[-1]["memory"] > 1 << 26

    assert main(["watch", str(run.parent)]) == 0  # all is over
    assert capsys.readouterr().out == f"1/1 over, 0 running, best {lines[-1]['best']['overall']:.3f} run\n"
    assert main(["watch", str(run), "--once"]) == 0
    assert "step     60/60" in capsys.readouterr().out


def test_what_cannot_be_watched_is_said(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "there are no runs in" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "nothing")]) == 2
    (tmp_path / "config.yaml").write_text("steps: [")  # being written, or spoilt
    assert WatchedRun(Path(tmp_path)).look().step == 0
