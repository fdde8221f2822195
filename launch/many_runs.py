"""What `minbert tune` and `minbert ablate` have in common: their command lines, the lock on their folder, failed runs
that are tried again, and the way out when Ray has died."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from minbert.data.errors import UserError
from minbert.launch.help import Option
from minbert.launch.options import CommandLine, read_command_line, refuse_job_options
from minbert.slurm.status import inspect_runs
from minbert.trainer.config import RunConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.run.folder import RunFolder
from minbert.tuning.ablation import ABLATION_FILE
from minbert.tuning.search import SEARCH_FILE, Resources
from minbert.tuning.trial import LOCK, Trial


def read_many_runs(command: str, description: str, arguments: list[str], options: Mapping[str, Option]) -> CommandLine:
    """The command line of a search or an ablation. Raises UserError for a wrong option or value, or two that do not go
    together, and Help for --help."""
    line = read_command_line(command, description, arguments, options, {"resources": Resources})
    if not line.command.get("slurm"):
        refuse_job_options(line.job)
    if "address" in line.command and line.command.get("slurm"):
        raise UserError("--address and --slurm are two places to run; choose one")
    return line


def merged_resources(saved: Resources | None, given: Mapping[str, Any]) -> Resources:
    """What a trial takes: as it was saved, where nothing else is `given`."""
    update = {name: value for name, value in given.items() if name in Resources.model_fields}
    return (saved or Resources()).model_copy(update=update)


@contextmanager
def only_driver(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Keep others from running the same search or ablation meanwhile; makes the folder if there is none. If the block
    refuses to run, what was made goes again. Raises UserError if somebody runs it, after `patience` seconds."""
    lock = FileLock(folder / LOCK, timeout=patience)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        new = not (folder / LOCK).exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is being run by another process; wait for it, or stop it first") from None
    except FileExistsError:
        raise UserError(f"{folder} is a file; name a folder") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror}") from None
    try:
        yield
    except (UserError, KeyboardInterrupt):
        if new:
            _remove_traces(folder, made)
        raise
    finally:
        lock.release()


def _remove_traces(folder: Path, made: Iterable[Path]) -> None:
    """Of a start that was refused before it wrote anything: the lock, and the folders that were made for it."""
    if (folder / SEARCH_FILE).exists() or (folder / ABLATION_FILE).exists():
        return
    (folder / LOCK).unlink(missing_ok=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # somebody else has put something into it
            return


def refuse_queued(folder: Path) -> None:
    """Raises UserError if the search or ablation has a job that waits or runs."""
    if (folder / "slurm").exists() and (report := inspect_runs([folder])[0]).active:
        raise UserError(f"{folder} has a job already: {report.summary}")


def note_environment(folder: Path) -> None:
    """Record the command, the code and the machine of the first start, which says most; later ones just go on."""
    if not (folder / "environment.json").exists():
        RunFolder(folder).write_environment()


def retry_failed(trials: Iterable[Trial]) -> None:
    """Make failed trials pending again."""
    for trial in trials:
        if trial.status == "failed":
            trial.status, trial.ended, trial.error = "pending", None, None
            trial.write()


def leave_without_ray(command: str) -> NoReturn:
    """End this process, whose Ray has died; what the trials have saved is there."""
    print(f"minbert: Ray's head has died. To go on from the checkpoints: {command}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(ExitCode.INTERRUPTED)


def check_data_and_model(config: RunConfig) -> None:
    """Prepare a run with `config` in a folder that is thrown away: what every trial would fail at shows here, once,
    before anything is started. The tokenised data that it leaves is the trials' own."""
    from minbert.trainer.run.preparation import prepare

    with tempfile.TemporaryDirectory(prefix="minbert-") as folder:
        prepare(config.model_copy(update={"run": Path(folder) / "run"}))
