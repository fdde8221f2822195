"""Questions to SLURM and requests of it: `scontrol` and `squeue` know what waits and runs, `sacct` what has ended.

`sacct` needs the site's accounting; where it is missing, its answers are empty and nothing else is lost. Nothing in the
user's environment filters the answers, and that the controller does not know a job is told from no answer at all.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from minbert.data.errors import UserError, shown

# States of a job that neither waits nor runs any more.
OVER = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "TIMEOUT"),
    )
)
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
PART = 200  # job ids in one question
FOREIGN = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_"),
    "SUBMITIT_",
)
OURS = ("SLURM_CONF", "SLURM_JWT")  # where the cluster is, and who we are


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` tells of a job."""

    state: str
    restarts: int
    preempted: bool  # SLURM has decided to
    started: datetime | None
    ends: datetime | None  # when it has ended, or will at the latest
    minutes: float | None  # its time limit

    @property
    def overtime(self) -> bool:
        """Whether it was ended at its time limit."""
        if self.started is None or self.ends is None or self.minutes is None:
            return False
        return (self.ends - self.started).total_seconds() >= 60 * self.minutes - 1


@dataclass(frozen=True)
class Queued:
    """A job's line in the queue, or in the accounts."""

    state: str
    reason: str = ""
    nodes: str = ""
    comment: str = ""

    @property
    def active(self) -> bool:
        return self.state not in OVER


def call(*command: str, timeout: float = 60.0) -> str:
    """What the command prints. Raises UserError with its complaint if it fails or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=without_job()
        )
    except FileNotFoundError:
        raise _no_slurm(command[0]) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer: `{' '.join(command)}` took {timeout:.0f} s") from None
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def require_commands() -> None:
    """Raises UserError where SLURM's commands are not installed."""
    for command in COMMANDS:
        if not shutil.which(command):
            raise _no_slurm(command)


def _no_slurm(command: str) -> UserError:
    return UserError(
        f"there is no SLURM here: the command {command} is missing. Try --executor local, or leave --slurm out, for "
        "this machine, or log in to the cluster"
    )


def show(job_id: str) -> Job:
    """Raises UserError if SLURM has forgotten the job. An array's element is ARRAY_INDEX: its last one has the plain id
    of the whole array, by which all are shown."""
    fields = detail(job_id)
    if "JobState" not in fields:
        raise UserError(f"`scontrol show job {job_id}` tells no state of the job")
    return Job(
        state=fields["JobState"],
        restarts=_count(fields.get("Restarts")) or 0,
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown"),
        started=_moment(fields.get("StartTime", "")),
        ends=_moment(fields.get("EndTime", "")),
        minutes=_minutes(fields.get("TimeLimit", "")),
    )


def jobs(job_ids: Iterable[str]) -> dict[str, Queued]:
    """Those of the jobs that SLURM still remembers, and their whole arrays, whose elements are ARRAY_INDEX.

    Raises UserError if the controller does not answer.
    """
    wanted = sorted({job_id.partition("_")[0] for job_id in job_ids})
    found: dict[str, Queued] = {}
    for start in range(0, len(wanted), PART):
        try:
            found |= _squeue(f"--jobs={','.join(wanted[start : start + PART])}")
        except UserError as error:
            if "Invalid job id specified" not in str(error):  # which is said of a single job that is forgotten
                raise
    return found


def find(tokens: Iterable[str]) -> dict[str, str]:
    """Token -> id of the job, or array, whose comment ends with it; without those that the controller does not know.

    Raises UserError if the controller does not answer.
    """
    mine = _squeue(f"--user={os.getuid()}")
    return {
        token: job_id.partition("_")[0]
        for token in tokens
        for job_id, job in mine.items()
        if job.comment.endswith(comment(token))
    }


def comment(token: str) -> str:
    return f"minbert:{token}"


def _squeue(which: str) -> dict[str, Queued]:
    """Raises UserError also for an answer that is none: that a job is not in it would say nothing."""
    found = {}
    text = call("squeue", "-h", "-r", "--all", "-t", "all", which, "-o", "%i|%T|%r|%N|%k")
    for line in text.splitlines():
        if re.match(r"\d[^|]*\|[A-Z_]+(\|[^|]*){3}", line):  # a comment may have several lines
            job_id, state, reason, nodes, comment = line.split("|", 4)
            found[job_id] = Queued(state, "" if reason == "None" else reason, nodes, comment)
    if text.strip() and not found:
        raise UserError(f"`squeue` printed {shown(text.strip())}, which is no queue")
    return found


def accounts(job_ids: Iterable[str]) -> dict[str, list[Queued]]:
    """What the accounts tell of every attempt of the jobs, the oldest first; nothing where there are no accounts."""
    wanted = ",".join(sorted(set(job_ids)))
    if not wanted or not shutil.which("sacct"):
        return {}
    try:
        text = call("sacct", "-X", "-n", "-P", "--duplicates", "-j", wanted, "-o", "JobID,State,NodeList")
    except UserError:  # "Slurm accounting storage is disabled"
        return {}
    found: dict[str, list[Queued]] = {}
    for line in text.splitlines():
        if named := re.fullmatch(r"([^|]+)\|([A-Z_]+)[^|]*\|([^|]*)", line):  # "CANCELLED by 1000"
            found.setdefault(named[1], []).append(Queued(named[2], nodes=named[3]))
    return found


