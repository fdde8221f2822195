"""Who may write into a run's folder: one process at a time, and nobody while the run has a job that waits or runs."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minbert.data.errors import UserError
from minbert.slurm.records import Records
from minbert.slurm.status import inspect_runs
from minbert.trainer.run.folder import RunFolder


@contextmanager
def lock_runs(runs: Sequence[Path]) -> Iterator[None]:
    """Lock the runs' folders, before anything is written there. Raises UserError if one of them is somebody else's."""
    with ExitStack() as locks:
        try:
            for run in runs:
                locks.enter_context(RunFolder(run).locked())
        except UserError:
            _refuse_jobs(runs)  # says more
            raise
        _refuse_jobs(runs)
        yield


def _refuse_jobs(runs: Sequence[Path]) -> None:
    submitted = [run for run in runs if Records(run).file.exists()]
    if report := next((report for report in inspect_runs(submitted) if report.active), None):
        raise UserError(
            f"{report.run} has a job already: {report.summary}. Wait for it, or end it by "
            f"`minbert cancel {shlex.quote(str(report.run))}`."
        )
