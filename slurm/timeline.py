"""What became of a run, in order: its attempts from its own records, what SLURM's accounts add, and, while it runs,
where each of its processes stands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from minbert.data.clock import clock
from minbert.slurm import controller
from minbert.slurm.controller import Life
from minbert.slurm.records import Attempt, Records
from minbert.slurm.supervisor import read_errors
from minbert.slurm.verdict import Error
from minbert.trainer.run.standing import SILENT, Standing, read_standing

TAIL = 12  # lines of a log


@dataclass(frozen=True)
class Event:
    """`moment`: seconds since the epoch."""

    moment: float
    what: str
    more: str = ""

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.moment):%Y-%m-%d %H:%M:%S}  {self.what:<13} {self.more}".rstrip()


def timeline(run: Path) -> list[Event]:
    """The oldest first. Raises UserError for a damaged record."""
    records = Records(run)
    submission, attempts = records.submission(), records.attempts()
    if submission is None and not attempts:
        return _without_job(run)
    jobs = dict.fromkeys([*(attempt.job_id for attempt in attempts), submission.job_id if submission else ""])
    on_cluster = submission is not None and submission.job_settings().executor == "slurm"
    lives = controller.lives(filter(None, jobs)) if on_cluster else {}
    events = [event for job in jobs for event in _of_accounts(job, lives.get(job, []), attempts)]
    if submission and not any(event.what == "submitted" and submission.job_id in event.more for event in events):
        events.append(Event(submission.submitted, "submitted", f"job {submission.job_id or '?'}"))
    for before, attempt in zip([None, *attempts], attempts):
        events += _of_attempt(before, attempt)
    return sorted(events, key=lambda event: event.moment)


def _of_accounts(job: str, lives: Sequence[Life], attempts: Sequence[Attempt]) -> list[Event]:
    """When the job was submitted, and the attempts that left no record."""
    events = []
    if lives and lives[0].submitted:
        events.append(Event(lives[0].submitted.timestamp(), "submitted", f"job {job}"))
    recorded = {attempt.restart for attempt in attempts if attempt.job_id == job}
    for restart, life in enumerate(lives):
        if restart in recorded or life.started is None:
            continue
        events.append(Event(life.started.timestamp(), "started", f"on {life.nodes}, but recorded nothing"))
        if life.ended:
            text = f"exit code {life.exit_code}, by SLURM's accounts"
            events.append(Event(life.ended.timestamp(), life.state.partition(" ")[0].lower(), text))
    return events


def _of_attempt(before: Attempt | None, attempt: Attempt) -> list[Event]:
    text = f"job {attempt.job_id} on {attempt.nodes}, from step {attempt.first_step}"
    if before is not None and before.reached is not None and before.reached > attempt.first_step:
        lost = before.reached - attempt.first_step
        text += f": {lost} step{'' if lost == 1 else 's'} of the last attempt {'is' if lost == 1 else 'are'} lost"
    events = [Event(attempt.started, "started", text)]
    if attempt.ended is not None:
        parts = [attempt.detail.partition("\n")[0]] if attempt.detail else []
        parts.append(f"after {clock(round(attempt.ended - attempt.started))}")
        if attempt.reached is not None:
            parts.append(f"at step {attempt.reached}, saved up to {attempt.last_step}")
        elif attempt.last_step is not None:
            parts.append(f"saved up to step {attempt.last_step}")
        if attempt.then:
            parts.append(f"then {attempt.then}")
        events.append(Event(attempt.ended, str(attempt.ending or "ended"), ", ".join(parts)))
    return events


def _without_job(run: Path) -> list[Event]:
    """Of a run that was started here: its latest start."""
    standing = read_standing(run / "logs" / "rank-0.json")
    if standing is None:
        return []
    count = f"{standing.processes} process{'' if standing.processes == 1 else 'es'}"
    events = [Event(standing.began, "started", f"{count} on {standing.host}, from step {standing.first_step}")]
    if standing.step > standing.first_step:
        events.append(Event(standing.moved, "last step", f"{standing.step} of {standing.total_steps}"))
    if not standing.ended:
        return [*events, Event(standing.written, "last word", standing.activity)]
    done = standing.step >= standing.total_steps
    return [*events, Event(standing.written, "ended", "" if done else f"while {standing.activity}")]


def first_failure(run: Path) -> Error | None:
    """What the rank that failed first left, not one that only lost its connection to it."""
    errors = read_errors(run)
    return next((error for error in errors if not error.lost_peer), errors[0] if errors else None)


def tail(path: Path, most: int = TAIL) -> list[str]:
    """The last lines of a log, at most; none if it is not there."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 65536))
        return file.read().decode(errors="replace").splitlines()[-most:]


def where_they_stand(standings: Sequence[Standing]) -> list[str]:
    """A line for each group of processes that stand at the same place."""
    groups: dict[str, list[int]] = {}
    for standing in standings:
        groups.setdefault(_describe(standing), []).append(standing.rank)
    missing = sorted(set(range(standings[0].processes)) - {standing.rank for standing in standings})
    if missing:
        groups["has told nothing yet: it may still be loading"] = missing
    return [f"{_ranks(ranks)} {text}" for text, ranks in groups.items()]


def _describe(standing: Standing) -> str:
    where = f"on {standing.host}: step {standing.step}"
    if standing.ended:
        return f"{where}, has left"
    if standing.age > SILENT:
        return f"{where}, no sign of life for {clock(round(standing.age))}: the process itself stands still, or is gone"
    doing = f", {standing.activity}" if standing.activity else ""
    waits = " waits for others" if standing.waits else ""
    place = f" at {standing.place}" if standing.place else ""
    return f"{where}{doing},{waits}{place}".rstrip(",")


def suspects(standings: Sequence[Standing]) -> tuple[list[int], str]:
    """The ranks that seem to hold the others up, and why they are suspected."""
    silent = [each.rank for each in standings if each.age > SILENT and not each.ended]
    if silent:
        return silent, "gives no sign of life: look whether its node and its process are well, or are out of memory"
    gone = [each.rank for each in standings if each.ended]
    if gone:
        return gone, "has left, and the others wait for it"
    lowest = min(each.step for each in standings)
    behind = [each.rank for each in standings if each.step == lowest]
    if len(behind) < len(standings):
        return behind, "is behind the others"
    busy = [each.rank for each in standings if not each.waits]
    if busy and len(busy) < len(standings):
        return busy, "does not wait, while the others wait for it"
    return [], ""


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'' if len(parts) == 1 and len(parts[0]) == 1 else 's'} {shown}"
