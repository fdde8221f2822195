"""Jobs without a cluster: settings, sweeps, verdicts, snapshots, meeting, and submitit's local and debug executors."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.errors import UserError
from minbert.launch.main import main
from minbert.launch.sweep import elements, parse_sweep
from minbert.slurm.allocation import Allocation, expand_counts
from minbert.slurm.batch_script import watched
from minbert.slurm.check import Node, mismatches
from minbert.slurm.controller import Job, Queued, without_job
from minbert.slurm.endings import Ending
from minbert.slurm.records import Records, Submission
from minbert.slurm.settings import JobSettings, parse_time, resolve_settings
from minbert.slurm.snapshot import take_snapshot
from minbert.slurm.status import inspect_runs, is_active
from minbert.slurm.submission import Task, is_refusal, kept_task, mark_cancelled
from minbert.slurm.submission import submit as submit_tasks
from minbert.slurm.supervisor import KILLED, accept, bounded, complaint
from minbert.slurm.verdict import Error, Evidence, Next, Verdict, judge
from minbert.trainer.checkpoint.format import published, read_manifest
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.standing import Standing

SMALL = ["--train-limit", "120", "--eval-limit", "40", "--batch-size", "8", "--steps", "4", "--log-every", "1"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_site(monkeypatch, tmp_path):
    """No test reads the user's own site file."""
    monkeypatch.delenv("MINBERT_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def submit(*arguments: object) -> int:
    return main(["submit", *map(str, arguments)])


# Settings


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90m", 90),
        ("8h", 480),
        ("1h30m", 90),
        ("1d12h", 2160),
        ("1-12:00:00", 2160),
        ("2-0", 2880),
        ("02:30:00", 150),
        ("0:30:01", 31),
    ],
)
def test_time_limits(text, minutes):
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "8 hours", "30:00", "-5", "1:2:3:4", "h", "1.5h"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="is no time limit"):
        parse_time(text)


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59))
def test_one_time_limit_in_two_spellings(days, hours, minutes):
    total = (days * 24 + hours) * 60 + minutes
    if total:
        assert parse_time(f"{days}-{hours:02}:{minutes:02}:00") == parse_time(f"{days}d{hours}h{minutes}m") == total


def test_processes_follow_gpus():
    assert JobSettings(nodes=2, gpus_per_node=4).tasks == 8
    assert JobSettings(gpus_per_node=4, tasks_per_node=2).tasks == 2
    assert JobSettings().tasks == 1


def test_layers_and_the_sites_file(tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: gpu\naccount: nlp\ntime: 4h\nsetup: [module load cuda]\nslurm_parameters: {exclude: n9}\n"
    )
    monkeypatch.setenv("MINBERT_SITE", str(site))
    earlier = {"time": "8h", "nodes": 2}
    settings = resolve_settings({"nodes": 4, "slurm_parameters": {"comment": "x"}}, earlier)
    assert (settings.partition, settings.time, settings.nodes) == ("gpu", "8h", 4)
    assert settings.setup == ("module load cuda",) and settings.slurm_parameters == {"exclude": "n9", "comment": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu\n", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("nodes: zero\n", "nodes: input should be a valid integer"),
        ("time: soon\n", "'soon' is no time limit"),
        ("slurm_parameters: {exclud: n1}\n", "'exclud' is unknown; did you mean 'exclude'? There are"),
        ("slurm_parameters: {ntasks_per_node: 2}\n", "it is the option tasks_per_node"),
        ("- a\n", "must hold `key: value` lines"),
        ("time: 5400\n", "time: 5400 could be minutes or seconds; write 1:30:00"),
        ("slurm_parameters: {additional_parameters: 5}\n", "additional_parameters must hold options of sbatch"),
        ("slurm_parameters: {additional_parameters: {a: [1]}}\n", "SLURM parameter a must be a text or a number"),
        (
            'slurm_parameters: {exclude: "n1\\n#SBATCH --x"}\n',
            "SLURM parameter exclude: 'n1\\n#SBATCH --x' holds a line",
        ),
        ('account: "a\\nb"\n', "account: 'a\\nb' holds a line break"),
        ("setup: 5\n", "setup: input should be a valid tuple, not 5"),
    ],
)
def test_a_wrong_site_file_is_named(tmp_path, monkeypatch, text, said):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    monkeypatch.setenv("MINBERT_SITE", str(site))
    with pytest.raises(UserError, match=r"site\.yaml") as caught:
        resolve_settings({})
    assert said in str(caught.value)


