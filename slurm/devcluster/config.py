"""What a cluster is made of: its numbers, its ports, and the configuration files that SLURM's programs read.

Everything lies in one folder and listens at one address only, if the host's name allows it on the loopback interface.
The settings make SLURM react within seconds, where a real site's defaults take minutes.
"""

import json
import os
import pwd
import random
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minbert.data.errors import UserError

# Below the ephemeral ports, which the system hands out to anybody. A cluster takes one slot of a hundred ports:
# the first is its lock, then the controller, the accounting daemon and the nodes, and from the 20th on srun.
FIRST_PORT, LAST_PORT, SLOT = 20000, 32000, 100
MAX_NODES = 16
LONGEST_FOLDER = 75  # characters; a step's socket below it must fit the 107 that a socket's path may have

FILE = "cluster.json"


@dataclass(frozen=True)
class Config:
    """A cluster's numbers; `save` and `load` keep them in its folder."""

    folder: Path
    port: int  # first of its slot
    nodes: int = 2
    cpus: int = 4
    memory: int = 16000  # MiB per node
    gpus: int = 0  # per node, and fake
    grace: int = 5  # seconds from a preempted job's SIGTERM to its end
    accounting: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)  # of slurm.conf, in place of ours

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise UserError(f"cannot start {self.nodes} nodes: ask for 1 to {MAX_NODES}")
        if self.cpus < 1 or self.memory < 1 or self.gpus < 0 or self.grace < 0:
            raise UserError("a node needs at least one CPU and some memory; gpus and grace are not negative")
        if len(os.fsencode(self.folder)) > LONGEST_FOLDER or set(str(self.folder)) & set(" \t\n%#,"):
            raise UserError(
                f"{self.folder}: sockets need a path of at most {LONGEST_FOLDER} characters without blanks, "
                "commas, % and #: name a shorter folder"
            )

    @property
    def node_names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.nodes + 1)]

    @property
    def cluster_name(self) -> str:
        return f"dev{self.port}"

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge.sock"

    @property
    def database_socket(self) -> Path:
        return self.folder / "mariadb.sock"

    @property
    def controller_address(self) -> tuple[str, int]:
        return host_address(), self.port + 1

    @property
    def accounting_address(self) -> tuple[str, int]:
        return host_address(), self.port + 2

    def save(self) -> None:
        values = asdict(self) | {"folder": str(self.folder), "settings": dict(self.settings)}
        (self.folder / FILE).write_text(json.dumps(values, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Config":
        """Raises: UserError if the folder holds no cluster."""
        try:
            values = json.loads((folder / FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no cluster was started in this folder, or it is stopped already") from None
        return cls(**values | {"folder": Path(values["folder"])})

    def write_files(self) -> None:
        """The configuration, MUNGE's key, the daemons' folders, and a device for each fake GPU."""
        for name in ("log", "pids", "state", *self.node_names):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.slurm_conf.write_text(self._slurm_conf())
        if self.accounting:
            file = self.folder / "slurmdbd.conf"
            file.touch(mode=0o600)  # slurmdbd insists
            file.write_text(self._slurmdbd_conf())
        if self.gpus:
            for index in range(self.gpus):
                (self.folder / f"gpu{index}").symlink_to("/dev/null")  # slurmd wants devices
            nodes = ",".join(self.node_names)
            last = f"[0-{self.gpus - 1}]" if self.gpus > 1 else "0"
            (self.folder / "gres.conf").write_text(
                f"AutoDetect=off\nNodeName={nodes} Name=gpu Flags=nvidia_gpu_env File={self.folder}/gpu{last}\n"
            )

    def _slurm_conf(self) -> str:
        folder, host, user = self.folder, socket.gethostname().partition(".")[0], user_name()
        settings = {
            "ClusterName": self.cluster_name,
            "SlurmctldHost": f"{host}({self.controller_address[0]})",
            "SlurmctldPort": self.controller_address[1],
            "SrunPortRange": f"{self.port + 20}-{self.port + SLOT - 1}",
            "CommunicationParameters": "NoCtldInAddrAny" + (",NoInAddrAny" if listens_at_one_address() else ""),
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # A requeued job waits until its first start's credential has expired: by default two minutes.
            "AuthInfo": f"socket={self.munge_socket},cred_expire=10",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdLogFile": folder / "log/%n.log",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "SlurmdParameters": "config_overrides",  # more CPUs than the machine has
            "DefMemPerCPU": max(1, self.memory // self.cpus),
            "ReturnToService": 2,  # a node that comes back is used again
            "SlurmdTimeout": 10,
            "KillWait": 5,
            "MinJobAge": 300,  # finished jobs stay in squeue that long
            "InactiveLimit": 0,
            "OverTimeLimit": 0,
            "MaxArraySize": 1001,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "JobAcctGatherType": "jobacct_gather/linux",
            "AccountingStorageType": "accounting_storage/none",
        }
        if self.accounting:
            settings |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": self.accounting_address[0],
                "AccountingStoragePort": self.accounting_address[1],
                "AccountingStoragePass": self.munge_socket,
            }
        gres = ""
        if self.gpus:
            settings["GresTypes"] = "gpu"
            gres = f" Gres=gpu:{self.gpus}"
        lines = [f"{name}={value}" for name, value in (settings | dict(self.settings)).items()]
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr={host_address()} Port={self.node_port(name)}"
            f" CPUs={self.cpus} RealMemory={self.memory}{gres}"
            for name in self.node_names
        ]
        lines += [
            f"PartitionName={name} Nodes=ALL {options}"
            for name, options in (
                ("main", f"Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace}"),
                ("cancel", f"PriorityTier=1 PreemptMode=CANCEL GraceTime={self.grace}"),
                ("urgent", "PriorityTier=10 PreemptMode=OFF"),
            )
        ]
        return "\n".join(lines) + "\n"

    def node_port(self, name: str) -> int:
        return self.port + 2 + int(name[1:])

    def _slurmdbd_conf(self) -> str:
        """The database has no port, only a socket: libmariadb finds it by MYSQL_UNIX_PORT."""
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.munge_socket}",
            "DbdHost": "localhost",
            "DbdAddr": self.accounting_address[0],
            "DbdPort": self.accounting_address[1],
            "CommunicationParameters": "NoInAddrAny",
            "SlurmUser": user_name(),
            "PidFile": self.folder / "slurmdbd.pid",
            "LogFile": self.folder / "log/slurmdbd.log",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": user_name(),
            "StorageLoc": "slurm",
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())


def user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def host_address() -> str:
    """Where SLURM's programs listen, if not on all interfaces: the address that this host's name stands for.

    That is 127.0.0.1, or 127.0.1.1 as Debian's installer has it, or in a container its network interface's address.
    """
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def listens_at_one_address() -> bool:
    """Whether slurmd and srun can do without listening on all interfaces.

    They answer to where a connection seems to come from, and on the loopback interface that is always 127.0.0.1.
    """
    address = host_address()
    return address == "127.0.0.1" or not address.startswith("127.")


def reserve_slot() -> tuple[int, socket.socket]:
    """A slot of ports that no other cluster has, and its lock: a socket bound to the slot's first port.

    Whoever inherits the socket keeps the slot. It never listens.
    """
    slots = list(range(FIRST_PORT, LAST_PORT, SLOT))
    random.shuffle(slots)
    for port in slots:
        lock = socket.socket()
        try:
            lock.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        if all(_is_free(port + index) for index in range(1, SLOT)):
            return port, lock
        lock.close()
    raise UserError(f"no {SLOT} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers is no listener
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
