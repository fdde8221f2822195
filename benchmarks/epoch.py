"""A whole epoch, from the start of a process to the dev scores: reading, tokenising, training, a checkpoint, scoring.

Each side is a command of its own and starts without anything cached. Ours writes no prediction files here, as the peer
does not; everything else is `minbert train`.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from turns import Measured, Turn

LR, CLIP = 5e-5, 1.0  # of all sides
TRAIN = """
import sys
from minbert.launch.options import parse_run_config
from minbert.launch.worker import work
from minbert.trainer.run.preparation import prepare
sys.exit(work(prepare(parse_run_config(sys.argv[1:])), predictions=False))
"""
PEER = Path(__file__).parent / "peers" / "hf_trainer.py"


def epochs(run: Path, same: dict, rounds: int, threads: int, folder: Path, say=print) -> list[Measured]:
    """Epochs of ours, of the Trainer, and of the Trainer with group_by_length, in turn. `run` is the folder of a
    prepared run, which says what to train on, and `same` the options in which all of them differ from that."""
    from minbert.trainer.config import flatten, parse_config
    from minbert.trainer.run.folder import RunFolder

    config = parse_config(flatten(RunFolder(run).read_config()) | same, "options")
    folder.mkdir(parents=True, exist_ok=True)
    examples = _export(config, folder / "data")
    steps = -(-examples // (config.batch.batch_size * len(config.corpus.tasks)))
    sides = [Measured("minbert"), Measured("transformers' Trainer"), Measured("transformers' Trainer, group_by_length")]
    for turn in range(rounds):
        for number, side in enumerate(sides):
            if side.why:
                continue
            place = folder / "turn"
            place.mkdir()
            if number == 0:
                command = _ours(config, place)
            else:
                command = _theirs(config, folder / "data", place, steps, threads, grouped=number == 2)
            _measure(side, command, place, examples)
            if side.why:
                say(f"  {side.name}: {side.why.splitlines()[-1]}")
            else:
                side.scores = _scores(place)
                say(f"  round {turn + 1} of {rounds}: {side.name} {side.turns[-1].seconds:.0f} s, {side.scores}")
            shutil.rmtree(place)
    shutil.rmtree(folder)
    return sides


def _measure(side: Measured, command: list[str], place: Path, examples: int) -> None:
    with (place / "output.txt").open("w") as output:
        started = perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        side.why, side.failed = (place / "output.txt").read_text()[-2000:].rstrip() or f"exit {status}", True
        return
    side.turns.append(Turn(examples, seconds, usage.ru_utime + usage.ru_stime))
    side.memory = usage.ru_maxrss / 2**10  # of the whole process


def _ours(config, place: Path) -> list[str]:
    words = ["--run", place / "run", "--cache", place / "cache", "--data", config.corpus.data, "--trackers"]
    words += ["--model", config.encoder.model, "--batch-size", config.batch.batch_size, "--epochs", 1]
    words += ["--precision", config.parallel.precision, "--lr", LR, "--clip", CLIP, "--seed", config.seed]
    for name in ("train_limit", "eval_limit"):
        if (limit := getattr(config.corpus, name)) is not None:
            words += [f"--{name.replace('_', '-')}", limit]
    return [sys.executable, "-c", TRAIN, *map(str, words)]


def _theirs(config, data: Path, place: Path, steps: int, threads: int, grouped: bool) -> list[str]:
    from peers.hf import describe

    settings = {
        "data": str(data),
        "out": str(place),
        "model": config.encoder.model,
        "tasks": describe(config.corpus.tasks),
        "dropout": config.heads.head_dropout,
        "length": config.corpus.max_length,
        "batch_size": config.batch.batch_size,
        "steps": steps,
        "precision": config.parallel.precision,
        "lr": LR,
        "clip": CLIP,
        "grouped": grouped,
        "seed": config.seed,
        "threads": threads,
    }
    (place / "settings.json").write_text(json.dumps(settings))
    return [sys.executable, str(PEER), str(place / "settings.json")]


def _export(config, folder: Path) -> int:
    """Write the rows of both splits of all tasks as CSV files, as the peer reads them; how many training examples."""
    from minbert.trainer.run.data import load_examples_of

    folder.mkdir()
    count = 0
    for name in config.corpus.names:
        for split in ("train", "dev"):
            examples = load_examples_of(config, name, split)
            with (folder / f"{name}-{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(zip(*examples.sentences, examples.labels.tolist()))
            count += len(examples) * (split == "train")
    return count


def _scores(place: Path) -> dict[str, float]:
    if (place / "scores.json").exists():
        return {name: round(value, 3) for name, value in json.loads((place / "scores.json").read_text()).items()}
    from minbert.trainer.run.folder import RunFolder

    last = RunFolder(place / "run").read_metrics()[-1]
    return {key[4:]: round(value, 3) for key, value in last.items() if key.startswith("dev/") and "overall" not in key}
