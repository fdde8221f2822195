"""The private SLURM cluster: that it behaves as the tests of submitting rely on, and that it leaves nothing behind."""

import json
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import until

from minbert.data.errors import UserError
from minbert.slurm.devcluster import DevCluster, cluster
from minbert.slurm.devcluster.__main__ import main
from minbert.slurm.devcluster.config import SLOT, Config, host_address, listens_at_one_address
from minbert.slurm.devcluster.members import Process, members

pytestmark = [
    pytest.mark.xdist_group("devcluster"),
    pytest.mark.skipif(bool(cluster.missing_programs()), reason="SLURM's programs are not installed"),
]

STARTER = """
import subprocess, sys, time
from pathlib import Path
from minbert.slurm.devcluster import DevCluster
with DevCluster.start(Path(sys.argv[1])) as cluster:
    cluster.run("sbatch", "--output=/dev/null", "--chdir=/", "--wrap", "srun sleep 600")
    print("started", flush=True)
    time.sleep(600)
"""


def submit(slurm: DevCluster, *arguments: str) -> str:
    return slurm.run("sbatch", "--parsable", "--output=/dev/null", "--chdir=/", *arguments)


def states(slurm: DevCluster, *jobs: str) -> list[str]:
    return slurm.run("squeue", "--noheader", "--states=all", "--jobs", ",".join(jobs), "--format=%T").split()


def await_state(slurm: DevCluster, state: str, *jobs: str) -> None:
    def seen() -> str:
        log = [line for line in slurm.log("slurmctld").splitlines() if any(f"={job}" in line for job in jobs)]
        shown = [slurm.run("scontrol", "show", "job", job) for job in jobs]
        return "\n".join([*shown, slurm.run("scontrol", "show", "node"), *log[-40:]])

    until(lambda: set(states(slurm, *jobs)) == {state}, f"{state} of jobs {jobs}", seen=seen, pause=0.3)


def await_accounting(slurm: DevCluster, job: str, *expected: str) -> None:
    """The job's runs, the first one first; the accounting lags a few seconds behind."""
    command = ["sacct", "-nPX", "--duplicates", "-j", job, "-o", "State,ExitCode"]
    until(lambda: slurm.run(*command).splitlines() == list(expected), f"{expected} in sacct of job {job}", pause=0.3)


def listening(config: Config) -> set[str]:
    """The addresses at which somebody listens on one of the cluster's ports."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, port = local.split(":")
        if state == "0A" and config.port <= int(port, 16) < config.port + SLOT:
            found.add(socket.inet_ntoa(int(address, 16).to_bytes(4, sys.byteorder)))
    return found


def assert_nothing_left(config: Config, processes: set[Process]) -> None:
    assert processes
    assert not [process for process in processes if process.alive()]
    assert not members(config.slurm_conf)
    assert not listening(config)
    assert not config.folder.exists()


@pytest.fixture
def folder(tmp_path_factory):
    """A short path: sockets need one."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as path:
        yield Path(path) / "c"


def test_one_step_spans_the_nodes(devcluster):
    output = devcluster.run("srun", "--nodes=2", "--ntasks=2", "--label", "printenv", "SLURMD_NODENAME")
    assert sorted(output.splitlines()) == ["0: n1", "1: n2"]


def test_two_jobs_share_a_node(devcluster):
    jobs = [submit(devcluster, "--nodelist=n1", "--wrap", "sleep 600") for _ in range(2)]
    await_state(devcluster, "RUNNING", *jobs)
    devcluster.run("scancel", *jobs)
    await_state(devcluster, "CANCELLED", *jobs)


def test_accounting_knows_how_jobs_ended(devcluster):
    good, bad = (submit(devcluster, "--wrap", f"exit {code}") for code in (0, 3))
    await_accounting(devcluster, good, "COMPLETED|0:0")
    await_accounting(devcluster, bad, "FAILED|3:0")


def test_array(devcluster):
    job = submit(devcluster, "--array=0-2", "--wrap", "exit $SLURM_ARRAY_TASK_ID")
    until(lambda: sorted(states(devcluster, job)) == ["COMPLETED", "FAILED", "FAILED"], "the array")


@pytest.mark.skipif(not listens_at_one_address(), reason="this host's name stands for an address like 127.0.1.1")
def test_everything_listens_at_one_address(devcluster):
    job = submit(devcluster, "--wrap", "srun sleep 600")
    await_state(devcluster, "RUNNING", job)
    assert listening(devcluster.config) == {host_address()}
    devcluster.run("scancel", job)


