"""One process of a run: `python -m minbert.launch.worker RUN`, whoever starts it.

The run folder says everything else; rank and number of processes come from the environment.
"""

import logging
import os
import sys
from pathlib import Path

from minbert.launch.exit_codes import ExitCode
from minbert.launch.processes import record_errors
from minbert.trainer.run_folder import RunFolder


def work(run: RunFolder) -> int:
    """Train; then rank 0 scores the best model and writes its predictions."""
    rank = int(os.environ.get("RANK", 0))
    _log_to(run.logs / f"rank-{rank}.log")
    from minbert.trainer.train import Outcome, train

    if train(run) is Outcome.INTERRUPTED:
        return ExitCode.INTERRUPTED
    if rank == 0:
        from minbert.launch.results import report

        report(run)
    return ExitCode.FINISHED


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


if __name__ == "__main__":
    with record_errors():
        sys.exit(work(RunFolder.existing(Path(sys.argv[1]))))
