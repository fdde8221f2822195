"""`minbert train`: prepare the run folder, start the processes, and report."""

import shlex
import sys

from minbert.launch.exit_codes import ExitCode
from minbert.launch.options import parse_run_config
from minbert.launch.processes import launch
from minbert.trainer.preparation import new_run_path, prepare


def main(arguments: list[str]) -> int:
    config = parse_run_config(arguments)
    if config.run is None:
        config = config.model_copy(update={"run": new_run_path(config)})
    run = prepare(config)
    print(f"Run folder: {run.path}")
    if config.parallel.processes == 1:
        from minbert.launch.worker import work

        code = work(run)
    else:
        command = [sys.executable, "-m", "minbert.launch.worker", str(run.path)]
        code = launch(command, config.parallel.processes, run.logs)
    if code == ExitCode.INTERRUPTED:
        print(f"Stopped, and saved. To go on: minbert train --run {shlex.quote(str(run.path))}")
    return code
