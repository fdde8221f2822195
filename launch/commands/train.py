"""`minbert train`: prepare the run folder, start the processes, and report."""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from minbert.launch.options import build_run_config, read_run_options
from minbert.launch.ownership import lock_runs
from minbert.launch.processes import launch
from minbert.launch.worker import work
from minbert.trainer.config import RunConfig
from minbert.trainer.model.memory import require_memory
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.world import require_devices, require_precision
from minbert.trainer.run.data import reading_once
from minbert.trainer.run.out_of_memory import once_here, until_it_fits
from minbert.trainer.run.preparation import in_folder, known_shape, prepare
from minbert.trainer.run.progress import say


def main(arguments: list[str]) -> int:
    return train(read_run_options(arguments))


def train(options: Mapping[str, Any]) -> int:
    """Train the run that the options describe."""
    return start(in_folder(build_run_config(options)), force=options.get("force", False))


def start(config: RunConfig, force: bool, apart: bool = False) -> int:
    """Train the run that `config` describes, in a new folder or from where its folder stands. `apart`: in a process of
    its own, too, if it is to be one."""
    require_devices(config.parallel, config.parallel.processes)
    require_precision(config.parallel)
    if shape := known_shape(config):
        require_memory(config, shape, config.parallel.processes)
    with lock_runs([config.run]), reading_once() as data:
        run = prepare(config, force, predicts=True)
        say(f"Run folder: {run.path}", config)
        apart = apart or config.parallel.processes > 1
        if apart or (code := once_here(run, lambda: work(run, force))) == ExitCode.OUT_OF_MEMORY:
            data.clear()  # the processes have their own
            command = [sys.executable, "-m", "minbert.launch.worker", str(run.path), "--locked"]
            command += ["--force"] * force
            code = until_it_fits(run, lambda: launch(command, config.parallel.processes, run.logs))
    if code == ExitCode.INTERRUPTED:
        say(f"Stopped, and saved. To go on: minbert resume {shlex.quote(str(run.path))}", config)
    return code
