"""An allocation, and what the jobs of a run have left behind, made up."""

from pathlib import Path

from minbert.slurm.allocation import Allocation
from minbert.slurm.endings import Ending
from minbert.slurm.records import Records, Submission

ALLOCATION = Allocation("7", 0, ("n1", "n2"), (2, 1), 0, 0, 0)


def records_of(run: Path, *endings: Ending, step: int = 0) -> Records:
    records = Records(run)
    records.write_submission(Submission("7", str(run / "slurm"), "", {}, "here", 0.0))
    for restart, ending in enumerate(endings):
        records.end(records.begin("7", restart, "n1"), ending)
    return records
