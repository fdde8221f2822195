"""Commands as tests give them, the data of small runs, and what can be compared of what runs leave.

`CORPUS` has the course's files with a few of the built-in corpus' rows, of which a run is prepared and predicted in a
moment: 200 to train on, 60 dev and 20 test rows of each task.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from waiting import PATIENCE, until

from minbert.launch.main import main
from minbert.trainer.run.folder import RunFolder

CORPUS = str(Path(__file__).parent / "corpus")
COMMAND = [sys.executable, "-m", "minbert.launch.main"]


def minbert(*words: object) -> int:
    """The exit code of a command, given in this process; it may start others."""
    try:
        return main([str(word) for word in words])
    except SystemExit as ended:  # tyro ends the program itself
        return ended.code


def started(*words: object, **options) -> subprocess.Popen:
    """A command in a process of its own, for what only that can show. `options`: of Popen."""
    return subprocess.Popen([*COMMAND, *map(str, words)], **options)


def outside(*words: object, code: int = 0, **options) -> subprocess.CompletedProcess:
    """The same, ended with this exit code, and what it said. `options`: of `subprocess.run`."""
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, **options)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def logged(run: Path) -> list[dict]:
    """What a run has logged, without the times."""
    records = RunFolder(run).read_metrics()
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def has_logged(run: Path, step: int) -> bool:
    """Whether a run has logged this step, or a later one."""
    return any(record["step"] >= step for record in RunFolder(run).read_metrics())


def await_step(
    run: Path, step: int, process: subprocess.Popen | None = None, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Wait until the run, which `process` trains, has logged this step. `meanwhile` is called before each look."""

    def reached() -> bool:
        meanwhile()
        return has_logged(run, step)

    until(reached, f"step {step}", process, pause=0.02)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and moments, whole and flat, from the pieces in a folder's files, however many processes wrote them."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            name, _, place = key.partition("[")
            if not name.startswith("random/"):
                pieces.setdefault(name, {})[int(place.partition(":")[0])] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}
