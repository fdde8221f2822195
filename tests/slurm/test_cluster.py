"""Jobs on a real SLURM: they train what a local run trains, and whatever ends them, they go on and lose nothing saved.

Several runs are on the cluster at a time, as each has to start twice. The runs share seed and size, so that all must
end like one undisturbed run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_runs import CORPUS, has_logged, logged
from waiting import until

from minbert.launch.main import main
from minbert.slurm.endings import Ending
from minbert.slurm.records import Attempt, Records
from minbert.slurm.status import Report, inspect_runs
from minbert.trainer.run.folder import RunFolder

pytestmark = pytest.mark.xdist_group("slurm")

SMALL = ["--data", CORPUS, "--train-limit", 120, "--eval-limit", 40, "--batch-size", 8, "--log-every", 5]
# Long enough to be caught on the way: for two processes, and for one, which is faster.
LONG = [*SMALL, "--steps", 80, "--eval-every", 40, "--save-every", 10]
LONGER = [*SMALL, "--steps", 240, "--eval-every", 80, "--save-every", 20]


@pytest.fixture(scope="module", autouse=True)
def cluster(devcluster):
    """Everything here talks to the development cluster."""
    patch = pytest.MonkeyPatch()
    for name, value in devcluster.environment.items():
        patch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):  # the cluster gives its own
        patch.delenv(name, raising=False)
    patch.setenv("MINBERT_SITE", "")
    yield devcluster
    patch.undo()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """A local run that nothing disturbs, of two processes."""
    assert main(["train", "--run", str(runs / "whole"), "--processes", "2", *map(str, LONG)]) == 0
    return runs / "whole"


@pytest.fixture(scope="module")
def alone(runs) -> Path:
    """The same of one process."""
    assert main(["train", "--run", str(runs / "alone"), *map(str, LONGER)]) == 0
    return runs / "alone"


def submit(run: Path, *arguments: object) -> Path:
    assert main(["submit", "--run", str(run), *map(str, arguments)]) == 0
    return run


def report(run: Path) -> Report:
    return inspect_runs([run])[0]


def eventually(condition: Callable[[], object], what: str, run: Path) -> None:
    until(condition, what, seen=lambda: f"{report(run)}\n{output(run)}", pause=0.5)


def at_step(run: Path, step: int) -> None:
    """Wait until the run has logged this step, and has not ended before."""

    def reached() -> bool:
        assert report(run).active, output(run)
        return has_logged(run, step)

    eventually(reached, f"step {step}", run)


@contextmanager
def held(step: int, *runs: Path) -> Iterator[None]:
    """The runs' processes stand still from this step on: however fast the machine is, none of them ends meanwhile.

    SLURM wakes those that it warns or asks to end.
    """
    waiting = set(runs)

    def all_held() -> bool:
        for run in [run for run in waiting if has_logged(run, step)]:
            for process in processes(run):
                process.suspend()
            waiting.remove(run)
        return not waiting

    try:
        until(all_held, f"step {step}", seen=lambda: "\n".join(map(output, waiting)))
        yield
    finally:
        for run in runs:
            wake(run)


def wake(run: Path) -> None:
    for process in processes(run):
        with suppress(psutil.NoSuchProcess):
            process.resume()


def output(run: Path) -> str:
    submission = Records(run).submission()
    return Path(submission.folder, f"{submission.job_id}_0_log.out").read_text()


def ended(run: Path) -> Report:
    """Wait until the run's job has ended for good."""
    eventually(lambda: not report(run).active, "the job's end", run)
    return report(run)


def job_id(run: Path) -> str:
    return Records(run).submission().job_id


def attempts(run: Path) -> list[Attempt]:
    return Records(run).attempts()


