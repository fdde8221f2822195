"""`minbert resume RUN`: go on with a run from its newest intact checkpoint, perhaps on other processes."""

from pathlib import Path

from minbert.data.errors import UserError
from minbert.launch.commands.train import start
from minbert.launch.options import asks_for_help, parse_run_config
from minbert.trainer.run.folder import RunFolder


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        parse_run_config(["--help"], "resume RUN", "Go on with the run in the folder RUN; options override its own.")
    if not arguments or arguments[0].startswith("-"):
        raise UserError("usage: minbert resume RUN [options]; RUN is the folder of the run to go on with")
    folder, *options = arguments
    RunFolder.existing(Path(folder))
    config = parse_run_config([f"--run={folder}", *options], "resume")
    if config.run != Path(folder):
        raise UserError(f"which run: {folder} or {config.run}?")
    return start(config, force="--force" in options)
