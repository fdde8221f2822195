"""A step that does not fit into memory: how that is told, and how the run goes on.

A step's result does not depend on the number of parts in which its batches are computed (`accumulation`), so a run
whose step does not fit goes on from its newest checkpoint in twice as many.
"""

import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minbert.data.errors import OutOfMemory, UserError, memory_trouble
from minbert.data.machine import free_memory
from minbert.trainer.config import RunConfig, flatten, parse_config
from minbert.trainer.processes.exit_codes import ExitCode
from minbert.trainer.processes.world import World
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.progress import say


@contextmanager
def telling(step: int, world: World) -> Iterator[None]:
    """Raises OutOfMemory in place of what PyTorch, its libraries and Python raise where memory does not suffice for
    `step`, whose tensors are given back by then."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (what := memory_trouble(error)):
            raise
        where = f"GPU {world.device.index or 0}" if world.device.type == "cuda" else "the process"
        if world.size > 1:
            where += f" of rank {world.rank} on {socket.gethostname()}"
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory, and who tells of it needs some
        free_memory()
        raise OutOfMemory(f"step {step} does not fit into the memory of {where}: {what}") from None


def cut_further(run: RunFolder, processes: int) -> int:
    """Have a locked run compute its batches in twice as many parts, and return their number.

    Raises UserError, saying what else takes less memory, if some processes would have no example of a part, or what is
    trained cannot be cut.
    """
    config = run.read_config()
    parts = 2 * config.batch.accumulation
    if parts * processes > config.batch.batch_size:
        raise UserError(
            f"batch_size={config.batch.batch_size} on {processes} process{'es' * (processes > 1)} cannot be cut into "
            f"{parts} parts. Less memory is taken with precision=bf16, a higher zero_stage on more processes, or a "
            "smaller max_length or model"
        )
    run.write_config(parse_config(flatten(config) | {"accumulation": parts}, str(run.config_file)))
    return parts


def as_cut(config: RunConfig) -> RunConfig:
    """The configuration of a run that may have begun: in as many parts as its folder has it, if it did not fit in
    those that are asked for."""
    if config.run is None or not (run := RunFolder(config.run)).config_file.exists():
        return config
    batch, begun = config.batch, run.read_config().batch
    if begun.batch_size != batch.batch_size or begun.accumulation <= batch.accumulation:
        return config
    return config.model_copy(update={"batch": batch.model_copy(update={"accumulation": begun.accumulation})})


def go_on_smaller(run: RunFolder, told: str = "") -> None:
    """As `cut_further` for a run on this machine, telling so; `told` is what has not been told yet."""
    free_memory()
    config = run.read_config()
    try:
        parts = cut_further(run, config.parallel.processes)
    except UserError as error:
        raise UserError(f"{told}\n{error}".lstrip()) from None
    said = f"{told}\nGoing on with accumulation={parts}, which takes less memory and has the same result.".lstrip()
    say(said, config)


def once_here(run: RunFolder, attempt: Callable[[], int]) -> int:
    """The exit code of `attempt`, which trains a locked run in this process; OUT_OF_MEMORY if it did not fit, and is in
    smaller parts now: for processes of its own, as the memory of this one is in pieces. Raises as `cut_further`."""
    told = ""  # not the error itself, which keeps what filled the memory
    try:
        return attempt()
    except OutOfMemory as error:
        told = str(error)
    go_on_smaller(run, told)
    return ExitCode.OUT_OF_MEMORY


def until_it_fits(run: RunFolder, attempt: Callable[[], int]) -> int:
    """The exit code of `attempt`, which trains a locked run in processes of its own, in smaller parts as often as they
    run out of memory. Raises as `cut_further`."""
    while (code := attempt()) == ExitCode.OUT_OF_MEMORY:
        go_on_smaller(run)
    return code
