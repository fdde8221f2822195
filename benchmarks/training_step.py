"""Speed and memory of the training step, beside the same work written with transformers.BertModel.

The peer is what a user of the course's starter code writes: one padded batch per sentence column, so five forward
passes for the three tasks, the sum of their losses, one backward pass, torch.optim.AdamW. Both sides see the same
examples, the same weights, heads of the same shape and dropout, and take turns within one run, each in a process of
its own so that peak memory can be told apart:

    python benchmarks/training_step.py --data FOLDER --model minilm --rounds 8
"""

import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import tyro


@dataclass(frozen=True)
class Options:
    """Benchmark of the training step."""

    data: str = "builtin"
    """Data, as for `minbert train`."""
    model: str = "tiny"
    """Model, as for `minbert train`."""
    batch_size: int = 8
    """Examples per task and step."""
    rounds: int = 8
    """Turns that each side takes."""
    steps: int = 4
    """Steps in a turn."""
    threads: int = 1
    """Threads of each side; only one side runs at a time."""
    precision: str = "fp32"
    """fp32 or bf16."""
    seed: int = 0


def ours(options: Options, folder: Path):
    """The project's own step: one forward pass over all sentences, without padding."""
    from minbert.data.sequences.tokens import load_tokenizer
    from minbert.trainer.engine.base import build_accelerator, build_engine
    from minbert.trainer.engine.optimizer import build_optimizer
    from minbert.trainer.model.weights import find_checkpoint, load_weights
    from minbert.trainer.processes.random_state import seed_everything
    from minbert.trainer.processes.world import World
    from minbert.trainer.run.data import build_plan, load_split
    from minbert.trainer.run.folder import RunFolder
    from minbert.trainer.run.saved_model import build_model
    from minbert.trainer.step import TrainingStep

    run = RunFolder(folder)
    config = run.read_config()
    world = World(0, 1, _device())
    splits = {name: load_split(config, name, "train", load_tokenizer(run.encoder)) for name in config.corpus.names}
    seed_everything(options.seed)
    model = build_model(config, run)
    if options.model != "tiny":
        load_weights(model.bert, find_checkpoint(options.model))
    model.to(world.device).train()
    engine = build_engine(build_accelerator(config, world), model, build_optimizer(model, config.optimizer))
    step = TrainingStep(engine, build_plan(config, splits), splits, world)
    return lambda number: step(number).tokens


def peer(options: Options, folder: Path):
    """transformers.BertModel, used as in the course's starter code."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel

    from minbert.data.sequences.tokens import load_tokenizer
    from minbert.trainer.model.multitask import Head
    from minbert.trainer.model.weights import find_checkpoint
    from minbert.trainer.objectives.supervised import example_losses
    from minbert.trainer.run.data import build_plan, load_split
    from minbert.trainer.run.folder import RunFolder

    run = RunFolder(folder)
    config = run.read_config()
    splits = {name: load_split(config, name, "train", load_tokenizer(run.encoder)) for name in config.corpus.names}
    plan = build_plan(config, splits)
    device = _device()
    torch.manual_seed(options.seed)
    if options.model == "tiny":
        bert = BertModel(BertConfig.from_pretrained(run.encoder))
    else:
        bert = BertModel.from_pretrained(find_checkpoint(options.model))
    heads = nn.ModuleDict(
        {name: Head(config.corpus.task(name), bert.config.hidden_size, config.heads) for name in splits}
    )
    bert.to(device).train()
    heads.to(device).train()
    parameters = [*bert.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=config.optimizer.lr)

    def embed(column, rows) -> torch.Tensor:
        sentences = [torch.from_numpy(column.ids[column.offsets[row] : column.offsets[row + 1]]).long() for row in rows]
        ids = nn.utils.rnn.pad_sequence(sentences, batch_first=True).to(device)
        mask = (ids != 0).long()
        hidden = bert(ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def step(number: int) -> int:
        total, tokens = torch.zeros((), device=device), 0
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            for name, split in splits.items():
                rows = plan.rows(name, number)
                embeddings = torch.stack([embed(column, rows) for column in split.columns])
                labels = torch.from_numpy(split.labels[rows]).to(device)
                total = total + example_losses(config.corpus.task(name), heads[name](embeddings).float(), labels).mean()
                tokens += int(sum(column.lengths[rows].sum() for column in split.columns))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens

    return step


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _serve(side: str, options: Options, folder: Path, channel: Connection) -> None:
    """Answer each request for steps with (tokens, seconds, peak memory above the loaded model in MiB)."""
    import torch

    torch.set_num_threads(options.threads)
    step = {"minbert": ours, "transformers": peer}[side](options, folder)
    loaded = _peak()
    step(0)  # warm-up: allocators, kernels, optimizer state
    channel.send("ready")
    for first in iter(channel.recv, None):
        started = perf_counter()
        tokens = sum(step(first + offset) for offset in range(options.steps))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        channel.send((tokens, perf_counter() - started, _peak() - loaded))


def _peak() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    options = tyro.cli(Options)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    from minbert.launch.options import parse_run_config
    from minbert.trainer.run.preparation import prepare

    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"--data {options.data} --model {options.model} --batch-size {options.batch_size} --clip 0"
        config = parse_run_config([*arguments.split(), "--precision", options.precision, "--run", f"{folder}/run"])
        run = prepare(config)
        channels, processes = {}, []
        for side in ("transformers", "minbert"):
            channels[side], theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(side, options, run.path, theirs), daemon=True)
            process.start()
            processes.append(process)
            channels[side].recv()
        results = {side: [] for side in channels}
        for turn in range(options.rounds):
            for side, channel in channels.items():
                channel.send(1 + turn * options.steps)
                results[side].append(channel.recv())
        for channel, process in zip(channels.values(), processes):
            channel.send(None)
            process.join()
    _print(options, results)


def _print(options: Options, results: dict[str, list[tuple[int, float, float]]]) -> None:
    print(f"{platform.processor() or platform.machine()}, {options}")
    for side, turns in results.items():
        rate = statistics.median(tokens / seconds for tokens, seconds, _ in turns)
        print(f"{side:<13} {rate:9.0f} tokens/s (median of {len(turns)} turns)   peak memory {turns[-1][2]:7.0f} MiB")
    ratios = sorted(theirs[1] / ours[1] for theirs, ours in zip(results["transformers"], results["minbert"]))
    print(
        f"speed of minbert relative to transformers, turn by turn: median {statistics.median(ratios):.2f}, "
        f"from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    memory = results["minbert"][-1][2] / results["transformers"][-1][2]
    print(f"peak memory of minbert relative to transformers: {memory:.2f}")


if __name__ == "__main__":
    main()