@pytest.fixture(scope="module")
def ended(devcluster) -> dict[str, str]:
    """Jobs that SLURM itself ends, by name: at once, as each takes it half a minute."""
    jobs = {
        "late": submit(devcluster, "--nodelist=n1", "--partition=urgent", "--time=5", "--wrap", "sleep 600"),
        "requeued": submit(devcluster, "--nodelist=n1", "--cpus-per-task=2", "--wrap", "sleep 600"),
        "cancelled": submit(devcluster, "--nodelist=n1", "--partition=cancel", "--wrap", "sleep 600"),
        "lost": submit(devcluster, "--nodelist=n2", "--wrap", "sleep 600"),
        "lost for good": submit(devcluster, "--nodelist=n2", "--no-requeue", "--wrap", "sleep 600"),
    }
    await_state(devcluster, "RUNNING", *jobs.values())
    # Limits are in minutes, but one that is lowered to nothing has passed already.
    devcluster.run("scontrol", "update", f"jobid={jobs['late']}", "timelimit=0")
    # It wants the whole node: with less, the end of the late one might already be enough beside one of the others.
    submit(devcluster, "--nodelist=n1", "--partition=urgent", "--cpus-per-task=4", "--wrap", "true")
    devcluster.kill_node("n2")
    # Asked for all nodes: what slurmctld answers about a single one may be as old as the last question about all.
    nodes = ["sinfo", "--noheader", "--Node", "--format=%N %t"]
    until(lambda: "n2 down*" in devcluster.run(*nodes), "the node's death to be seen")
    devcluster.start_node("n2")
    yield jobs
    devcluster.run("scancel", *jobs.values())


def await_restart(slurm: DevCluster, job: str) -> None:
    await_state(slurm, "RUNNING", job)
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", job)


def test_a_dead_node_comes_back_and_its_job_too(devcluster, ended):
    await_state(devcluster, "NODE_FAIL", ended["lost for good"])
    await_restart(devcluster, ended["lost"])
    await_accounting(devcluster, ended["lost"], "NODE_FAIL|0:0", "RUNNING|0:0")


def test_preemption_requeues(devcluster, ended):
    await_restart(devcluster, ended["requeued"])
    await_accounting(devcluster, ended["requeued"], "PREEMPTED|0:0", "RUNNING|0:0")


def test_preemption_cancels(devcluster, ended):
    await_state(devcluster, "PREEMPTED", ended["cancelled"])


def test_time_limit(devcluster, ended):
    await_state(devcluster, "TIMEOUT", ended["late"])
    await_accounting(devcluster, ended["late"], "TIMEOUT|0:0")


def test_a_second_cluster_beside_the_first_leaves_nothing(devcluster, folder):
    with DevCluster.start(folder, nodes=1, cpus=16, gpus=2) as second:
        config = second.config
        assert config.port != devcluster.config.port
        assert second.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1"
        jobs = [submit(second, "--wrap", "srun sleep 600") for _ in range(3)]
        await_state(second, "RUNNING", *jobs)
        processes = {process for process in second.daemons().values() if process} | members(config.slurm_conf)
    assert_nothing_left(config, processes)
    assert all(devcluster.daemons().values())
    assert devcluster.run("srun", "printenv", "SLURM_CLUSTER_NAME") == devcluster.config.cluster_name


def test_a_killed_starter_leaves_nothing(folder):
    with subprocess.Popen([sys.executable, "-c", STARTER, str(folder)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout.readline() == b"started\n"
        slurm = DevCluster(folder)
        await_state(slurm, "RUNNING", "1")
        processes = {process for process in slurm.daemons().values() if process} | members(slurm.config.slurm_conf)
        starter.send_signal(signal.SIGKILL)
    until(lambda: not folder.exists(), "the end of the cluster")
    assert_nothing_left(slurm.config, processes)


def test_command_line(folder, capfd):
    assert main(["start", str(folder), "--nodes", "1", "--no-accounting"]) == 0
    assert f"export SLURM_CONF={folder}/slurm.conf\n" in capfd.readouterr().out
    slurm = DevCluster(folder)
    processes = {process for process in slurm.daemons().values() if process}
    assert main(["status", str(folder)]) == 0
    slurm.kill_node("n1")
    assert main(["status", str(folder)]) == 1
    assert main(["stop", str(folder)]) == 0
    assert_nothing_left(slurm.config, processes)
    assert main(["stop", str(folder)]) == 2
    assert "no cluster was started in this folder" in capfd.readouterr().err


def test_a_daemon_that_fails_is_named_and_nothing_is_left(folder):
    with pytest.raises(UserError, match=r"(?s)slurmctld died; its last words:.*select/nonsense"):
        DevCluster.start(folder, accounting=False, settings={"SelectType": "select/nonsense"})
    assert not members(folder / "slurm.conf")
    assert not folder.exists()


def test_mistakes_are_explained(folder, tmp_path, monkeypatch):
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(UserError, match="in use: name a new or an empty folder"):
        DevCluster.start(folder)
    with pytest.raises(UserError, match="ask for 1 to 16"):
        DevCluster.start(folder / "new", nodes=17)
    with pytest.raises(UserError, match="name a shorter folder"):
        DevCluster.start(folder / ("long" * 20))
    monkeypatch.setattr(cluster, "SEARCHED", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get install --no-install-recommends mariadb-client-core .*slurmdbd"):
        DevCluster.start(folder / "new")
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_settings_are_kept(folder):
    with DevCluster.start(folder, accounting=False, settings={"MaxArraySize": "3"}) as slurm:
        assert json.loads((folder / "cluster.json").read_text())["settings"] == {"MaxArraySize": "3"}
        with pytest.raises(UserError, match="Invalid job array specification"):
            submit(slurm, "--array=0-3", "--wrap", "true")