def test_lines_and_arguments_may_be_given_as_text(tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text("setup: |\n  module load cuda\n  ulimit -c 0\nsrun_args: --mpi=none --label='a b'\n")
    monkeypatch.setenv("MINBERT_SITE", str(site))
    settings = resolve_settings({})
    assert settings.setup == ("module load cuda", "ulimit -c 0") and settings.srun_args == ("--mpi=none", "--label=a b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lrr", "1"], "did you mean --lr?"),
        (["--gpus-per-node", "2", "--tasks-per-node", "4"], "each process needs a GPU of its own"),
        (["--processes", "3", "--nodes", "2"], "make 2; leave --processes out"),
        (["--time", "1m"], "leaves nothing before the request to save"),
        (["--executor", "debug", "--tasks-per-node", "2"], "use executor=local"),
        (["--slurm-parameters", "exclud=n1"], "There are additional_parameters, comment,"),
        (["--job-name", "a\n#SBATCH --partition=b"], "holds a line break"),
        (["--executor", "local", "--gpus-per-node", "1"], "is built without CUDA; install one with CUDA"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    assert submit("--run", tmp_path / "run", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run%j", "100%", "a\\b", "a\nb"])
def test_slurm_would_misread_the_names_of_the_jobs_files(name, tmp_path, capsys):
    assert submit("--run", tmp_path / name, *SMALL, "--executor", "local") == 2
    said = capsys.readouterr().err
    assert "SLURM replaces % and" in said or "holds a line break" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_everything_and_leaves_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    job = ["--nodes", 2, "--gpus-per-node", 4, "--time", "8h", "--cpus-per-task", 6, "--reservation", "r1"]
    site = ["--setup", "module load cuda", "--srun-args=--mpi=none", "--slurm-parameters", "exclude=n9"]
    assert submit("--run", run, *SMALL, *job, *site, "--dry-run") == 0
    said = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2\n",
        "#SBATCH --ntasks-per-node=4\n",
        "#SBATCH --gpus-per-node=4\n",
        "#SBATCH --time=480\n",
        "#SBATCH --requeue\n",
        "#SBATCH --signal=USR2@120\n",
        "#SBATCH --reservation=r1\n",
        "#SBATCH --exclude=n9\n",
        "\nmodule load cuda\ntrap - ERR EXIT\nexport PYTHONPATH=",
        "--kill-on-bad-exit=1 --cpus-per-task=6 --mpi=none",
        "  processes: 8\n",
        "  batch_size: 8\n",
    ):
        assert line in said
    assert "wckey" not in said and not run.exists()


def test_a_dry_run_of_a_sweep_is_an_array(tmp_path, capsys):
    assert submit("--run", tmp_path / "sweep", "--sweep", "seed=1,2,3", "--array-parallelism", 2, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2" in said and "# also" in said and not (tmp_path / "sweep").exists()


# Sweeps


def test_the_elements_of_a_sweep():
    found = elements(parse_sweep(["seed=1,2", "aggregator=sum,cagrad:c=0.4"]))
    assert list(found) == [
        "seed=1,aggregator=sum",
        "seed=1,aggregator=cagrad_c_0.4~ab4755",
        "seed=2,aggregator=sum",
        "seed=2,aggregator=cagrad_c_0.4~ab4755",
    ]
    assert found["seed=2,aggregator=cagrad_c_0.4~ab4755"] == ["--seed", "2", "--aggregator", "cagrad:c=0.4"]


@given(st.lists(st.text("abc1.-", min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
def test_every_element_has_a_folder_of_its_own(values):
    try:
        found = elements({"x": values})
    except UserError as error:
        assert "two elements" in str(error)
    else:
        assert len(found) == len(values) and all("/" not in name for name in found)


def test_a_sweep_is_split_at_the_sites_array_limit(monkeypatch):
    parts = []
    monkeypatch.setattr("minbert.slurm.controller.largest_array", lambda: 4)
    monkeypatch.setattr("minbert.slurm.submission._submit_part", lambda tasks, *rest: parts.append(len(tasks)) or tasks)
    tasks = [Task(Path(f"/run{index}"), print) for index in range(10)]
    assert submit_tasks(tasks, JobSettings(), Path(), Path(), "x") == tasks
    assert parts == [4, 4, 2]


# Verdicts

NOW = datetime(2030, 1, 1, 12)
RUNNING = Job("RUNNING", 0, False, NOW - timedelta(hours=1), NOW + timedelta(hours=7), 480)
OVER = replace(RUNNING, state="COMPLETING", ends=NOW)
PEER = Error(0, 1, "Traceback\nRuntimeError: Connection closed by peer [127.0.0.1]:4242")
OWN = Error(1, 1, "Traceback\nValueError: boom")


@pytest.mark.parametrize(
    ("what", "evidence", "ending", "following"),
    [
        ("finished", {"code": 0, "status": 0}, Ending.FINISHED, Next.NOTHING),
        ("a rank failed after the end", {"code": 0, "status": 1}, Ending.FINISHED, Next.NOTHING),
        ("warned", {"code": 75, "signal": 12, "status": 0}, Ending.TIME_LIMIT, Next.GO_ON),
        ("preempted", {"code": 75, "job": replace(RUNNING, preempted=True)}, Ending.PREEMPTED, Next.GO_ON),
        ("a signal", {"code": 75, "signal": 15}, Ending.STOPPED, Next.GO_ON),
        (
            "near the end",
            {"code": 75, "job": replace(RUNNING, ends=NOW + timedelta(minutes=1))},
            "time limit",
            Next.GO_ON,
        ),
        ("a signal too early", {"status": 143}, Ending.STOPPED, Next.GO_ON),
        ("cancelled by us", {"code": 75, "cancelled": True}, Ending.CANCELLED, Next.NOTHING),
        ("cancelled by scancel", {"code": 75, "job": OVER}, Ending.CANCELLED, Next.NOTHING),
        ("cancelled before it trained", {"status": 143, "job": OVER}, Ending.CANCELLED, Next.NOTHING),
        ("requeued", {"code": 75, "job": replace(OVER, restarts=1)}, Ending.REQUEUED, Next.LEFT_TO_SLURM),
        ("cancelled for another", {"job": replace(OVER, preempted=True)}, Ending.PREEMPTED, Next.SUBMIT_ANEW),
        ("no time to save", {"job": replace(OVER, ends=NOW + timedelta(hours=7))}, "time limit", Next.SUBMIT_ANEW),
        ("node down", {"job": replace(OVER, restarts=1), "down": ["n2"]}, "node failure", Next.LEFT_TO_SLURM),
        ("node down, no requeue", {"job": OVER, "down": ["n2"]}, "node failure", Next.SUBMIT_ANEW),
        ("an exception", {"errors": [PEER, OWN]}, Ending.FAILED, Next.NOTHING),
        ("a mistake", {"errors": [Error(0, 2, "no such file")]}, Ending.FAILED, Next.NOTHING),
        ("killed", {"errors": [PEER], "killed": "n1: task 1: Killed"}, Ending.KILLED, Next.GO_ON),
        ("out of memory", {"status": 137, "killed": "n1: task 1: Out Of Memory"}, Ending.KILLED, Next.GO_ON),
        ("lost contact", {"errors": [PEER]}, Ending.KILLED, Next.GO_ON),
        ("a killed step", {"status": 137}, Ending.KILLED, Next.GO_ON),
        ("no Python", {"status": 127}, Ending.FAILED, Next.NOTHING),
        ("srun's arguments", {"status": 255, "complaint": "unrecognized option '--x'"}, Ending.FAILED, Next.NOTHING),
        ("srun without a word", {"status": 255}, Ending.FAILED, Next.NOTHING),
        ("no grace", {"job": replace(OVER, restarts=1), "preempted": True}, Ending.PREEMPTED, Next.LEFT_TO_SLURM),
        ("the script killed", {"code": 75, "job": OVER, "script_killed": True}, Ending.KILLED, Next.GO_ON),
        ("the script killed, seen early", {"code": 75, "script_killed": True}, Ending.KILLED, Next.GO_ON),
        (
            "the script killed at the end",
            {"code": 0, "job": OVER, "script_killed": True},
            Ending.FINISHED,
            Next.NOTHING,
        ),
        (
            "the script killed, cancelled",
            {"code": 75, "job": OVER, "script_killed": True, "cancelled": True},
            Ending.CANCELLED,
            Next.NOTHING,
        ),
        ("SLURM is silent", {"code": 75, "job": None}, Ending.STOPPED, Next.GO_ON),
    ],
)
def test_verdicts(what, evidence, ending, following):
    verdict = judge(
        Evidence(**{"status": 1, "job": RUNNING, "restart": 0, "now": NOW, "signal_before": 120} | evidence)
    )
    assert (verdict.ending, verdict.next) == (ending, following), what


def test_every_ending_has_a_code_of_its_own():
    assert [code for code, n in Counter(ending.exit_code for ending in Ending).items() if n > 1] == [75]


def test_the_cause_is_told_in_a_line():
    assert judge(Evidence(1, RUNNING, 0, errors=[PEER, OWN])).detail == "rank 1: ValueError: boom"
    assert judge(Evidence(2, RUNNING, 0, errors=[Error(0, 2, "no file x\nGive another.")])).detail == "no file x"


def test_what_srun_says_of_a_killed_task():
    text = "srun: error: n2: task 3: Exited with exit code 1\nsrun: error: n1: tasks 0-1: Killed\n"
    assert KILLED.search(text).groups() == ("n1", "0-1", "Killed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("srun: unrecognized option '--foo=3'\nTry \"srun --help\"", "unrecognized option '--foo=3'"),
        ("srun: error: MPI: no such plugin\nsrun: error: Invalid MPI type 'x'\n", "Invalid MPI type 'x'"),
        (
            "slurmstepd-n2: error: execve(): /py: No such file\nsrun: error: n2: task 0: Exited with exit code 2",
            "execve",
        ),
        ("srun: error: n1: tasks 0-1: Killed\nsrun: Job step aborted: Waiting up to 7 seconds", ""),
        ("srun: got SIGCONT\nsrun: forcing job termination\nstep 3\n", ""),
    ],
)
def test_what_srun_complains_of(text, said):
    assert complaint(text).startswith(said) and bool(said) == bool(complaint(text))


def records_of(run: Path, *endings: Ending, step: int = 0) -> Records:
    records = Records(run)
    records.write_submission(Submission("7", str(run / "slurm"), "", {}, "here", 0.0))
    for restart, ending in enumerate(endings):
        records.end(records.begin("7", restart, "n1"), ending)
    return records


def test_requeues_are_bounded(tmp_path):
    records = records_of(tmp_path, *[Ending.TIME_LIMIT] * 3)
    attempt, go_on = records.begin("7", 3, "n1"), Verdict(Ending.TIME_LIMIT, Next.GO_ON)
    assert bounded(go_on, records, attempt, 4) == go_on
    stopped = bounded(go_on, records, attempt, 3)
    assert stopped.next is Next.NOTHING and stopped.detail == "max_requeues=3 are used up"


def test_a_job_that_dies_twice_before_it_saves_does_not_go_on(tmp_path):
    killed = Verdict(Ending.KILLED, Next.GO_ON, "n1: task 0: Out Of Memory")
    records = records_of(tmp_path)
    assert bounded(killed, records, records.begin("7", 0, "n1"), 50) == killed
    records = records_of(tmp_path, Ending.KILLED)
    attempt = records.begin("7", 1, "n1")
    assert bounded(killed, records, attempt, 50).detail.endswith("for the second time before any checkpoint")
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert bounded(killed, records, attempt, 50) == killed


# Allocation

ALLOCATION = Allocation("7", 0, ("n1", "n2"), (2, 1), 0, 0, 0)


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
        cwd=ROOT,
    )
    assert all(path.startswith(str(snapshot)) for path in done.stdout.split())


# Status


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


# The other executors


def waits(run: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while inspect_runs([run])[0].active:
        assert time.monotonic() < end, (inspect_runs([run]), list((run / "slurm").glob("*.out")))
        time.sleep(0.2)


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
    end = time.monotonic() + 120
    while not RunFolder(run).read_metrics():
        assert time.monotonic() < end
        time.sleep(0.1)
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
    assert "there is no SLURM here; try --executor local" in capsys.readouterr().err
