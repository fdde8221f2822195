"""What a checkpoint costs: how long the step is held, how long until it is safe on the disk, its bytes, loading it.

The same engine in the same state is saved in turn by this project (in the background, hashed, flushed), by Accelerate's
`save_state`, and where DeepSpeed runs by its own `save_checkpoint`. The peers flush nothing, so their time until the
checkpoint is safe includes flushing their files afterwards. While ours is written the training goes on, slower where no
core is free: the time that steps lose to it is measured too, and is the true cost.

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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tyro


@dataclass(frozen=True)
class Options:
    """Benchmark of saving and loading."""

    data: str = "builtin"
    """Data, as for `minbert train`."""
    model: str = "tiny"
    """Model, as for `minbert train`."""
    batch_size: int = 8
    """Examples per task and step, over all processes."""
    rounds: int = 7
    """Turns that each way takes."""
    steps: int = 6
    """Steps timed with and without a checkpoint being written."""
    processes: int = 2
    zero_stage: int | None = None
    folder: Path | None = None
    """Where to write; the default is among the temporary files."""


def main() -> None:
    options = tyro.cli(Options)
    from minbert.launch.options import parse_run_config
    from minbert.launch.processes import launch
    from minbert.trainer.preparation import prepare

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = "ignore"
    arguments = f"--data {options.data} --model {options.model} --batch-size {options.batch_size} --trackers"
    stage = [] if options.zero_stage is None else ["--zero-stage", str(options.zero_stage)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        run = prepare(parse_run_config([*arguments.split(), *stage, "--run", f"{folder}/run"]))
        task = {"run": str(run.path), "out": str(folder / "out.json"), "rounds": options.rounds, "steps": options.steps}
        (folder / "task.json").write_text(json.dumps(task))
        command = [sys.executable, __file__, str(folder / "task.json")]
        # One process runs without a process group, as `minbert train` has it.
        code = subprocess.call(command) if options.processes == 1 else launch(command, options.processes, folder)
        if code:
            sys.exit(code)
        _print(options, json.loads((folder / "out.json").read_text()))


def worker(task: dict) -> None:
    """One process: take turns, and report from rank 0."""
    import torch

    from minbert.data.tokens import load_tokenizer
    from minbert.trainer import distributed
    from minbert.trainer.checkpoint import Manifest, TrainingState
    from minbert.trainer.engine import build_accelerator, build_engine
    from minbert.trainer.optimizer import build_optimizer
    from minbert.trainer.preparation import build_plan, load_split
    from minbert.trainer.resuming import newest_intact, restore
    from minbert.trainer.run_folder import RunFolder
    from minbert.trainer.saved_model import build_model
    from minbert.trainer.saving import CheckpointWriter, now
    from minbert.trainer.step import TrainingStep

    run = RunFolder(Path(task["run"]))
    config = run.read_config()
    world = distributed.start(config.parallel)
    tokenizer = load_tokenizer(run.encoder)
    splits = {name: load_split(config, name, "train", tokenizer) for name in config.corpus.tasks}
    model = build_model(config, run)
    engine = build_engine(build_accelerator(config, world), model, build_optimizer(model, config.optimizer))
    engine.train()
    step = TrainingStep(engine, build_plan(config, splits), splits, world)
    budget = config.budget.model_copy(update={"keep": 1})

    def describe(state: TrainingState) -> Manifest:
        return Manifest(
            step=state.step,
            written=now(),
            processes=world.size,
            zero_stage=config.parallel.zero_stage,
            state=state,
            positions={},
            identity={},
            config={},
            code={},
            shapes=engine.shapes,
            files={},
        )

    writer = CheckpointWriter(run.checkpoints, engine, step.aggregator, world, budget, describe)
    number = 0

    def train(count: int) -> None:
        nonlocal number
        for _ in range(count):
            step(number, 1.0)
            number += 1

    def slowest(seconds: float) -> float:
        """Of all processes."""
        if world.size == 1:
            return seconds
        value = torch.tensor(seconds)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return float(value)

    def timed(work: Callable[[], object]) -> float:
        world.barrier()
        start = perf_counter()
        work()
        return slowest(perf_counter() - start)

    def ours() -> dict[str, float]:
        stall = timed(lambda: writer.save(TrainingState(step=number, updates=number)))
        return {"stall": stall, "safe": stall + timed(writer.finish), "bytes": _size(run.checkpoints)}

    def peer(save: Callable[[Path], object]) -> dict[str, float]:
        folder = run.path / "peer"
        stall = timed(lambda: save(folder))
        flush = timed(lambda: _flush(folder) if world.is_main else None)
        return {"stall": stall, "safe": stall + flush, "bytes": _size(folder)}

    ways = {"minbert": ours, "Accelerate": lambda: peer(lambda folder: engine.accelerator.save_state(str(folder)))}
    loads = {"Accelerate": lambda folder: engine.accelerator.load_state(str(folder))}
    if config.parallel.zero_stage is not None:
        ways["DeepSpeed"] = lambda: peer(lambda folder: engine.model.save_checkpoint(str(folder)))
        loads["DeepSpeed"] = lambda folder: engine.model.load_checkpoint(str(folder))
    results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    train(2)  # moments come into being with the first step
    for turn in range(task["rounds"] + 1):
        order = list(ways)
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            train(1)
            measured = ways[way]()
            if way == "minbert":
                measured["load"] = timed(
                    lambda: restore(*newest_intact(run.checkpoints, world), engine, step.aggregator, world, 0)
                )
            else:
                measured["load"] = timed(lambda way=way: loads[way](run.path / "peer"))
                if world.is_main:
                    shutil.rmtree(run.path / "peer")
            if turn:  # the first round warms up
                for name, value in measured.items():
                    results[way][name].append(value)
        for saving in (False, True) if turn % 2 else (True, False):
            world.barrier()
            if saving:
                writer.save(TrainingState(step=number, updates=number))
            seconds = timed(lambda: train(task["steps"]))
            writer.finish()
            if turn:
                results["steps"]["with" if saving else "without"].append(seconds)
    if world.is_main:
        Path(task["out"]).write_text(json.dumps(results))
    world.barrier()
    distributed.stop()
    world.messages.farewell()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _print(options: Options, results: dict[str, dict[str, list[float]]]) -> None:
    stage = "data parallel" if options.zero_stage is None else f"ZeRO {options.zero_stage}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.processes} process(es), {stage}, ", end="")
    print(f"model {options.model}, {options.rounds} rounds; seconds, and ratios of each round (least to greatest)\n")
    print("| | held | ratio | safe on disk | ratio | loaded | ratio | MB |")
    print("|---|---|---|---|---|---|---|---|")
    own = results["minbert"]
    for way in ("minbert", "Accelerate", "DeepSpeed"):
        if found := results.get(way):
            cells = []
            for name in ("stall", "safe", "load"):
                ratios = sorted(theirs / ours for theirs, ours in zip(found[name], own[name]))
                cells.append(f"{statistics.median(found[name]):.3f}")
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            print(f"| {way} | {' | '.join(cells)} | {statistics.median(found['bytes']) / 1e6:.1f} |")
    steps = results["steps"]
    lost = sorted(busy - idle for busy, idle in zip(steps["with"], steps["without"]))
    print(
        f"\n{options.steps} steps take {statistics.median(steps['without']):.2f} s; while a checkpoint is written, "
        f"{statistics.median(lost):+.2f} s ({lost[0]:+.2f} to {lost[-1]:+.2f})"
    )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("task.json"):
        worker(json.loads(Path(sys.argv[1]).read_text()))
    else:
        main()
