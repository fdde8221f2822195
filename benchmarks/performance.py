"""Speed and memory of this project beside its peers, which do the same work on the same machine in turn.

    python benchmarks/performance.py --data FOLDER --model minilm --out FOLDER

Sections, of which `--only` names some:

step       a training step beside transformers' BertModel, padded (the course's starter code) and grouped by length
surgery    PCGrad and UPGrad beside the plain sum, and beside torchjd's two ways
processes  two processes at ZeRO stages beside one, plain and with surgery
epoch      a whole epoch, from the start of the process to the dev scores, beside transformers' Trainer
scoring    the pair tasks' dev splits beside sentence-transformers and transformers' pipeline
techniques a training step with each technique, named as for `minbert ablate`, beside one with none

On a GPU the same command also takes the shape of BERT-base and 256 examples per task, BertModel under torch.compile,
and a profile of each side. `results.json` in --out keeps every turn, `results.md` the tables, `results.svg` the plot.
What is there of an earlier command stays, but for the comparisons that are made again.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from epoch import epochs
from performance_report import Aim, Comparison, describe_machine, keep
from turns import Measured, Side, take_turns

Section = Literal["step", "surgery", "processes", "epoch", "scoring", "techniques"]
Precision = Literal["fp32", "bf16"]
METHODS = ("pcgrad", "upgrad")
# Those that need no file, and do not change what a step trains on.
TECHNIQUES = ("two_hidden_layers", "joint_pairs", "joint_sides", "averaged_weights", "layer_decay", *METHODS, "rdrop")
TECHNIQUES += ("smart", "smart_on_all=smart_weight:1", "proximal=proximal_weight:1", "label_smoothing", "ordinal")
TECHNIQUES += ("pearson_loss", "cosent", "square_root_batches")
PADDED, GROUPED, COMPILED = "transformers, padded", "transformers, grouped by length", "transformers, torch.compile"


@dataclass(frozen=True)
class Options:
    """Benchmark of speed and memory beside the peers."""

    data: str = "builtin"
    """Data, as for `minbert train`."""
    model: tuple[str, ...] = ()
    """Models, as for `minbert train`; `bert-base` is its shape with random weights. The default is minilm, on a GPU
    both."""
    only: tuple[Section, ...] = ("step", "surgery", "processes", "epoch", "scoring", "techniques")
    """Sections to run."""
    sides: tuple[str, ...] = ()
    """Measure only sides with one of these words in their names, and those that the others are compared with."""
    batch_size: tuple[int, ...] = ()
    """Examples per task and step. The default is 8 32, on a GPU 8 32 256."""
    precision: tuple[Precision, ...] = ()
    """The default is fp32 bf16, on a GPU bf16 fp32. The step is measured in each, everything else in the first."""
    zero_stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 2, 3)
    """Of the two processes."""
    rounds: int = 4
    """Turns that each side takes."""
    steps: int = 2
    """Steps in a turn."""
    epoch_rounds: int = 1
    """Epochs that each side trains."""
    train_limit: int | None = None
    """Training examples per task, spread evenly over its file; without it all."""
    eval_limit: int | None = None
    """Dev examples per task, for the epoch and the scoring; without it all."""
    threads: int = 1
    """Threads of each process."""
    profile: bool = False
    """Keep a profile of a step of each side, as on a GPU always."""
    out: Path = Path("performance")
    """Folder for the results."""
    seed: int = 0


def main() -> None:
    options = tyro.cli(Options)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    gpus = _gpus()
    models = options.model or (("minilm", "bert-base") if gpus else ("minilm",))
    failed = False
    with tempfile.TemporaryDirectory() as name:
        os.environ["MINBERT_CACHE"] = f"{name}/cache"  # nobody else's tokens
        for model in models:
            run, title = _prepare(options, model, Path(name)), Path(model).name
            for comparison in _compare(options, title, run, gpus, Path(name)):
                keep(options.out, comparison, describe_machine(), str(options))
                print(comparison.table(), flush=True)
                failed |= any(side.failed for side in comparison.sides)
    if failed:
        raise SystemExit("some sides failed; results.md says why")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _prepare(options: Options, model: str, folder: Path) -> Path:
    """The run that all sides start from; its model is a folder that every library can load."""
    from weights import starting_weights

    from minbert.launch.options import parse_run_config
    from minbert.trainer.run.preparation import prepare

    weights = starting_weights(model, options.data, folder / "weights" / Path(model).name)
    words = f"--clip 0 --seed {options.seed} --trackers".split()
    words += ["--data", options.data, "--model", str(weights), "--run", str(folder / "runs" / Path(model).name)]
    for name in ("train_limit", "eval_limit"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return prepare(parse_run_config(words)).path


def _compare(options: Options, model: str, run: Path, gpus: int, folder: Path) -> Iterable[Comparison]:
    """Every comparison that is asked for, as it is done."""
    precisions = options.precision or (("bf16", "fp32") if gpus else ("fp32", "bf16"))
    batch_sizes = options.batch_size or ((8, 32, 256) if gpus else (8, 32))
    for section in options.only:
        if section == "scoring":
            yield _scoring(options, run, f"{model}, {precisions[0]}", {"precision": precisions[0]})
            continue
        for precision in precisions if section == "step" else precisions[:1]:
            for batch_size in batch_sizes:
                setting = f"{model}, {batch_size} per task, {precision}"
                same = {"batch_size": batch_size, "precision": precision}
                if section == "step":
                    yield _step(options, run, setting, same, bool(gpus))
                elif section == "surgery":
                    yield _surgery(options, run, setting, same)
                elif section == "techniques":
                    yield _techniques(options, run, setting, same)
                elif section == "epoch":
                    yield _epoch(options, run, setting, same, folder)
                elif gpus == 1:
                    print(f"processes, {setting}: two processes need two GPUs, and there is one", flush=True)
                else:
                    for stage in options.zero_stages:
                        yield _processes(options, run, f"{setting}, stage {stage}", same, stage)


def _step(options: Options, run: Path, setting: str, same: dict, on_gpu: bool) -> Comparison:
    sides = [
        Side("matmul", "peers.matmul:peak", same),
        Side(PADDED, "peers.hf:training", same),
        Side(GROUPED, "peers.hf:training", same, {"grouped": True}),
        Side("minbert", "ours:training", same),
    ]
    if on_gpu:
        sides.append(Side(COMPILED, "peers.hf:training", same, {"compiled": True}))
    measured = _take_turns(options, sides, run, "step", setting, PADDED)
    peak = measured.pop(0) if measured[0].name == "matmul" else None
    comparison = Comparison("step", setting, "tokens", PADDED, measured, _operations(run), peak)
    ours, padded, grouped = (comparison.side(name) for name in ("minbert", PADDED, GROUPED))
    if on_gpu and same["precision"] == "bf16" and same["batch_size"] >= 32:
        comparison.aims = [Aim.at_least("minbert to transformers, padded: speed", 5.0, ours, padded)]
        if same["batch_size"] >= 256:
            comparison.aims.append(Aim("share of the matmul peak", 0.5, comparison.share_of_peak(ours), True))
    elif not on_gpu and same["precision"] == "fp32":
        bound = 4.5 if same["batch_size"] >= 32 else 4.0
        comparison.aims = [
            Aim.at_least("minbert to transformers, padded: speed", bound, ours, padded),
            Aim.at_least("minbert to transformers, grouped by length: speed", 2.0, ours, grouped),
        ]
    return comparison


def _surgery(options: Options, run: Path, setting: str, same: dict) -> Comparison:
    sides = [Side("sum", "ours:training", same)]
    sides += [Side(method, "ours:training", same | {"aggregator": method}) for method in METHODS]
    sides += [
        Side(f"torchjd {way}, {method}", "peers.torchjd_step:training", same | {"aggregator": method}, {"way": way})
        for way in ("mtl_backward", "autogram")
        for method in METHODS
    ]
    measured = _take_turns(options, sides, run, "surgery", setting, "sum")
    comparison = Comparison("surgery", setting, "tokens", "sum", measured)
    plain = comparison.side("sum")
    for method in METHODS:
        ours = comparison.side(method)
        comparison.aims.append(Aim.at_most(f"{method} to the sum: time", 1.05, ours, plain))
        for way in ("mtl_backward", "autogram"):
            peer = comparison.side(f"torchjd {way}, {method}")
            comparison.aims.append(Aim.at_least(f"{method} to {peer.name}: speed", 5.0, ours, peer))
            memory = None if peer.why or ours.why else ours.memory / peer.memory
            comparison.aims.append(Aim(f"{method} to {peer.name}: memory", 0.5, memory, False))
    return comparison


def _processes(options: Options, run: Path, setting: str, same: dict, stage: int) -> Comparison:
    sides = [Side("one process, sum", "ours:training", same)]
    for method in ("sum", *METHODS):
        changed = same | {"processes": 2, "zero_stage": stage, "aggregator": method}
        sides.append(Side(f"two processes, {method}", "ours:training", changed, processes=2))
    measured = _take_turns(options, sides, run, "processes", setting, sides[0].name)
    comparison = Comparison("processes", setting, "tokens", sides[0].name, measured)
    one, two, *surgery = (comparison.side(side.name) for side in sides)
    comparison.aims = [Aim.at_least("two processes to one, sum: speed", 1.7, two, one)]
    for side in surgery:
        comparison.aims.append(Aim.at_most(f"{side.name} to the sum: time", 1.05, side, two))
    return comparison


def _scoring(options: Options, run: Path, setting: str, same: dict) -> Comparison:
    peers = ("sentence-transformers, encode", "transformers, pipeline")
    sides = [
        Side(peers[0], "peers.sentence_encoders:encode", same),
        Side(peers[1], "peers.sentence_encoders:pipeline", same),
        Side("minbert", "ours:scoring", same),
    ]
    measured = _take_turns(options, sides, run, "scoring", setting, peers[0], steps=1)
    comparison = Comparison("scoring", setting, "sentences", peers[0], measured)
    for peer in peers:
        other = comparison.side(peer)
        comparison.aims.append(Aim.at_least(f"minbert to {peer}: speed", 2.0, comparison.side("minbert"), other))
    return comparison


def _techniques(options: Options, run: Path, setting: str, same: dict) -> Comparison:
    from minbert.trainer.run.folder import RunFolder
    from minbert.tuning.extensions import extension

    tasks = RunFolder(run).read_config().corpus.tasks
    sides = [Side("none", "ours:steps", same)]
    sides += [Side(name, "ours:steps", same | change) for name, change in (extension(w, tasks) for w in TECHNIQUES)]
    return Comparison(
        "techniques", setting, "steps", "none", _take_turns(options, sides, run, "techniques", setting, "none")
    )


def _epoch(options: Options, run: Path, setting: str, same: dict, folder: Path) -> Comparison:
    print(f"epoch, {setting}", flush=True)
    measured = epochs(run, same, options.epoch_rounds, options.threads, folder / "epochs")
    comparison = Comparison("epoch", setting, "examples", "transformers' Trainer", measured)
    ours, plain, grouped = (comparison.side(side.name) for side in measured)
    comparison.aims = [
        Aim.at_least("minbert to transformers' Trainer: speed", 5.0, ours, plain),
        Aim.at_least("minbert to transformers' Trainer, group_by_length: speed", 3.0, ours, grouped),
    ]
    return comparison


def _take_turns(
    options: Options, sides: Sequence[Side], run: Path, section: str, setting: str, base: str, steps: int = 0
) -> list[Measured]:
    print(f"{section}, {setting}", flush=True)
    words = options.sides or ("",)
    asked = [side for side in sides if side.name == base or any(word in side.name for word in words)]
    profiles = _profiles(options, section, setting)
    return take_turns(asked, run, options.rounds, steps or options.steps, options.threads, profiles)


def _profiles(options: Options, section: str, setting: str) -> Path | None:
    if not options.profile and not _gpus():
        return None
    return options.out / "profiles" / section / setting.replace(", ", "-").replace(" ", "-")


def _operations(run: Path) -> float:
    """Floating-point operations of a training step per token: 6 for each parameter of the encoder's matrices. Attention
    is below a hundredth of that at these lengths, and the heads are, too."""
    from minbert.trainer.model.weights import read_config

    shape = read_config(run / "encoder")
    layer = 4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size
    return 6.0 * shape.num_hidden_layers * layer


if __name__ == "__main__":
    main()
