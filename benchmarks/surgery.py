"""What gradient surgery costs: time, memory and communication of a step, beside the plain sum and torchjd.

All ways train the same model on the same batches and take turns within one run: the plain sum of losses, PCGrad and
UPGrad as they are here, all tasks in one backward pass; PCGrad with one backward pass per task; and with one process
PCGrad and UPGrad by torchjd's `mtl_backward` on this project's own model (so that only the surgery differs). Peak
memory is taken in a process of its own for each way; bytes are the payload of the collective calls of one step, as the
profiler sees them.

    python benchmarks/surgery.py --data FOLDER --model minilm --batch-size 32
    python benchmarks/surgery.py --processes 2 --zero-stage 2
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tyro

WAYS = ("sum", "pcgrad", "upgrad", "pcgrad, per task")
PEERS = ("torchjd pcgrad", "torchjd upgrad")


@dataclass(frozen=True)
class Options:
    """Benchmark of gradient surgery."""

    data: str = "builtin"
    """Data, as for `minbert train`."""
    model: str = "tiny"
    """Model, as for `minbert train`."""
    batch_size: int = 32
    """Examples per task and step, over all processes."""
    rounds: int = 6
    """Turns that each way takes."""
    steps: int = 2
    """Steps in a turn."""
    processes: int = 1
    zero_stage: int | None = None
    seed: int = 0


def main() -> None:
    options = tyro.cli(Options)
    from minbert.launch.options import parse_run_config
    from minbert.launch.processes import launch
    from minbert.trainer.run.preparation import prepare

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = "ignore"
    arguments = f"--data {options.data} --model {options.model} --batch-size {options.batch_size} --clip 0 --trackers"
    ways = WAYS + (PEERS if options.processes == 1 and options.zero_stage is None else ())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = prepare(parse_run_config([*arguments.split(), "--run", f"{folder}/run"]))
        results = {}
        # First all ways in turn, for the times; then each way alone, for its memory.
        for which in [list(ways), *([way] for way in ways)]:
            task = {"run": str(run.path), "ways": which, "out": str(folder / "out.json"), **options.__dict__}
            (folder / "task.json").write_text(json.dumps(task))
            command = [sys.executable, __file__, str(folder / "task.json")]
            if options.processes == 1:  # as `minbert train` does it: no process group
                code = subprocess.call(command)
            else:
                code = launch(command, options.processes, folder)
            if code:
                sys.exit(code)
            results["|".join(which)] = json.loads((folder / "out.json").read_text())
    _print(options, ways, results)


def worker(task: dict) -> None:
    """One process: build every way that is asked for, take turns, and report from rank 0."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from minbert.trainer.processes import world as distributed

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run_config = _configured(task)
    world = distributed.start(run_config.parallel)
    built = {way: _build(way, task, world) for way in task["ways"]}
    loaded = _peak(world)
    seconds, moved = {way: [] for way in built}, {}
    for way, step in built.items():
        step(0)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step(1)
        moved[way] = sum(
            4 * torch.Size(shape).numel()
            for event in profiler.events()
            if event.name.startswith(("gloo:", "nccl:"))
            for shape in event.input_shapes
            if shape
        )
    for turn in range(task["rounds"] if len(built) > 1 else 1):
        for way, step in built.items():
            world.barrier()
            started = perf_counter()
            for offset in range(task["steps"]):
                step(2 + turn * task["steps"] + offset)
            _synchronize(world)
            seconds[way].append((perf_counter() - started) / task["steps"])
    peak = torch.tensor([_peak(world) - loaded, _peak(world)])
    if world.size > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    if world.is_main:
        report = {"seconds": seconds, "bytes": moved, "memory": peak[0].item(), "total": peak[1].item()}
        Path(task["out"]).write_text(json.dumps(report))
    world.barrier()
    # After several of DeepSpeed's engines in one process the interpreter's farewell sometimes aborts.
    os._exit(0)


