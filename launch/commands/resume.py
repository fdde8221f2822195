"""`minbert resume RUN`: go on with a run from its newest intact checkpoint, perhaps on other processes."""

from pathlib import Path

from minbert.data.errors import UserError
from minbert.launch.commands.train import start
from minbert.launch.options import asks_for_help, build_run_config, read_run_options, run_option_types
from minbert.launch.words import read_options
from minbert.trainer.run.folder import RunFolder

DESCRIPTION = "Go on with the run in the folder RUN; options override its own."


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        read_run_options(arguments, "resume RUN", DESCRIPTION)
    options, words = read_options(run_option_types(), arguments, "resume")
    if len(words) != 1:
        raise UserError("usage: minbert resume RUN [options]; RUN is the folder of the run to go on with")
    folder = RunFolder.existing(Path(words[0])).path
    config = build_run_config({"run": folder} | options)
    if config.run != folder:
        raise UserError(f"which run: {folder} or {config.run}?")
    return start(config, force=options.get("force", False))
