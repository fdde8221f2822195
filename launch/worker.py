"""One process of a run: `python -m minbert.launch.worker RUN [--force] [--no-predictions] [--locked]`.

The run folder says everything else; rank and number of processes come from the environment. Who starts the processes
has locked the folder, and says so by --locked; otherwise rank 0 does.
"""

import logging
import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

from minbert.launch.processes import record_errors
from minbert.trainer.processes.exit_codes import ExitCode, leave
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder


def work(run: RunFolder, force: bool = False, stop: StopRequest | None = None, predictions: bool = True) -> int:
    """Train in a folder that is locked; then rank 0 scores the best model and writes its predictions, unless that is
    off. `force` resumes from a checkpoint of other settings, other data or another vocabulary. `stop` catches signals
    already."""
    rank = int(os.environ.get("RANK", 0))
    with nullcontext(stop) if stop else StopRequest() as stop:
        _log_to(run.logs / f"rank-{rank}.log", rank)
        from minbert.trainer.run.preparation import require_checkpoints
        from minbert.trainer.train import Outcome, train

        if rank == 0:
            require_checkpoints(run)  # also of a job that starts again, which nothing prepares
        outcome = train(run, stop, force)
        if outcome is Outcome.INTERRUPTED:
            stop.exit_code = ExitCode.INTERRUPTED
            return ExitCode.INTERRUPTED
        if rank == 0 and predictions:
            from minbert.launch.results import is_reported, report

            if outcome is Outcome.FINISHED or not is_reported(run):
                report(run, stop)
        return ExitCode.FINISHED


class _Terminal(logging.Handler):
    """What a person should see at once: errors, and the trainer's own warnings. (The data's were shown when the run was
    prepared.)"""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.name.startswith("minbert.trainer"):
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _log_to(path: Path, rank: int) -> None:
    """Everything goes to the file `path`: our log, the libraries', and Python's warnings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, terminal = logging.FileHandler(path), _Terminal(logging.WARNING)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file] if rank else [file, terminal], force=True)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error
    logging.raiseExceptions = False  # a log that cannot be written, as the disk is full, is no reason to print


def _log_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Trackers write in threads of their own, which a full disk ends: that is nothing for the terminal."""
    error = (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logging.getLogger(__name__).warning("a thread of %s ended with an error", failed.thread, exc_info=error)


if __name__ == "__main__":
    with record_errors():
        folder, *flags = sys.argv[1:]
        run, theirs = RunFolder.existing(Path(folder)), "--locked" in flags or int(os.environ.get("RANK", 0)) > 0
        with nullcontext() if theirs else run.locked():
            code = work(run, "--force" in flags, predictions="--no-predictions" not in flags)
        leave(code)
