"""Why a job waits, in words: SLURM's reason, its place in the queue, when it is expected to start, and what would make
that sooner."""

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from minbert.slurm import controller
from minbert.slurm.controller import Waiting

# SLURM's word -> what it means. What waits for ever says so.
REASONS = {
    "None": "SLURM has not looked at it yet",
    "Resources": "it is next, and what it asks for is in use",
    "Priority": "other jobs come first",
    "BeginTime": "it may not begin yet: SLURM lets a requeued job rest for about two minutes",
    "Cleaning": "its last start is still being cleaned up",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "for ever: what it depends on has failed",
    "JobHeldUser": "you, or a command of yours, hold it",
    "JobHeldAdmin": "an administrator holds it",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "BadConstraints": "for ever: no node is what it asks for",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionConfig": "for ever: it asks for more than the partition has",
    "PartitionNodeLimit": "for ever: it asks for more nodes than the partition has or allows",
    "PartitionTimeLimit": "for ever: it asks for more time than the partition allows",
    "JobArrayTaskLimit": "as many of its array run as may at once (--array-parallelism)",
    "Licenses": "the licenses that it needs are in use",
    "Reservation": "its reservation has not begun, or is over",
    "NodeDown": "a node that it needs is down",
}
LIMITS = ("QOS", "Assoc", "MaxJobs", "MaxCpu", "MaxNode", "MaxGRES", "MaxMem", "MaxSubmit", "MaxTRES")
NEVER = ("BadConstraints", "DependencyNeverSatisfied", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit")


def explain(run: Path, job_id: str, now: datetime | None = None) -> list[str]:
    """Lines on the waiting job. Raises UserError if SLURM does not answer, or has forgotten the job."""
    now = now or datetime.now()
    job = controller.detail(job_id)
    partition = job.get("Partition", "")
    waiting = controller.queue(partition)
    own = next((other for other in waiting if other.job_id == job_id), None)
    reason = job.get("Reason", "None").partition(",")[0]
    lines = [f"It waits: {in_words(job.get('Reason', 'None'))}."]
    if own is not None and not own.held_back:
        lines.append(_place(own, waiting, partition))
    start = own.start if own else None
    if start is not None and start > now:
        lines.append(f"SLURM expects it to start {_when(start, now)}.")
    elif reason not in NEVER:
        lines.append("SLURM does not say when it will start.")
    advice = sooner(run, job_id, job, own, waiting, controller.idle_nodes(partition), now)
    return lines + [f"Sooner: {text}" for text in advice]


def in_words(reason: str) -> str:
    """`reason` as SLURM has it: a word, perhaps with details behind a comma."""
    word = reason.partition(",")[0]
    if word.startswith(LIMITS):
        return f"a limit on you, your account or its QOS is reached ({reason})"
    meaning = REASONS.get(word)
    if meaning is None:
        return f"SLURM says {reason}"
    return f"{meaning} ({reason})"


def _place(own: Waiting, waiting: Sequence[Waiting], partition: str) -> str:
    ready = [job for job in waiting if not job.held_back]
    before = ready[: ready.index(own)]
    mine = sum(job.user == own.user for job in before)
    text = f"It is the {ordinal(len(before) + 1)} of {len(ready)} in the queue of partition {partition}"
    if before:
        text += f", behind {', '.join(job.job_id for job in before[:5])}{' and others' if len(before) > 5 else ''}"
        text += f" ({mine} of them yours)" if mine else ""
    return text + "."


def ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def sooner(
    run: Path,
    job_id: str,
    job: dict[str, str],
    own: Waiting | None,
    waiting: Sequence[Waiting],
    idle: int | None,
    now: datetime,
) -> list[str]:
    """What whoever owns the job can do, the surest first."""
    reason, name = job.get("Reason", "None").partition(",")[0], shlex.quote(str(run))
    again = f"minbert cancel {name}, then minbert submit --run {name}"
    if reason == "BeginTime":
        return [f"scontrol update jobid={job_id} starttime=now (operators may)."]
    if reason == "JobHeldUser":
        return [f"scontrol release {job_id}."]
    if reason == "JobHeldAdmin":
        return [f"ask those who run the cluster why they hold it; scontrol release {job_id} is theirs."]
    if reason in ("Dependency", "DependencyNeverSatisfied"):
        return [f"it depends on {job.get('Dependency', 'another job')}; {again} without that."]
    if reason == "PartitionTimeLimit":
        return [f"{again} --time with less than {job.get('TimeLimit', 'now')}."]
    if reason in NEVER:
        return [f"{again} with what the partition has: fewer --nodes, --gpus-per-node or another --partition."]
    if reason.startswith(LIMITS):
        return ["end or wait for other jobs of yours, or ask for less: fewer --nodes, another --qos or --account."]
    if own is None or own.held_back:
        return []
    found = []
    if idle is not None and idle < own.nodes:
        there = {0: "no node is", 1: "1 node is"}.get(idle, f"{idle} nodes are")
        text = f"{there} idle now, and it wants {own.nodes}."
        found.append(text + (f" {again} --nodes {idle} may start at once." if idle else ""))
    before = [other for other in waiting[: waiting.index(own)] if not other.held_back and other.start]
    gap = min(((other.start - now).total_seconds() / 60 for other in before if other.start), default=0.0)
    if idle is not None and idle >= own.nodes and gap >= 2 and (own.minutes is None or own.minutes > gap):
        found.append(
            f"nodes for it are idle until job {before[0].job_id} starts in {gap:.0f} min: with a time limit below that "
            f"it may go first (scontrol update jobid={job_id} timelimit={max(1, int(gap) - 1)})."
        )
    elif own.minutes is None or own.minutes > 30:
        limit = "none" if own.minutes is None else f"{own.minutes:.0f} min"
        found.append(
            f"a shorter time limit (now {limit}) lets SLURM fit it into gaps: scontrol update jobid={job_id} "
            "timelimit=MINUTES; it goes on by itself after the limit."
        )
    return found


def _when(start: datetime, now: datetime) -> str:
    minutes = (start - now).total_seconds() / 60
    moment = f"{start:%H:%M}" if start.date() == now.date() else f"{start:%Y-%m-%d %H:%M}"
    return f"at {moment}, in {minutes:.0f} min" if minutes < 120 else f"at {moment}, in {minutes / 60:.0f} h"
