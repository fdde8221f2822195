"""From defaults, file and command line to one configuration: the later wins, and nothing unknown passes."""

from pathlib import Path
from typing import TypeVar

import tyro

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig
from minbert.trainer.run_folder import RunFolder, read_config_file

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], command: str, default: T | None = None, description: str = "") -> T:
    """`arguments` as a `kind`, options without the names of their sections. A wrong option or value ends the program
    with a message that names the nearest valid ones, and exit code 2."""
    return tyro.cli(
        kind,
        args=arguments,
        prog=f"minbert {command}",
        default=default,
        description=description or None,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def parse_run_config(arguments: list[str]) -> RunConfig:
    """A run's configuration: defaults < the run folder's own < `--config FILE` < options."""
    arguments, file = _take(arguments, "--config")
    _, run = _take(arguments, "--run")
    base = RunConfig()
    if run is not None and (folder := RunFolder(Path(run))).config_file.exists():
        base = folder.read_config()
    if file is not None:
        if base != RunConfig():
            raise UserError(f"{run} has a configuration of its own; resume it without --config, or take another --run")
        base = read_config_file(Path(file))
    description = (
        "Train minBERT on several tasks at once, or resume the run in --run.\n\n"
        "--config FILE reads a YAML file first: the same options, alone or under the headings below."
    )
    return parse(RunConfig, arguments, "train", base, description)


def _take(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """`arguments` without `option`, and its value; both `--option value` and `--option=value`."""
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise UserError(f"{option} needs a value")
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
        if argument.startswith(f"{option}="):
            return arguments[:index] + arguments[index + 1 :], argument.partition("=")[2]
    return arguments, None