def _configured(task: dict):
    from minbert.trainer.run.folder import RunFolder

    config = RunFolder(Path(task["run"])).read_config()
    parallel = {"processes": task["processes"], "zero_stage": task["zero_stage"]}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _build(way: str, task: dict, world):
    """A function of the step number that carries out one training step in this way."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from minbert.data.sequences.tokens import load_tokenizer
    from minbert.trainer.engine.base import build_accelerator, build_engine
    from minbert.trainer.engine.optimizer import build_optimizer
    from minbert.trainer.model.weights import find_checkpoint, load_weights
    from minbert.trainer.processes.random_state import seed_everything
    from minbert.trainer.run.data import build_plan, load_split
    from minbert.trainer.run.folder import RunFolder
    from minbert.trainer.run.saved_model import build_model
    from minbert.trainer.step import TrainingStep

    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state = {}  # several accelerators in one process
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    run, config = RunFolder(Path(task["run"])), _configured(task)
    method, _, per_task = way.removeprefix("torchjd ").partition(", ")
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"aggregator": method})})
    splits = {name: load_split(config, name, "train", load_tokenizer(run.encoder)) for name in config.corpus.names}
    plan = build_plan(config, splits)
    seed_everything(task["seed"])
    model = build_model(config, run)
    if config.encoder.model != "tiny":
        load_weights(model.bert, find_checkpoint(config.encoder.model))
    model.to(world.device).train()
    optimizer = build_optimizer(model, config.optimizer)
    if way.startswith("torchjd"):
        return _torchjd_step(method, model, optimizer, plan, splits, world)
    engine = build_engine(build_accelerator(config, world), model, optimizer)
    step = TrainingStep(engine, plan, splits, world, aggregator=method)
    step.in_one_backward = not per_task
    return step


def _torchjd_step(method: str, model, optimizer, plan, splits, world):
    """One forward pass, torchjd's backward for several tasks, one update."""
    from torchjd import autojac
    from torchjd.aggregation import PCGrad, UPGrad

    from minbert.data.batches.batch import Portion, make_batch
    from minbert.trainer.model.multitask import Forward
    from minbert.trainer.objectives.supervised import example_losses

    aggregator = {"pcgrad": PCGrad, "upgrad": UPGrad}[method]()
    shared = [parameter for parameter in model.bert.parameters() if parameter.requires_grad]

    def step(number: int) -> None:
        portions = {name: Portion.whole(plan.rows(name, number)) for name in splits}
        batch = make_batch(splits, portions, draw=(plan.seed, number)).to(world.device)
        pooled = Forward(model, batch).pooled
        losses = [
            example_losses(model.tasks[name], model.heads[name](pooled[name]), part.labels).mean()
            for name, part in batch.tasks.items()
        ]
        heads = [list(model.heads[name].parameters()) for name in batch.tasks]
        # A chunk of one avoids vmap, for which the oneDNN linear layers have no rule.
        autojac.mtl_backward(
            losses, features=list(pooled.values()), tasks_params=heads, shared_params=shared, parallel_chunk_size=1
        )
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak(world) -> float:
    """Peak memory of this process in MiB, on its device."""
    import torch

    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _synchronize(world) -> None:
    import torch

    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _print(options: Options, ways: tuple[str, ...], results: dict) -> None:
    together = results["|".join(ways)]
    base = together["seconds"]["sum"]
    print(f"{platform.machine()}, {options}")
    print(f"{'way':<16}{'time / sum, turn by turn':>30}{'peak memory':>14}{'MB moved':>10}")
    for way in ways:
        ratios = sorted(mine / theirs for mine, theirs in zip(together["seconds"][way], base))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{way:<16}{ratio:>30}{results[way]['memory']:>10.0f} MiB{together['bytes'][way] / 1e6:>10.1f}")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("task.json"):
        from minbert.launch.processes import record_errors

        with record_errors():
            worker(json.loads(Path(sys.argv[1]).read_text()))
    else:
        main()
