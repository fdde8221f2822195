"""`DevCluster`: starts SLURM's daemons in a folder of their own, waits until they serve, and ends them without trace.

The daemons run as the user who starts them, who is also the cluster's only user. MUNGE signs the messages, MariaDB
keeps the accounting. A cluster may outlive its starter (the command line) or die with it (tests): then a small guard
process ends it.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minbert.data.errors import UserError
from minbert.slurm.devcluster.config import Config, reserve_slot, user_name
from minbert.slurm.devcluster.members import CONTROLLER, Process, end, hold, members

POLL = 0.1  # seconds between two looks at what is awaited
PATIENCE = 60.0  # seconds for a daemon to serve: far more than it takes, as the machine may be busy
TAIL = 15  # lines shown of a failed daemon's output
SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # an ordinary user's PATH lacks the latter

# program -> Debian's package
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    "sacctmgr": "slurm-client",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb-install-db calls it
}

# Its input ends when the starter is gone. What was being started then has a second to become visible.
GUARD = 'read -r _; sleep 1; exec "$@"'


class DevCluster:
    """A running cluster. `DevCluster.start()` makes one; `DevCluster(folder)` takes hold of one that runs.

    As a context manager it stops the cluster at the end of the block.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: UserError if no cluster was started in `folder`."""
        self.config = Config.load(folder.absolute())
        self.folder = self.config.folder
        self._children: list[subprocess.Popen] = []  # daemons that this process has to reap
        self._guard: subprocess.Popen | None = None

    @classmethod
    def start(
        cls,
        folder: Path | None = None,
        *,
        nodes: int = 2,
        cpus: int = 4,
        memory: int = 16000,
        gpus: int = 0,
        grace: int = 5,
        accounting: bool = True,
        settings: Mapping[str, str] | None = None,
        outlive: bool = False,
    ) -> "DevCluster":
        """Starts a cluster and returns when jobs can be submitted and `sacct` answers.

        Args:
            folder: where everything is kept; must be new or empty. Default: a new one among the temporary files.
            nodes: number of nodes, named n1, n2, ...
            cpus: per node, whatever the machine has.
            memory: per node, in MiB; booked, not enforced.
            gpus: per node; fake, for `--gpus-per-node` and CUDA_VISIBLE_DEVICES.
            grace: seconds between a preempted job's SIGTERM and its end (GraceTime of `main` and `cancel`).
            accounting: without it there is no `sacct`, and no MariaDB.
            settings: parameters of slurm.conf in place of this module's.
            outlive: the cluster goes on when this process ends; otherwise it ends with it, however that happens.

        Raises: UserError if a program is missing, the folder is in use, or a daemon fails: then nothing is left.
        """
        _require_programs(accounting)
        port, lock = reserve_slot()
        with lock:
            folder = _make_folder(folder)
            try:
                Config(folder, port, nodes, cpus, memory, gpus, grace, accounting, settings or {}).save()
                cluster = cls(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
            try:
                if not outlive:
                    cluster._start_guard()
                cluster.config.write_files()
                cluster._start_daemons(lock)
            except BaseException:
                cluster.stop()
                raise
        return cluster

    def stop(self) -> None:
        """Ends all its processes, running jobs' too, and removes the folder."""
        while found := self._members():
            end(found)
        self._reap()
        if self.folder.exists():  # nobody else has stopped it
            shutil.rmtree(self.folder)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()

    def __enter__(self) -> "DevCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What to add to a process's environment, so that SLURM's commands there mean this cluster."""
        return {"SLURM_CONF": str(self.config.slurm_conf)}

    def run(self, *command: str, timeout: float = 60.0) -> str:
        """What a command, such as `squeue -h`, prints on this cluster.

        Raises: UserError with what it complained of, if it fails or takes longer than `timeout` seconds.
        """
        try:
            result = subprocess.run(
                command, env=self._clean_environment(), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"`{' '.join(command)}` took longer than {timeout:.0f} s") from None
        if result.returncode != 0:
            problem = result.stderr.strip() or result.stdout.strip()
            raise UserError(f"`{' '.join(command)}` failed with exit code {result.returncode}: {problem}")
        return result.stdout.strip()

    def kill_node(self, name: str) -> None:
        """SIGKILL to the node's slurmd and to all that runs there, at once, as when its power fails.

        The controller notices after SlurmdTimeout: then the node is down, and its jobs are requeued or NODE_FAIL.
        """
        self._require_node(name)
        hold(self.config.slurm_conf, name)  # or the last to die would report how a job's processes died
        while found := members(self.config.slurm_conf, name):
            end(found)
        self._reap()

    def start_node(self, name: str) -> None:
        """Brings a killed node back, and returns when it takes jobs; does nothing if it runs.

        The controller gives up the jobs that it still believed to run there, those of the last seconds a while later.
        """
        self._require_node(name)
        if self.daemons().get(name):
            return
        since = int(time.time())
        self._start_slurmd(name)
        self._await_node(name, since)

    def daemons(self) -> dict[str, Process | None]:
        """Name -> process, or None if it is dead."""
        processes = {file.name: Process.read(file) for file in sorted((self.folder / "pids").glob("*"))}
        return {name: process if process.alive() else None for name, process in processes.items()}

    def log(self, name: str) -> str:
        """What a daemon logged: munged, mariadbd, slurmdbd, slurmctld, or a node's slurmd and its steps."""
        files = [self.folder / "log" / f"{name}.{ending}" for ending in ("log", "out")]
        return next((file.read_text(errors="replace") for file in files if file.exists()), "")

    def _members(self) -> set[Process]:
        return members(self.config.slurm_conf) | {process for process in self.daemons().values() if process}

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    def _require_node(self, name: str) -> None:
        if name not in self.config.node_names:
            raise UserError(f"no node {name}: there are {', '.join(self.config.node_names)}")

    def _clean_environment(self) -> dict[str, str]:
        """This process's, without the variables of a cluster that it may be running on itself."""
        foreign = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return inherited | self.environment

    def _daemon_environment(self, node: str) -> dict[str, str]:
        return self._clean_environment() | {"PATH": SEARCHED, "SLURMD_NODENAME": node}

    def _start_guard(self) -> None:
        stop = [sys.executable, "-m", "minbert.slurm.devcluster", "stop", str(self.folder)]
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", *stop],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def _start_daemons(self, lock: socket.socket) -> None:
        config = self.config
        options = {
            "socket": config.munge_socket,
            "key-file": self.folder / "munge.key",
            "log-file": self.folder / "log/munged.log",
            "pid-file": self.folder / "munged.pid",
            "seed-file": self.folder / "munged.seed",
        }
        # --force: it wants a folder open to everybody, who have no business here. It lives as long as the cluster.
        command = ["munged", "--foreground", "--force", *_long(options)]
        self._start("munged", command, pass_fds=[lock.fileno()])
        self._await("munged", lambda: _answers(config.munge_socket))
        if config.accounting:
            self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        self._await("slurmctld", lambda: _answers(config.controller_address))
        for name in config.node_names:
            self._start_slurmd(name)
        for name in config.node_names:
            self._await_node(name)
        if config.accounting:
            registered = ["sacctmgr", "-nP", "list", "cluster", config.cluster_name, "format=ControlPort"]
            self._await("slurmdbd", lambda: self.run(*registered) == str(config.controller_address[1]))
            self.run("sacct")

    def _start_accounting(self) -> None:
        """The database, its daemon, and the cluster's entry there, without which slurmctld would not be served."""
        config = self.config
        data = _long({"datadir": self.folder / "mariadb"} | ({"user": "root"} if os.getuid() == 0 else {}))
        install = ["mariadb-install-db", "--no-defaults", *data, "--skip-test-db"]
        install += _long({"auth-root-authentication-method": "socket", "auth-root-socket-user": user_name()})
        with (self.folder / "log" / "mariadb-install-db.out").open("wb") as output:
            # In a folder that another cluster shares, each would remove the other's temporary tables.
            environment = self._daemon_environment(CONTROLLER) | {"TMPDIR": str(self.folder)}
            done = subprocess.run(install, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise UserError(self._failure("mariadb-install-db", f"failed with exit code {done.returncode}"))
        options = {
            "socket": config.database_socket,
            "pid-file": self.folder / "mariadbd.pid",
            "tmpdir": self.folder,
            "innodb-buffer-pool-size": "16M",
            "innodb-flush-log-at-trx-commit": 0,  # nobody will miss the last second
        }
        self._start("mariadbd", ["mariadbd", "--no-defaults", *data, "--skip-networking", *_long(options)])
        self._await("mariadbd", lambda: _answers(config.database_socket))
        self._start("slurmdbd", ["slurmdbd", "-D"], {"MYSQL_UNIX_PORT": str(config.database_socket)})
        self._await("slurmdbd", lambda: _answers(config.accounting_address))
        self.run("sacctmgr", "-i", "add", "cluster", config.cluster_name)

    def _start_slurmd(self, name: str) -> None:
        self._start(name, ["slurmd", "-D", "-N", name], node=name)

    def _start(
        self,
        name: str,
        command: Sequence[str],
        extra: Mapping[str, str] | None = None,
        node: str = CONTROLLER,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts a daemon in the background and in a session of its own, and notes which process it is."""
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            child = subprocess.Popen(
                command,
                env=self._daemon_environment(node) | dict(extra or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        self._children.append(child)
        process = Process.find(child.pid)
        if process is None:
            raise UserError(self._failure(name, "died"))
        process.write(self.folder / "pids" / name)

    def _await(self, daemon: str, ready: Callable[[], bool]) -> None:
        """Waits until `ready`; a `UserError` of it counts as not yet.

        Raises: UserError with the daemon's last words, when it dies or takes too long.
        """
        deadline, reason = time.monotonic() + PATIENCE, ""
        while True:
            try:
                if ready():
                    return
            except UserError as error:
                reason = f": {error}"
            for name, process in self.daemons().items():
                if process is None and name in (daemon, "slurmctld"):  # the nodes answer through slurmctld
                    raise UserError(self._failure(name, "died"))
            if time.monotonic() > deadline:
                raise UserError(self._failure(daemon, f"does not serve after {PATIENCE:.0f} s{reason}"))
            time.sleep(POLL)

    def _await_node(self, name: str, since: int = 0) -> None:
        """Until the node takes jobs, and has registered with a slurmd that was started at `since` or later."""

        def ready() -> bool:
            line = self.run("scontrol", "--oneliner", "show", "node", name)
            shown = dict(field.split("=", 1) for field in line.split() if "=" in field)
            started = shown.get("SlurmdStartTime", "None")
            if started == "None" or time.mktime(time.strptime(started, "%Y-%m-%dT%H:%M:%S")) < since:
                return False
            return shown["State"] in ("IDLE", "MIXED", "ALLOCATED")

        self._await(name, ready)

    def _failure(self, name: str, what: str) -> str:
        output = self.folder / "log" / f"{name}.out"
        lines = output.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n  ".join([f"the development cluster's {name} {what}; its last words:", *(lines or ["(none)"])])


def missing_programs(accounting: bool = True) -> list[str]:
    """Of those a cluster needs, the ones that are not installed."""
    needed = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    return [program for program in needed if not shutil.which(program, path=SEARCHED)]


def _require_programs(accounting: bool) -> None:
    missing = missing_programs(accounting)
    if missing:
        packages = sorted({(PROGRAMS | ACCOUNTING_PROGRAMS)[program] for program in missing})
        raise UserError(
            f"the development cluster needs {', '.join(missing)}: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )


def _make_folder(folder: Path | None) -> Path:
    """A folder that nobody else can enter."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="devcluster-"))
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use: name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def _answers(address: tuple[str, int] | Path) -> bool:
    """Whether somebody listens at this address and port, or on this socket."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            return False
    return True


def _long(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
