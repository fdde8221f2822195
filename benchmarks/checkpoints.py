"""What a checkpoint costs the run that writes it, beside DeepSpeed's `save_checkpoint` and Accelerate's `save_state`.

All ways save the same engine and take turns within one run. Stall is the time that the training loop waits for the
call; total lasts until the data are on the disk, for which the others' files are flushed after the call, as they do
not do so themselves. Ours are written in the background, which takes something from the steps that run meanwhile, and
the others' by the kernel after the call: so steps are timed before and after each save; the difference plus the stall
is what the save cost. Every checkpoint is loaded again, ours verified, and compared with the state that was saved.

    python benchmarks/checkpoints.py --model minilm --processes 2 --zero-stage 2
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tyro

FIGURES = ("stall", "call", "total", "bytes", "before", "after", "load")


@dataclass(frozen=True)
class Options:
    """Benchmark of checkpoints."""

    model: str = "minilm"
    """Model, as for `minbert train`."""
    processes: int = 2
    zero_stage: int | None = None
    rounds: int = 7
    """Turns that each way takes, after a first one that is reported apart."""
    steps: int = 3
    """Training steps timed before and after each save."""
    batch_size: int = 8
    folder: Path | None = None
    """Where to write: a folder on the disk to be measured; the default is the temporary folder."""
    seed: int = 0


def main() -> None:
    options = tyro.cli(Options)
    from minbert.launch.options import parse_run_config
    from minbert.launch.processes import launch
    from minbert.trainer.run.preparation import prepare

    os.environ["PYTHONWARNINGS"] = "ignore"
    arguments = ["--model", options.model, "--batch-size", str(options.batch_size), "--seed", str(options.seed)]
    arguments += ["--processes", str(options.processes), "--trackers"]
    arguments += [] if options.zero_stage is None else ["--zero-stage", str(options.zero_stage)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run = prepare(parse_run_config([*arguments, "--run", f"{name}/run"]))
        task = Path(name) / "task.json"
        task.write_text(json.dumps({"run": str(run.path), "rounds": options.rounds, "steps": options.steps}))
        command = [sys.executable, __file__, str(task)]
        if options.processes == 1:  # as `minbert train` does it
            code = subprocess.call(command)
        else:
            code = launch(command, options.processes, Path(name))
        if code:
            sys.exit(code)
        _print(options, json.loads((Path(name) / "out.json").read_text()))


def worker(folder: Path, task: dict) -> None:
    """One process: every way in turn, in another order each round; rank 0 reports."""
    import torch
    from torch.distributed import ReduceOp

    from minbert.trainer.processes import world as distributed
    from minbert.trainer.run.folder import RunFolder

    run = RunFolder(Path(task["run"]))
    config = run.read_config()
    world = distributed.start(config.parallel)
    engine, step = _build(run, config, world)
    ways = {"minbert": Ours(engine, step.aggregator, config, world, folder), "accelerate": Accelerate(engine, folder)}
    if config.parallel.zero_stage is not None:
        ways["deepspeed"] = DeepSpeed(engine, folder)
    measured = {way: {figure: [] for figure in FIGURES} for way in ways}

    def timed(work, *arguments) -> float:
        world.barrier()
        started = perf_counter()
        work(*arguments)
        return perf_counter() - started

    number = 0

    def train() -> None:
        nonlocal number
        for _ in range(task["steps"]):
            step(number)
            number += 1

    train()
    for turn in range(1 + task["rounds"]):
        order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in order:
            way, into = ways[name], measured[name]
            into["before"].append(timed(train))
            # Once for how long a save takes by itself, and once with steps that follow at once.
            into["call"].append(timed(way.save, number))
            into["total"].append(into["call"][-1] + timed(way.complete))
            world.barrier()
            way.remove()
            saved = [tensor.clone() for part in engine.parts() for tensor in part.tensors.values()]
            number += 1  # a checkpoint of another step, with the same content
            into["stall"].append(timed(way.save, number))
            into["after"].append(timed(train))
            way.complete()
            world.barrier()
            into["bytes"].append(float(sum(path.stat().st_size for path in way.path.rglob("*") if path.is_file())))
            into["load"].append(timed(way.load, f"{turn}/{name}"))
            found = [tensor for part in engine.parts() for tensor in part.tensors.values()]
            assert all(map(torch.equal, found, saved)), f"{name} loads another state than it saved"
            world.barrier()
            way.remove()
    for figures in measured.values():
        for figure, values in figures.items():
            slowest = torch.tensor(values, dtype=torch.float64)
            if world.size > 1:
                torch.distributed.all_reduce(slowest, op=ReduceOp.MAX)
            figures[figure] = slowest.tolist()
    if world.is_main:
        (folder / "out.json").write_text(json.dumps(measured))
    world.barrier()
    distributed.stop()


def _build(run, config, world):
    from minbert.data.sequences.tokens import load_tokenizer
    from minbert.trainer.engine.base import build_accelerator, build_engine
    from minbert.trainer.engine.optimizer import build_optimizer
    from minbert.trainer.model.weights import find_checkpoint, load_weights
    from minbert.trainer.processes.random_state import seed_everything
    from minbert.trainer.run.data import build_plan, load_split
    from minbert.trainer.run.saved_model import build_model
    from minbert.trainer.step import TrainingStep

    splits = {name: load_split(config, name, "train", load_tokenizer(run.encoder)) for name in config.corpus.names}
    seed_everything(config.seed)
    model = build_model(config, run)
    if config.encoder.model != "tiny":
        load_weights(model.bert, find_checkpoint(config.encoder.model))
    model.to(world.device)
    engine = build_engine(build_accelerator(config, world), model, build_optimizer(model, config.optimizer))
    engine.train()
    return engine, TrainingStep(engine, build_plan(config, splits), splits, world)


class Ours:
    """A copy in memory, then a thread that writes, hashes, flushes and publishes. Loading verifies every byte."""

    def __init__(self, engine, aggregator, config, world, folder: Path):
        from minbert.trainer.checkpoint.format import Manifest
        from minbert.trainer.checkpoint.saving import CheckpointWriter, now

        self.engine, self.aggregator, self.world, self.path = engine, aggregator, world, folder / "minbert"

        def describe(state) -> Manifest:
            parallel = {"processes": world.size, "zero_stage": config.parallel.zero_stage}
            nothing = {"positions": {}, "identity": {}, "config": {}, "code": {}, "files": {}}
            return Manifest(state.step, now(), **parallel, state=state, shapes=engine.shapes, **nothing)

        self.writer = CheckpointWriter(self.path, engine, aggregator, world, config.budget, describe)

    def save(self, number: int) -> None:
        from minbert.trainer.checkpoint.format import TrainingState

        self.writer.save(TrainingState(step=number, updates=self.engine.updates()))

    def complete(self) -> None:
        assert self.writer.finish()

    def load(self, topic: str) -> None:
        from torch.distributed import PrefixStore

        from minbert.trainer.checkpoint.resuming import newest_intact, restore
        from minbert.trainer.processes.messages import Messages
        from minbert.trainer.processes.world import World

        world = self.world
        if world.size > 1:  # a run resumes once: each time has messages of its own
            messages = world.messages
            messages = Messages(PrefixStore(topic, messages.store), world.rank, world.size, messages.timeout)
            world = World(world.rank, world.size, world.device, messages)
        found = newest_intact(self.path, world)
        restore(*found, self.engine, self.aggregator, world, seed=0)

    def remove(self) -> None:
        if self.world.is_main:
            shutil.rmtree(self.path)


class Accelerate:
    """`Accelerator.save_state`; under DeepSpeed that calls DeepSpeed, and adds random states."""

    name = "accelerate"

    def __init__(self, engine, folder: Path):
        self.engine, self.path = engine, folder / self.name

    def save(self, number: int) -> None:
        self.engine.accelerator.save_state(str(self.path))

    def complete(self) -> None:
        """Flush every file and folder; one process can do it for all on its machine."""
        for path in [self.path, *self.path.rglob("*")] if self.engine.accelerator.is_main_process else []:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(self, topic: str) -> None:
        self.engine.accelerator.load_state(str(self.path))

    def remove(self) -> None:
        if self.engine.accelerator.is_main_process:
            shutil.rmtree(self.path)


class DeepSpeed(Accelerate):
    name = "deepspeed"

    def save(self, number: int) -> None:
        self.engine.model.save_checkpoint(str(self.path), tag="benchmark")

    def load(self, topic: str) -> None:
        self.engine.model.load_checkpoint(str(self.path), tag="benchmark")


def _print(options: Options, measured: dict[str, dict[str, list[float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for figures in measured.values():
        pairs = zip(figures["stall"], figures["before"], figures["after"])
        figures["cost"] = [stall + after - before for stall, before, after in pairs]
        figures["slower"] = [after / before for before, after in zip(figures["before"], figures["after"])]
    rows = {
        "stall, s": ("stall", 1),
        "total until on the disk, s": ("total", 1),
        "following steps, time / before": ("slower", 1),
        "training time lost, s": ("cost", 1),
        "on the disk, MB": ("bytes", 1e6),
        "loading, s": ("load", 1),
    }
    table = Table("median (from, to)", *measured)
    for title, (figure, unit) in rows.items():
        table.add_row(title, *(_spread([value / unit for value in one[figure][1:]]) for one in measured.values()))
    table.add_row("first stall, s", *(f"{one['stall'][0]:.3f}" for one in measured.values()))
    table.add_row("steps before a save, s", *(_spread(one["before"][1:]) for one in measured.values()))
    ours = measured["minbert"]
    for figure in ("stall", "total", "load"):
        ratios = [[a / b for a, b in zip(one[figure][1:], ours[figure][1:])] for one in measured.values()]
        table.add_row(f"{figure}, time / minbert's", *map(_spread, ratios))
    console = Console(width=120)
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, {options}", highlight=False)
    console.print(table)


def _spread(values: list[float]) -> str:
    digits = 0 if max(values) >= 100 else 2 if max(values) >= 1 else 3
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("task.json"):
        from minbert.launch.processes import record_errors

        with record_errors():
            path = Path(sys.argv[1])
            worker(path.parent, json.loads(path.read_text()))
    else:
        main()
