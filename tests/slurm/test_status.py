"""Where runs stand: as SLURM says, as their own files say, and where neither can be believed."""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from slurm_records import ALLOCATION, records_of
from submitting import SMALL, submit

from minbert.launch.main import main
from minbert.slurm.controller import Queued
from minbert.slurm.endings import Ending
from minbert.slurm.records import Records, Submission
from minbert.slurm.status import inspect_runs, is_active
from minbert.slurm.submission import kept_task, mark_cancelled
from minbert.slurm.supervisor import accept
from minbert.trainer.checkpoint.format import published, read_manifest
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.standing import Standing


def stand(run: Path, records: Records, state: str | None, monkeypatch, accounts: str | None = None):
    queue = {"7": Queued(state, "Resources", "n1")} if state else {}
    monkeypatch.setattr("minbert.slurm.controller.jobs", lambda ids: queue)
    told = {"7": [Queued(accounts)]} if accounts else {}
    monkeypatch.setattr("minbert.slurm.controller.accounts", lambda ids: told if list(ids) else {})
    return inspect_runs([run])[0]


def test_how_a_run_stands(tmp_path, monkeypatch):
    run = tmp_path / "run"
    records = records_of(run)
    assert stand(run, records, "PENDING", monkeypatch).summary == "pending (Resources), job 7"
    assert stand(run, records, None, monkeypatch).state == "lost"
    assert stand(run, records, None, monkeypatch, "CANCELLED").exit_code == 86
    attempt = records.begin("7", 0, "n1")
    attempt.started -= 100
    records.write_attempt(attempt)
    lines = [{"step": step} for step in range(1, 26)] + [{"step": 25, "dev/overall": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    records.write_submission(replace(records.submission(), total_steps=100))
    standing = Standing(0, 1, "n1", 1, attempt.started, 0, 100, step=25, moved=time.time(), written=time.time())
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.json").write_text(json.dumps(asdict(standing)))
    report = stand(run, records, "RUNNING", monkeypatch)
    assert (report.state, report.step, report.total, report.score) == ("running", 25, 100, 0.5)
    assert 290 < report.seconds_left < 310 and report.exit_code == 75 and not report.detail
    attempt.started -= 8000
    records.write_attempt(attempt)
    standing.began, standing.moved = attempt.started, standing.written - 4000
    (run / "logs" / "rank-0.json").write_text(json.dumps(asdict(standing)))
    assert stand(run, records, "RUNNING", monkeypatch).detail == "no step for 67 min, see minbert why"
    assert stand(run, records, None, monkeypatch, "NODE_FAIL").state == "node failure"
    records.end(attempt, Ending.TIME_LIMIT, then="requeued")
    report = stand(run, records, "PENDING", monkeypatch)
    assert report.detail == "time limit, Resources" and report.requeues == 1
    records.end(attempt, Ending.FAILED, "boom", 1)
    report = stand(run, records, None, monkeypatch)
    assert (report.state, report.detail, report.exit_code, report.active) == ("failed", "boom", 1, False)


def test_without_an_answer_a_run_is_unknown_and_nothing_is_submitted(tmp_path, monkeypatch, capsys):
    """Nobody listens where the controller should, or SLURM is not installed."""
    conf = "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=1\nAuthType=auth/munge\n"
    (tmp_path / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    run, whole = tmp_path / "run", tmp_path / "whole"
    records = records_of(run)
    records_of(whole, Ending.FINISHED)
    (run / "config.yaml").write_text("steps: 4\n")
    report, other = inspect_runs([run, whole])
    assert (report.state, report.active, report.exit_code) == ("unknown", True, 87) and is_active(run)
    assert "the controller does not answer" in report.detail and other.state == "finished"
    assert main(["jobs", str(run)]) == 87
    assert submit("--run", run) == 2 and main(["jobs", str(run), "--resubmit"]) == 2
    said = capsys.readouterr().err
    assert "has a job already: unknown" in said and "nothing to submit again" in said
    assert records.submission() == Submission("7", str(run / "slurm"), "", {}, "here", 0.0)
    assert main(["cancel", str(run)]) == 2 and records.submission().cancelled
    assert "may still wait or run" in capsys.readouterr().err
    attempt = records.begin("7", 0, "n1")
    assert inspect_runs([run])[0].state == "unknown"
    records.end(attempt, Ending.TIME_LIMIT, then="requeued")
    assert inspect_runs([run])[0].state == "unknown"
    records.end(attempt, Ending.FAILED, "boom", 2)
    assert inspect_runs([run])[0].state == "failed"


def test_a_submission_whose_answer_was_lost_is_looked_up_by_its_token(tmp_path, monkeypatch):
    records = Records(tmp_path)
    lost = Submission("", str(tmp_path / "slurm"), "", {}, "here", time.time(), token="abc", element=2)
    records.write_submission(lost)
    known = {"9_2": Queued("PENDING", "Resources", "", "mine minbert:abc"), "8": Queued("RUNNING", "", "n1", "abc")}
    monkeypatch.setattr("minbert.slurm.controller._squeue", lambda which: known)
    report = inspect_runs([tmp_path])[0]
    assert (report.state, report.job_id, report.active) == ("pending", "9_2", True)
    known.clear()
    assert inspect_runs([tmp_path])[0].state == "unknown" and inspect_runs([tmp_path])[0].active
    records.write_submission(replace(lost, submitted=time.time() - 301))
    report = inspect_runs([tmp_path])[0]
    assert (report.state, report.active, report.exit_code) == ("not submitted", False, 75)


def test_the_job_of_a_run_is_not_that_of_its_copy(tmp_path, monkeypatch, capsys):
    """To cancel the copy's would end the run's, and the copy could not be trained as long as the run is."""
    run, copy, cancelled = tmp_path / "run", tmp_path / "copy", []
    records = records_of(run)
    records.write_submission(replace(records.submission(), run=str(run), token="abc"))
    shutil.copytree(run, copy)
    monkeypatch.setattr("minbert.slurm.controller.cancel", cancelled.append)
    assert stand(run, records, "RUNNING", monkeypatch).active
    assert (report := inspect_runs([copy])[0]).job_id == "" and not report.active
    assert main(["cancel", str(copy)]) == 2
    assert f"no run in {copy} has a job" in capsys.readouterr().err and cancelled == []
    link = tmp_path / "link"
    link.symlink_to(run)
    assert is_active(link)
    shutil.rmtree(run)
    assert is_active(copy)  # a run that was moved still has its job


def test_a_job_that_is_not_the_latest_submission_does_nothing(tmp_path, capsys):
    """The latest one leaves its id, and finds its task, although sbatch's answer was lost."""
    records = records_of(tmp_path)
    submission = replace(records.submission(), job_id="", token="new")
    records.write_submission(submission)
    kept_task(submission).write_bytes(b"task")
    assert not accept(tmp_path, ALLOCATION, "old") and "was submitted anew" in capsys.readouterr().out
    assert records.submission() == submission and not records.attempts()
    assert accept(tmp_path, ALLOCATION, "new")
    assert records.submission().job_id == "7" and (tmp_path / "slurm" / "7_submitted.pkl").read_bytes() == b"task"
    mark_cancelled(tmp_path)
    assert not accept(tmp_path, ALLOCATION, "new")
    assert [attempt.ending for attempt in records.attempts()] == [Ending.CANCELLED]


def test_a_killed_batch_script_is_told_in_words(tmp_path, monkeypatch):
    records = records_of(tmp_path)
    report = stand(tmp_path, records, None, monkeypatch, "FAILED")
    assert report.state == "failed" and report.detail.startswith("before anything was recorded; minbert logs")
    records.begin("7", 0, "n1")
    report = stand(tmp_path, records, None, monkeypatch, "FAILED")
    assert report.state == "process killed" and report.exit_code == 84 and "batch script was killed" in report.detail


def test_why_a_job_waits_is_told_in_words(tmp_path, monkeypatch):
    records_of(tmp_path)
    monkeypatch.setattr("minbert.slurm.controller.jobs", lambda ids: {"7": Queued("PENDING", "PartitionConfig")})
    assert inspect_runs([tmp_path])[0].summary == "pending (for ever: it asks for more than the partition has), job 7"


GARBAGE = [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"job_id": 5}', b'{"status": [1]}']


@pytest.mark.parametrize("name", ["slurm/submission.json", "slurm/attempts/7-0.json", "trial.json"])
def test_one_damaged_folder_is_one_line(name, tmp_path, monkeypatch, capsys):
    """It is told what is wrong, nothing is submitted from it, and the others are shown as they are."""
    monkeypatch.setattr("minbert.slurm.controller.jobs", lambda ids: {"7": Queued("PENDING", "Resources")})
    good, bad = tmp_path / "good", tmp_path / "bad"
    records_of(good)
    if "attempts" in name:
        records_of(bad)
    (bad / "config.yaml").parent.mkdir(exist_ok=True)
    (bad / "config.yaml").write_text("")
    file = bad / name
    file.parent.mkdir(parents=True, exist_ok=True)
    contents = [*GARBAGE, None]
    for content in contents:
        file.unlink(missing_ok=True)
        file.write_bytes(content) if content is not None else os.mkfifo(file)
        assert main(["jobs", str(tmp_path), "--json"]) == 0
        first, second = json.loads(capsys.readouterr().out)
        assert second["state"] == "pending" and second["detail"] == "Resources"
        assert Path(name).name in first["detail"], content
        assert first["active"], content
        if "attempts" not in name:
            assert first["state"] == "damaged" and first["exit_code"] == 2
            assert main(["jobs", str(bad)]) == 2 and main(["jobs", str(bad), "--resubmit"]) == 2
            capsys.readouterr()
    if name == "slurm/submission.json":
        file.unlink()
        file.write_text('{"job_id": 5}')
        assert submit("--run", bad) == 2 and main(["cancel", str(bad)]) == 2 and main(["logs", str(bad)]) == 2
        assert capsys.readouterr().err.count("submission.json is damaged") == 3


def test_garbage_among_the_metrics_is_passed_over(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    lines = [b'{"step": 3, "dev/overall": 0.5}', b"{", b"[1]", b'"x"', b'{"step": "4"}', b"\xff", b"[" * 100_000]
    lines += [b'{"step": 5, "dev/overall": NaN}', b'{"step": 6, "dev/overall": "x"}', b'{"loss": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert main(["jobs", str(tmp_path), "--json"]) == 75
    (row,) = json.loads(capsys.readouterr().out)
    assert row["step"] == 6 and row["score"] == 0.5


def test_a_run_without_a_job_stands_as_its_own_files_say(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--run", str(run), *SMALL]) == 0
    capsys.readouterr()
    assert main(["jobs", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"], row["total"], row["active"]) == ("finished", 4, 4, False)
    folder = RunFolder(run)
    with folder.locked():
        assert main(["jobs", str(run)]) == 75 and inspect_runs([run])[0].state == "running"
    config = folder.read_config()
    folder.write_config(config.model_copy(update={"budget": config.budget.model_copy(update={"steps": 9})}))
    report = inspect_runs([run])[0]
    assert (report.state, report.total, report.exit_code) == ("interrupted", 9, 75)
    manifest = read_manifest(published(folder.checkpoints)[-1])
    patient = config.budget.model_copy(update={"patience": 1, "steps": 9})
    folder.write_config(config.model_copy(update={"budget": patient}))
    budget = {"budget": patient.model_dump()}
    out_of_patience = replace(manifest.state, stale_evaluations=1)
    replace(manifest, state=out_of_patience, total_steps=9, config=budget).write(published(folder.checkpoints)[-1])
    assert inspect_runs([run])[0].state == "finished"
    folder.write_config(config)
    records = records_of(run)
    attempt = records.begin("7", 0, "n1")
    records.end(attempt, Ending.CANCELLED)
    assert inspect_runs([run])[0].state == "cancelled"
    attempt.last_step = 2  # and it was finished here afterwards
    records.write_attempt(attempt)
    assert inspect_runs([run])[0].state == "finished"
    records.write_submission(None)
    shutil.rmtree(folder.checkpoints)
    assert inspect_runs([run])[0].state == "not started"
