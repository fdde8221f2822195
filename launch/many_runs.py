"""What `minbert tune` and `minbert ablate` have in common: their command lines, the lock on their folder, failed runs
that are tried again, and the way out when Ray has died."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import tyro
from filelock import FileLock, Timeout
from pydantic import create_model

from minbert.data.errors import UserError
from minbert.launch.options import (
    asks_for_help,
    open_option,
    quiet,
    read_options,
    refuse_words,
    run_option_types,
    show_help,
)
from minbert.slurm.settings import JobSettings
from minbert.trainer.config import RunConfig
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.tuning.ablation import ABLATION_FILE
from minbert.tuning.search import SEARCH_FILE, Resources
from minbert.tuning.trial import LOCK, Trial


class Own(NamedTuple):
    """An option of the command itself; `metavar` where the default is none or says nothing."""

    type: Any
    default: Any
    help: str
    metavar: str = ""


class Given(NamedTuple):
    """The options on a command line: the command's own and its trials' resources, a job's, and those of every run."""

    own: dict[str, Any]
    job: dict[str, Any]
    run: dict[str, Any]


def read_command_line(own: Mapping[str, Own], arguments: list[str], command: str, description: str) -> Given:
    """Raises UserError for a wrong option or value; --help ends the program."""
    if asks_for_help(arguments):
        show_help(description, command, _help(own))
    job_types = _types_of(JobSettings) | {"slurm_parameters": tuple[str, ...]}
    own_types = {name: option.type for name, option in own.items()} | _types_of(Resources)
    options, rest = read_options(run_option_types() | job_types | own_types, arguments, command)
    refuse_words(rest)
    if empty := next((name for name in own if options.get(name) == ()), None):
        raise UserError(f"--{empty} needs a value")
    given = Given({}, {}, {})
    for name, value in options.items():
        (given.own if name in own_types else given.job if name in job_types else given.run)[name] = value
    if given.job and not given.own.get("slurm"):
        raise UserError(f"--{next(iter(given.job)).replace('_', '-')} is about a job; add --slurm")
    if "address" in given.own and given.own.get("slurm"):
        raise UserError("--address and --slurm are two places to run; choose one")
    return given


def _types_of(model: Any) -> dict[str, Any]:
    return {name: field.rebuild_annotation() for name, field in model.model_fields.items()}


def _help(own: Mapping[str, Own]) -> dict[str, Any]:
    """name -> (type, default), as `show_help` takes them."""
    shown: dict[str, Any] = {}
    for name, option in own.items():
        kind = option.type if option.default is not None else option.type | None
        text = open_option(option.metavar, help=option.help) if option.metavar else tyro.conf.arg(help=option.help)
        shown[name] = (Annotated[kind, text], option.default)
    parameters = open_option("NAME=VALUE ...", help=JobSettings.model_fields["slurm_parameters"].description)
    job = create_model(
        "JobSettings",
        __base__=quiet(JobSettings),
        __doc__=JobSettings.__doc__,
        slurm_parameters=(Annotated[tuple[str, ...], parameters], ()),
    )
    resources = quiet(Resources)
    return shown | {"resources": (resources, resources()), "job": (job, job())}


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
    from minbert.slurm.status import is_active, look

    if is_active(folder):
        raise UserError(f"{folder} has a job already: {look([folder])[0].summary}")


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
