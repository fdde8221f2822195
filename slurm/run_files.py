"""What a run's own files say of it, whoever trains it: no questions to SLURM."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.data.errors import UserError
from minbert.data.files import is_locked
from minbert.data.reading import read_json_lines
from minbert.slurm.endings import Ending, State
from minbert.slurm.records import Attempt, Records, read_record
from minbert.trainer.checkpoint.format import Damaged, Manifest, published, read_manifest
from minbert.trainer.run.folder import RunFolder


def state_without_job(run: Path) -> tuple[str, int | None]:
    """The state of what `minbert train` does here, and the steps of its budget, from the run's own files."""
    folder = RunFolder(run)
    newest = published(folder.checkpoints)[-1:]
    total, finished = None, False
    try:
        if newest:
            manifest = read_manifest(newest[0])
            wanted = folder.read_config().budget.steps or 0  # which may be more by now
            total = max(manifest.total_steps or 0, wanted) or None
            finished = _is_finished(manifest) and wanted <= (manifest.total_steps or 0)
    except (Damaged, UserError, TypeError, KeyError, AttributeError):
        pass  # whoever resumes the run is told
    if is_locked(run / ".lock"):
        return State.RUNNING, total
    return Ending.FINISHED if finished else State.INTERRUPTED if newest else State.NOT_STARTED, total


def _is_finished(manifest: Manifest) -> bool:
    """Whether the budget was used up, or the patience, and the model evaluated."""
    state, patience = manifest.state, manifest.config.get("budget", {}).get("patience")
    spent = manifest.total_steps is not None and state.step >= manifest.total_steps
    return state.evaluated_at == state.step and (
        spent or (patience is not None and state.stale_evaluations >= patience)
    )


def has_advanced(run: Path, attempt: Attempt | None) -> bool:
    """Whether it was trained further since its job's last attempt."""
    return attempt is None or (attempt.last_step is not None and attempt.last_step < Records(run).newest_step())


@dataclass
class _Trial:
    """What a search knows of the run, if it is a trial of one."""

    status: str
    steps: int | None = None
    error: str | None = None


def read_trial(run: Path) -> dict[str, Any]:
    """Empty if it is none. The process that runs the search may be gone. Raises UserError if the record is damaged."""
    try:
        known = vars(read_record(run / "trial.json", _Trial))
    except FileNotFoundError:
        return {}
    above = list(run.absolute().parents)[:3]
    submitted = any((folder / "slurm").is_dir() for folder in above)  # its lock may be held on another machine
    if known["status"] == State.RUNNING and not submitted and not any(is_locked(folder / ".lock") for folder in above):
        known["status"] = State.INTERRUPTED
    return known


def progress(run: Path) -> tuple[int | None, float | None]:
    """The last logged step, and the best overall score so far."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return None, None
    records = read_json_lines(file)
    found = [record.get("dev/overall") for record in records]
    scores = [score for score in found if isinstance(score, int | float) and math.isfinite(score)]
    return (records[-1]["step"] if records else None), max(scores, default=None)