def assert_finished_like(run: Path, whole: Path) -> None:
    """What was logged and the best model are equal to the bit."""
    assert ended(run).state == "finished", output(run)
    assert report(run).exit_code == 0
    assert logged(run) == logged(whole)
    found, expected = (load_file(path / "best.safetensors") for path in (run, whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    predictions = "predictions/sst-dev-output.csv"
    assert (run / predictions).read_bytes() == (whole / predictions).read_bytes()


def assert_nothing_lost(run: Path) -> None:
    """Every attempt goes on where the one before it stopped."""
    past = attempts(run)
    assert [attempt.first_step for attempt in past[1:]] == [attempt.last_step for attempt in past[:-1]]


def processes(run: Path) -> list[psutil.Process]:
    """The tasks of the run's job on this machine, which is all of its nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "submitit.core._submit" in line and line[-1] == str(run / "slurm") and "srun" not in line[0]:
            found.append(process)
    return found


@contextmanager
def drained(cluster) -> Iterator[None]:
    """No job starts meanwhile."""
    cluster.run("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    try:
        yield
    finally:
        cluster.run("scontrol", "update", "nodename=n1,n2", "state=resume")


def test_two_nodes_train_as_one_machine_does(runs):
    arguments = [*SMALL, "--steps", 8, "--eval-every", 4, "--zero-stage", 2]
    run = submit(runs / "cluster", *arguments, "--nodes", 2, "--tasks-per-node", 2, "--time", "1h")
    local = runs / "local"
    ended(run)
    assert main(["train", "--run", str(local), "--processes", "4", *map(str, arguments)]) == 0
    assert_finished_like(run, local)
    assert RunFolder(run).read_config().parallel.processes == 4
    (attempt,) = attempts(run)
    assert attempt.nodes == "n[1-2]" and attempt.ending is Ending.FINISHED


@pytest.fixture(scope="module")
def disturbed(cluster, runs, whole, alone) -> dict[str, Path]:
    """Four runs at once, two on each node, each ended in its own way."""
    found = {name: runs / name for name in ("time", "requeue", "signal", "killed")}
    with drained(cluster):
        for name, run in found.items():
            size = [*LONG, "--tasks-per-node", 2] if name in ("signal", "killed") else LONGER
            submit(run, *size, "--time", "30m", "--signal-before", 20)
    with held(20, *found.values()):
        job = job_id(found["time"])
        # Limits are in minutes. The last half minute is for SLURM to notice the limit before it is over.
        limit = (time.time() - attempts(found["time"])[0].started + 30) // 60 + 1
        cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={limit:.0f}")
        cluster.run("scontrol", "requeue", job_id(found["requeue"]))
        cluster.run("scancel", "--signal=TERM", job_id(found["signal"]))
        processes(found["killed"])[-1].kill()
        for name in ("signal", "killed"):
            wake(found[name])
        eventually(lambda: attempts(found["time"])[0].ended, "the warning", found["time"])
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")
    return found


def test_a_signal_is_a_request_to_save_and_go_on(disturbed, whole):
    assert_finished_like(disturbed["signal"], whole)
    assert [attempt.ending for attempt in attempts(disturbed["signal"])] == [Ending.STOPPED, Ending.FINISHED]
    assert_nothing_lost(disturbed["signal"])
    assert attempts(disturbed["signal"])[0].last_step >= 20 and report(disturbed["signal"]).requeues == 1


def test_an_operators_requeue_loses_nothing(disturbed, alone):
    assert_finished_like(disturbed["requeue"], alone)
    assert [attempt.ending for attempt in attempts(disturbed["requeue"])] == [Ending.REQUEUED, Ending.FINISHED]
    assert_nothing_lost(disturbed["requeue"])


def test_the_time_limit_is_no_end(disturbed, alone):
    """SLURM warns, perhaps up to a minute early."""
    assert_finished_like(disturbed["time"], alone)
    assert [attempt.ending for attempt in attempts(disturbed["time"])] == [Ending.TIME_LIMIT, Ending.FINISHED]
    assert attempts(disturbed["time"])[0].signal == signal.SIGUSR2
    assert_nothing_lost(disturbed["time"])


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(disturbed, whole, capsys):
    assert_finished_like(disturbed["killed"], whole)
    first, last = attempts(disturbed["killed"])
    assert first.ending is Ending.KILLED and "task" in first.detail and last.ending is Ending.FINISHED
    assert last.first_step >= 10
    assert first.reached >= 20
    assert main(["why", str(disturbed["killed"])]) == 0
    said = capsys.readouterr().out.partition("What happened:")[2].split("\n")[1:]
    assert [line[23:36].strip() for line in said if line] == [
        "submitted", "started", "process killed"[:13], "started", "finished",
    ]  # fmt: skip
    assert f"at step {first.reached}, saved up to {first.last_step}, then requeued" in said[2]
    lost = first.reached - last.first_step
    assert (f"{lost} step" in said[3]) == (lost > 0) and f"from step {last.first_step}" in said[3]


def test_a_waiting_job_is_explained(cluster, runs, capsys):
    """Nobody runs: both nodes are drained."""
    with drained(cluster):
        first = submit(runs / "waits-first", *SMALL, "--steps", 4, "--nodes", 2, "--time", "1h")
        second = submit(runs / "waits-second", *SMALL, "--steps", 4, "--nodes", 2, "--time", "1h")
        eventually(lambda: report(second).state == "pending", "the queue", second)
        capsys.readouterr()
        assert main(["why", str(second)]) == 75
        said = capsys.readouterr().out
        assert "pending" in said and "It waits: " in said
        assert f"It is the 2nd of 2 in the queue of partition main, behind {job_id(first)} (1 of them yours)." in said
        assert "Sooner: no node is idle now, and it wants 2." in said and "timelimit=" in said
        cluster.run("scontrol", "uhold", job_id(second))  # as a user does, whoever runs the tests
        main(["why", str(second)])
        assert f"Sooner: scontrol release {job_id(second)}." in capsys.readouterr().out
        assert main(["cancel", str(first), str(second)]) == 0
        ended(second)


def test_preempted_runs_go_on_where_the_site_requeues_and_where_it_cancels(cluster, runs, whole):
    first, second = runs / "preempted", runs / "cancelled-by-site"
    with drained(cluster):
        submit(first, *LONG, "--tasks-per-node", 2, "--slurm-parameters", "nodelist=n1")
        submit(second, *LONG, "--tasks-per-node", 2, "--partition", "cancel", "--slurm-parameters", "nodelist=n2")
        cluster.run("scontrol", "update", f"jobid={job_id(second)}", "requeue=0")
    with held(20, first, second):
        old = job_id(second)
        cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
        eventually(lambda: all(attempts(run)[0].ended for run in (first, second)), "their preemption", first)
    for run in (first, second):
        assert_finished_like(run, whole)
        assert [attempt.ending for attempt in attempts(run)] == [Ending.PREEMPTED, Ending.FINISHED]
        assert_nothing_lost(run)
    assert job_id(first) == attempts(first)[0].job_id and attempts(first)[0].then == "requeued"
    assert job_id(second) != old and attempts(second)[0].then == f"job {job_id(second)}"


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(cluster, runs, whole):
    run = submit(runs / "lost-node", *LONG, "--nodes", 2)
    with held(25, run):
        cluster.kill_node("n2")
    try:
        eventually(lambda: attempts(run)[0].ended or report(run).state == "pending", "the loss to be noticed", run)
    finally:
        cluster.start_node("n2")
    assert_finished_like(run, whole)
    first, *between, last = [attempt.ending for attempt in attempts(run)]
    assert (first, last) == (Ending.NODE_FAILURE, Ending.FINISHED)
    assert set(between) <= {Ending.STOPPED}  # a busy controller may take the node that returns for lost once more
    assert attempts(run)[-1].first_step >= 20


@contextmanager
def patient(cluster, seconds: int = 90) -> Iterator[None]:
    """Processes that SLURM ends have that long, however slow the machine is."""
    file = cluster.config.slurm_conf
    before = file.read_text()
    file.write_text(before.replace("\nKillWait=5\n", f"\nKillWait={seconds}\n"))
    assert file.read_text() != before
    cluster.run("scontrol", "reconfigure")
    try:
        yield
    finally:
        file.write_text(before)
        cluster.run("scontrol", "reconfigure")


@pytest.fixture(scope="module")
def troubled(cluster, runs) -> dict[str, Path]:
    """Runs at once that end in ways of their own: setup and srun refuse, the batch script is killed, no grace, steps
    that are too large for the memory that processes may have."""
    small = [*SMALL, "--steps", 8, "--eval-every", 8]
    large = [*SMALL, "--steps", 1, "--batch-size", 640, "--setup", "ulimit -d 1048576", "export OMP_NUM_THREADS=1"]
    found = {
        "setup": submit(runs / "setup", *small, "--setup", "true", "module_load cuda", "touch never"),
        "srun": submit(runs / "srun", *small, "--srun-args=--no-such-option"),
        "large": submit(runs / "large", *large),
        "script": runs / "script",
        "grace": runs / "grace",
    }
    with patient(cluster):
        with drained(cluster):
            submit(found["script"], *LONGER, "--slurm-parameters", "nodelist=n1")
            submit(found["grace"], *LONGER, "--slurm-parameters", "nodelist=n2")
        with held(20, found["script"], found["grace"]):
            for name in ("setup", "srun"):
                ended(found[name])
            cluster.run("scancel", "--signal=KILL", "--batch", job_id(found["script"]))
            eventually(lambda: attempts(found["script"])[0].ended, "the script's end", found["script"])
            cluster.run("scontrol", "update", "partitionname=main", "gracetime=0")
            try:
                cluster.run("sbatch", "-p", "urgent", "-w", "n2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
                eventually(lambda: attempts(found["grace"])[0].ended, "the preemption", found["grace"])
            finally:
                cluster.run("scontrol", "update", "partitionname=main", f"gracetime={cluster.config.grace}")
    return found


def test_a_line_of_setup_that_fails_fails_the_job_in_words(troubled):
    found = ended(troubled["setup"])
    assert (found.state, found.exit_code) == ("failed", 2)
    assert found.detail == "setup: `module_load cuda` failed with exit code 127"


def test_arguments_that_srun_does_not_know_fail_the_job_in_its_words(troubled):
    found = ended(troubled["srun"])
    assert (found.state, found.exit_code, found.requeues) == ("failed", 2, 0)
    assert found.detail == "srun: unrecognized option '--no-such-option'"


def test_a_step_that_does_not_fit_into_memory_is_cut(troubled):
    run = troubled["large"]
    assert ended(run).state == "finished", output(run)
    parts = RunFolder(run).read_config().batch.accumulation
    assert parts > 1 and {attempt.ending for attempt in attempts(run)[:-1]} == {Ending.OUT_OF_MEMORY}
    assert f"going on with accumulation={parts}" in attempts(run)[-2].detail


def test_a_killed_batch_script_costs_nothing(troubled, alone):
    """Rank 0, which SLURM asks to end, does what the script would do."""
    assert_finished_like(troubled["script"], alone)
    first, last = attempts(troubled["script"])
    assert (first.ending, first.detail) == (Ending.KILLED, "the batch script was killed")
    assert last.ending is Ending.FINISHED and last.job_id == first.job_id
    assert_nothing_lost(troubled["script"])


def test_a_preemption_without_grace_is_one(troubled, alone):
    assert_finished_like(troubled["grace"], alone)
    assert [attempt.ending for attempt in attempts(troubled["grace"])] == [Ending.PREEMPTED, Ending.FINISHED]


def test_sbatchs_answer_is_lost_and_the_job_is_found(cluster, runs, tmp_path, monkeypatch, capsys):
    """slurmctld stands still: it has the request, and takes the job later. Nothing is submitted twice."""
    run, small = runs / "lost-answer", [*SMALL, "--steps", 4, "--eval-every", 4]
    conf = Path(cluster.environment["SLURM_CONF"]).read_text()
    impatient = tmp_path / "slurm.conf"
    impatient.write_text(conf + "MessageTimeout=2\n")
    controller = psutil.Process(cluster.daemons()["slurmctld"].pid)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(impatient))
        controller.suspend()
        try:
            assert main(["submit", "--run", str(run), *map(str, small)]) == 2
            assert "whether SLURM has taken the job is unknown" in capsys.readouterr().err
            found = report(run)
            assert (found.state, found.active, found.exit_code, found.job_id) == ("unknown", True, 87, "")
            assert main(["submit", "--run", str(run), *map(str, small)]) == 2
            assert "has a job already: unknown" in capsys.readouterr().err
        finally:
            controller.resume()
    eventually(lambda: report(run).state not in ("unknown", "not submitted"), "the job to be found", run)
    assert ended(run).state == "finished", output(run)
    assert job_id(run) == attempts(run)[0].job_id and len(attempts(run)) == 1
    named = cluster.run("squeue", "-h", "-t", "all", "-o", "%i", "--name", run.name).split()
    assert named == [job_id(run)]


def test_neither_filters_nor_another_name_hide_a_job(cluster, runs, monkeypatch, capsys):
    """And what was cancelled while SLURM did not answer does not start; nor does a job that another has replaced."""
    with drained(cluster):
        run, other = submit(runs / "hidden", *SMALL), submit(runs / "replaced", *SMALL)
        filters = {"SQUEUE_PARTITION": "urgent", "SQUEUE_STATES": "RUNNING", "SQUEUE_USERS": "nobody"}
        for name, value in {"LOGNAME": "nobody", "USER": "nobody", "SCANCEL_PARTITION": "urgent", **filters}.items():
            monkeypatch.setenv(name, value)
        assert report(run).state == "pending"
        records = Records(other)
        old = job_id(other)
        records.write_submission(replace(records.submission(), token="another"))
        dead = runs / "dead.conf"
        lines = Path(cluster.environment["SLURM_CONF"]).read_text().splitlines()
        lines = [line for line in lines if not line.startswith("SlurmctldPort=")]
        dead.write_text("\n".join([*lines, "SlurmctldPort=1", "MessageTimeout=1", ""]))
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_CONF", str(dead))
            assert report(run).state == "unknown" and main(["cancel", str(run)]) == 2
            assert "may still wait or run" in capsys.readouterr().err
        assert report(run).state == "pending"
    assert ended(run).state == "cancelled" and RunFolder(run).read_metrics() == []
    done = "squeue", "-h", "-t", "all", "-o", "%T", "-j", old
    eventually(lambda: cluster.run(*done) == "FAILED", "the end of the job that was replaced", other)
    assert "was submitted anew" in output(other) and not attempts(other)


def test_more_nodes_than_there_are_is_refused(runs, capsys):
    assert main(["submit", "--run", str(runs / "wide"), "--nodes", "9"]) == 2
    assert "nodes=9, but the partition main has 2" in capsys.readouterr().err
    assert not (runs / "wide").exists()


def test_an_array_with_failures(cluster, runs, capsys):
    """Six runs, two of which fail: table, log, a second submission of those two, cancelling."""
    folder = runs / "sweep"
    sweep = ["--sweep", "seed=1,2", "lr=0.001,0.002,1e30"]
    arguments = ["submit", "--run", str(folder), *map(str, SMALL), "--steps", "8", "--max-skipped", "2", *sweep]
    assert main([*arguments, "--array-parallelism", "4"]) == 0
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    assert len(found) == 6 and (folder / "seed=1,lr=1e30").is_dir()
    array = {job_id(run).partition("_")[0] for run in found}
    assert len(array) == 1
    states = {run.name: ended(run).state for run in found}
    bad = [run for run in found if run.name.endswith("lr=1e30")]
    assert states == {run.name: "failed" if run in bad else "finished" for run in found}

    capsys.readouterr()
    assert main(["jobs", str(folder), "--json"]) == 0
    rows = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert rows["seed=1,lr=0.001"]["step"] == 8 and rows["seed=1,lr=0.001"]["total"] == 8
    assert "were skipped" in rows["seed=2,lr=1e30"]["detail"]
    assert main(["jobs", str(bad[0])]) == 2
    assert main(["logs", str(bad[0])]) == 0
    said = capsys.readouterr().out
    assert "were skipped" in said and "Traceback" not in said
    accounted = cluster.run("sacct", "-X", "-n", "-P", "-j", job_id(bad[0]), "-o", "State,ExitCode")
    assert accounted == "FAILED|2:0"

    with drained(cluster):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert said.count("finished") == 4 and said.count("Run folder:") == 2
        assert array.isdisjoint(job_id(run).partition("_")[0] for run in bad)
        assert {report(run).state for run in bad} == {"pending"}
        assert main(["submit", "--run", str(bad[0])]) == 2
        assert "has a job already: pending" in capsys.readouterr().err
        assert main(["cancel", str(folder)]) == 0
    assert {ended(run).state for run in bad} == {"cancelled"}
    assert main(["jobs", str(bad[0])]) == 86


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, runs):
    """By `minbert cancel` and by a bare `scancel`, which sends the same signal as a preemption."""
    ours, bare = runs / "cancelled", runs / "scancelled"
    for run in (ours, bare):
        submit(run, *LONGER, "--steps", 20000)
    for run in (ours, bare):
        at_step(run, 10)
    assert main(["cancel", str(ours)]) == 0
    cluster.run("scancel", job_id(bare))
    for run in (ours, bare):
        assert ended(run).state == "cancelled"
        (attempt,) = attempts(run)
        assert attempt.code == 75 and Records(run).newest_step() >= 10 and report(run).exit_code == 86
    assert ended(ours).requeues == 0


def test_a_mismatch_explains_itself(cluster, runs, capsys):
    """SLURM gives something else than the job was meant to have."""
    with drained(cluster):
        run = submit(runs / "mismatch", *SMALL)
        records = Records(run)
        records.write_submission(replace(records.submission(), settings={"nodes": 2, "gpus_per_node": 2}))
    assert ended(run).state == "failed" and report(run).exit_code == 2
    assert main(["logs", str(run)]) == 0
    said = capsys.readouterr().out
    for problem in ("asked for nodes=2, SLURM gave 1", "SLURM starts 1: 1 on n", "has 0 GPU(s) for 1 processes"):
        assert problem in said


def test_a_waiting_job_keeps_its_code(cluster, runs, tmp_path, capsys):
    """The code may be edited, or be gone, before the job starts."""
    source = tmp_path / "checkout"
    for package in ("data", "trainer", "launch", "slurm"):
        shutil.copytree(Path(__file__).parents[2] / package, source / "minbert" / package)
    environment = os.environ | {"PYTHONPATH": str(source)}
    run = runs / "snapshot"
    command = ["-m", "minbert.launch.main", "submit", "--run", str(run), *map(str, SMALL), "--steps", "2"]
    with drained(cluster):
        subprocess.run([sys.executable, *command], env=environment, check=True, timeout=100)
        for file in source.rglob("*.py"):
            file.write_text("raise SystemExit('edited')\n")
    assert ended(run).state == "finished", output(run)
