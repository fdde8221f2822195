"""Training one trial of a search or an ablation for whoever watches it; also `python -m minbert.launch.trial RUN`.

A trial of one process is trained in the process that asks, which stays warm for the next one: PyTorch and its friends
are imported once. One of several processes, or under DeepSpeed, which leaves its marks on a process, has a process of
its own that starts the others.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from minbert.data.errors import UserError
from minbert.trainer.config import RunConfig
from minbert.trainer.processes.exit_codes import ExitCode, leave
from minbert.trainer.processes.stop import StopRequest
from minbert.trainer.run.folder import RunFolder

POLL = 0.1  # seconds
LOCK_PATIENCE = 60.0  # seconds in which the processes of an earlier attempt may still save and leave
OUTPUT = "trial.log"  # what several processes print, in the run's logs

_sizes: dict[str, dict[str, range]] = {}  # of training splits, which the trials of a search share


def train_trial(config: RunConfig, stop: StopRequest, begin: Callable[[int], None]) -> tuple[int, str]:
    """Train the run that `config` describes, from where it stands, until it ends or `stop` has a signal.

    `begin` is told the steps of the budget before the first of them. No prediction files are written: what a search
    wants is the score. Returns the exit code, and the error if it failed.
    """
    from minbert.trainer.run.out_of_memory import as_cut, once_here
    from minbert.trainer.run.preparation import prepare

    try:
        with RunFolder(config.run).locked(LOCK_PATIENCE) as lock:
            run = prepare(as_cut(config))
            begin(count_steps(run.read_config()))
            if config.parallel.processes > 1 or config.parallel.zero_stage is not None:
                return _train_elsewhere(run, stop, lock)
            from minbert.launch.worker import work

            code = once_here(run, lambda: work(run, stop=stop, predictions=False))
            return (code, "") if code != ExitCode.OUT_OF_MEMORY else _train_elsewhere(run, stop, lock)
    except UserError as error:
        return ExitCode.USER_MISTAKE, str(error)
    except Exception:
        return ExitCode.FAILED, traceback.format_exc()


def count_steps(config: RunConfig) -> int:
    """Optimizer steps of a resolved configuration's budget; reads data only where the budget is in epochs, and once."""
    from minbert.trainer.run.budget import Budget
    from minbert.trainer.run.data import build_plan, count_training_examples

    if config.budget.steps is not None:
        return config.budget.steps
    key = config.corpus.model_dump_json()
    if key not in _sizes:
        _sizes[key] = {name: range(count_training_examples(config, name)) for name in config.corpus.names}
    return Budget(config.budget, build_plan(config, _sizes[key]).steps_per_epoch).planned_steps


def _train_elsewhere(run: RunFolder, stop: StopRequest, lock: int | None) -> tuple[int, str]:
    """In processes of its own, which are asked to save and leave when this one dies, and keep the lock until they
    have."""
    run.logs.mkdir(exist_ok=True)
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def leave_with_parent() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(ExitCode.FAILED)

    environment = dict(os.environ)
    if threads := environment.get("OMP_NUM_THREADS"):  # Ray's, for the whole trial
        environment["OMP_NUM_THREADS"] = str(max(1, int(threads) // run.read_config().parallel.processes))
    with (run.logs / OUTPUT).open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "minbert.launch.trial", str(run.path)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
            preexec_fn=leave_with_parent,
        )
    asked = False
    while process.poll() is None:
        if stop.signal is not None and not asked:
            process.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(POLL)
    said = (run.logs / OUTPUT).read_bytes()[start:].decode(errors="replace").strip()
    return process.returncode, said if process.returncode not in (ExitCode.FINISHED, ExitCode.INTERRUPTED) else ""


def main(folder: Path) -> int:
    from minbert.launch.processes import launch
    from minbert.trainer.run.out_of_memory import until_it_fits

    run = RunFolder.existing(folder)
    command = [sys.executable, "-m", "minbert.launch.worker", str(run.path), "--no-predictions", "--locked"]
    return until_it_fits(run, lambda: launch(command, run.read_config().parallel.processes, run.logs))


if __name__ == "__main__":
    from minbert.launch.processes import record_errors

    with record_errors():
        leave(main(Path(sys.argv[1])))
