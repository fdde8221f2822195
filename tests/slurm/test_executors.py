"""Jobs without SLURM: in the background of this machine, and in this process."""

import json
from pathlib import Path

import pytest
from slurm_records import records_of
from small_runs import await_step
from submitting import SMALL, submit
from waiting import until

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.slurm import controller
from minbert.slurm.records import Records
from minbert.slurm.status import inspect_runs
from minbert.trainer.run.folder import RunFolder


def waits(run: Path) -> None:
    until(lambda: not inspect_runs([run])[0].active, f"the end of {run}", seen=lambda: inspect_runs([run]), pause=0.2)


def test_the_local_executor(tmp_path, capsys):
    """Two processes in the background; the table, the log, and a second submission of what is finished."""
    run = tmp_path / "run"
    assert submit("--run", run, *SMALL, "--executor", "local", "--processes", 2) == 0
    assert submit("--run", run) == 2
    assert "has a job already: running" in capsys.readouterr().err
    waits(run)
    assert main(["logs", str(run)]) == 0
    said = capsys.readouterr().out
    assert "Finished: 4 of 4 steps" in said and "Best model, dev" in said
    assert main(["jobs", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "finished" and row["step"] == row["total"] == 4 and row["requeues"] == 0
    assert main(["jobs", str(run)]) == 0
    assert RunFolder(run).read_config().parallel.processes == 2
    assert (run / "logs" / "rank-1.log").exists() and main(["logs", str(run), "--rank", "1"]) == 0


def test_a_cancelled_local_job_has_saved_and_goes_on_when_submitted_again(tmp_path, capsys):
    run = tmp_path / "run"
    assert submit("--run", run, *SMALL, "--steps", 4000, "--eval-every", 4000, "--executor", "local") == 0
    await_step(run, 1)
    assert main(["cancel", str(run)]) == 0
    waits(run)
    report = inspect_runs([run])[0]
    assert report.state == "cancelled" and report.exit_code == 86
    step = Records(run).newest_step()
    assert step > 0
    assert submit("--run", run, "--steps", step + 2, "--executor", "debug") == 0
    assert f"Resuming {run} from step {step} of {step + 2}" in capsys.readouterr().out
    assert inspect_runs([run])[0].state == "finished"
    assert main(["cancel", str(run)]) == 2


def test_the_debug_executor_tells_a_mistake(tmp_path, capsys):
    run = tmp_path / "run"
    assert submit("--run", run, *SMALL, "--executor", "debug", "--lr", 1e30, "--max-skipped", 1) == 2
    assert "were skipped" in capsys.readouterr().err
    report = inspect_runs([run])[0]
    assert report.state == "failed" and report.exit_code == 2


def test_without_slurm_submit_says_what_else_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit("--run", tmp_path / "run", *SMALL) == 2
    assert "there is no SLURM here: the command sbatch is missing. Try --executor local" in capsys.readouterr().err


# What wrappers, other programs of that name and half an installation print.
GARBAGE = {
    "short": 'printf "7|RUNNING\\n7|\\nPartitionName=x Default=YES TotalNodes=many JobState=\\n"',
    "long": 'printf "7|||||||||\\nJobId=7 JobState=RUNNING Restarts=x PartitionName=a Default=YES\\n"',
    "bytes": 'printf "\\377\\376|\\n"',
    "nothing": "true",
    "failure": "echo unreachable >&2; exit 7",
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_answer_of_slurm_concludes_nothing(answer, tmp_path, monkeypatch, capsys):
    run, programs = tmp_path / "run", tmp_path / "bin"
    records_of(run)
    programs.mkdir()
    for name in (*controller.COMMANDS, "sacct", "sinfo"):
        (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    report = inspect_runs([run])[0]
    assert report.state == ("lost" if answer == "true" else "unknown")
    for words in (["jobs", run], ["why", run]):
        assert main([str(word) for word in words]) == report.exit_code
    assert submit("--run", tmp_path / "new", *SMALL, "--nodes", 2) == 2
    assert "whether SLURM has taken the job is unknown" in (said := capsys.readouterr().err)
    assert "Job instance" not in said
    assert controller.accounts(["7"]) == {} and controller.down_nodes("n1") == []
    assert not controller.idle_nodes("a") and controller.largest_partition(None) is None
    with pytest.raises(UserError):
        controller.show("7")


def test_without_slurm_nothing_is_made(tmp_path, monkeypatch, capsys):
    """By what submits several runs, or something else than a run, too."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    commands = ["submit --sweep seed=1,2 --run new", "tune --slurm --search new --samples 1 --space lr=1e-3,1e-4"]
    commands += ["ablate --slurm --ablation new --extensions siamese --seeds 0"]
    for command in commands:
        assert main([*command.split(), *map(str, SMALL)]) == 2
        assert "Try --executor local, or leave --slurm out" in capsys.readouterr().err
        assert not (tmp_path / "new").exists(), command