@dataclass(frozen=True)
class Life:
    """One attempt of a job as the accounts have it."""

    state: str
    submitted: datetime | None
    started: datetime | None
    ended: datetime | None
    nodes: str
    exit_code: str  # CODE:SIGNAL


def lives(job_ids: Iterable[str]) -> dict[str, list[Life]]:
    """Every attempt of the jobs, the oldest first; nothing where there are no accounts."""
    wanted = ",".join(sorted(set(job_ids)))
    if not wanted or not shutil.which("sacct"):
        return {}
    fields = "JobID,State,Submit,Start,End,NodeList,ExitCode"
    try:
        text = call("sacct", "-X", "-n", "-P", "--duplicates", "-j", wanted, "-o", fields)
    except UserError:
        return {}
    found: dict[str, list[Life]] = {}
    for line in text.splitlines():
        if line.count("|") == 6:
            job_id, state, submitted, started, ended, nodes, code = line.split("|")
            moments = (_moment(text) for text in (submitted, started, ended))
            found.setdefault(job_id, []).append(Life(state, *moments, nodes, code))
    return found


@dataclass(frozen=True)
class Waiting:
    """A job in the queue."""

    job_id: str
    partition: str
    priority: int
    user: str
    reason: str
    start: datetime | None  # when SLURM expects it to start
    minutes: float | None  # its time limit
    nodes: int
    dependency: str

    @property
    def held_back(self) -> bool:
        """Whether it could not start even on an empty cluster."""
        return self.priority == 0 or self.reason.startswith(("Dependency", "JobHeld", "BeginTime"))


def queue(partition: str) -> list[Waiting]:
    """Those that wait for a partition and that we may see, the first to start first. Raises UserError."""
    text = call(
        "squeue", "-h", "-r", "--all", "-t", "PENDING", f"--partition={partition}", "-o", "%i|%P|%Q|%u|%r|%S|%l|%D|%E"
    )
    found = []
    for line in text.splitlines():
        if re.match(r"\d[^|]*\|[^|]*\|\d+(\|[^|]*){6}$", line):
            job_id, name, priority, user, reason, start, limit, nodes, dependency = line.split("|")
            count = int(nodes) if nodes.isdecimal() else 1
            found.append(
                Waiting(
                    job_id, name, int(priority), user, reason, _moment(start), limit_minutes(limit), count, dependency
                )
            )
    return sorted(found, key=lambda job: (job.held_back, -job.priority, _number(job.job_id)))


def _number(job_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", job_id))


def detail(job_id: str) -> dict[str, str]:
    """All that SLURM tells of a job, by its own names. Raises UserError."""
    text = call("scontrol", "--oneliner", "show", "job", job_id)
    return dict(word.split("=", 1) for word in text.partition("\n")[0].split() if "=" in word)


def idle_nodes(partition: str) -> int | None:
    """How many of the partition's nodes have nothing to do; None if SLURM does not tell."""
    try:
        lines = call("sinfo", "-h", "-p", partition, "-o", "%D %T").splitlines()
    except UserError:
        return None
    found = (re.fullmatch(r"(\d+) idle", line.strip()) for line in lines)
    return sum(int(idle[1]) for idle in found if idle)  # a node that is drained counts as idle for `sinfo -t idle`


def limit_minutes(text: str) -> float | None:
    """SLURM's short form of a time limit: `MM:SS`, `HH:MM:SS`, `D-HH:MM:SS`."""
    return _minutes(f"0:{text}" if text.count(":") == 1 and "-" not in text else text)


def requeue(job_id: str) -> None:
    """Raises UserError if the site does not allow it."""
    call("scontrol", "requeue", job_id)


def cancel(job_ids: Iterable[str]) -> None:
    call("scancel", *job_ids)


def down_nodes(nodes: str) -> list[str]:
    """Those of `nodes` (SLURM's expression) that do not answer or are down."""
    if not nodes:
        return []
    try:
        lines = call("sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T").splitlines()
    except UserError:
        return []
    states = {line.split(" ", 1)[0]: line.rstrip().split(" ")[-1] for line in lines if " " in line}
    return sorted(name for name, state in states.items() if state.startswith("down") or state.endswith("*"))


def largest_array() -> int:
    """How many elements an array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"))
    return max(1, int(found[1])) if found else 1000  # 0 where a site has no arrays: runs one by one


def largest_partition(names: str | None) -> tuple[str, int] | None:
    """The largest of the partitions (`a,b`; the default one), and its nodes; None if SLURM does not tell."""
    try:
        lines = call("scontrol", "--oneliner", "--all", "show", "partition").splitlines()
    except UserError:
        return None
    told = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    default = [each.get("PartitionName", "") for each in told if each.get("Default") == "YES"]
    wanted = names.split(",") if names else default
    counts = {each.get("PartitionName"): _count(each.get("TotalNodes")) for each in told}
    sizes = [(name, count) for name in wanted if (count := counts.get(name)) is not None]
    if not wanted or len(sizes) < len(wanted):
        return None
    return max(sizes, key=lambda each: each[1])


def without_job(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without what SLURM's commands would take for options: the variables of the job we run in, and
    the user's own filters and formats."""
    environment = dict(os.environ if environment is None else environment)
    return {name: value for name, value in environment.items() if not name.startswith(FOREIGN) or name in OURS}


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _minutes(text: str) -> float | None:
    """`[days-]hours:minutes:seconds`; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60
