"""Runs on GPUs beside the same run on a CPU: `MINBERT_GPU_TESTS=1 pytest -m gpu` where there are some.

One case is of the CPU, whose shards it compares: so that the comparison itself is run everywhere.
"""

from pathlib import Path

import pytest
import torch
from small_runs import CORPUS, logged, outside, tensors_of

from minbert.launch.options import parse_run_config
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.metrics import MetricsWindow
from minbert.trainer.processes import world as distributed
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare

SMALL = f"--data {CORPUS} --batch-size 6 --log-every 1 --eval-limit 10 --evaluations 1 --trackers"
SAME = "--encoder-dropout 0 --head-dropout 0"  # a GPU draws other numbers


def train(run: Path, options: str) -> list[dict]:
    outside("train", "--run", run, *SMALL.split(), *options.split())
    return [record for record in logged(run) if "grad_norm" in record]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """What is logged of three steps on a CPU, by aggregator."""
    found: dict[str, list[dict]] = {}

    def records(aggregator: str) -> list[dict]:
        if aggregator not in found:
            run = tmp_path_factory.mktemp(aggregator) / "run"
            found[aggregator] = train(run, f"--steps 3 --device cpu {SAME} --aggregator {aggregator}")
        return found[aggregator]

    return records


ON_GPUS = [  # options, GPUs, and how far rounding takes the first step's numbers
    ("", 1, 1e-3),
    ("--deterministic", 1, 1e-3),
    ("--accumulation 2", 1, 1e-3),
    ("--zero-stage 0", 1, 1e-3),
    ("--zero-stage 2", 1, 1e-3),
    ("--zero-stage 3", 1, 1e-3),
    ("--precision tf32", 1, 2e-2),
    ("--precision bf16", 1, 5e-2),
    ("--precision bf16 --zero-stage 3", 1, 5e-2),
    ("--processes 2", 2, 1e-3),
    ("--processes 2 --zero-stage 1", 2, 1e-3),
    ("--processes 2 --zero-stage 3", 2, 1e-3),
]


@pytest.mark.parametrize(
    ("options", "aggregator", "tolerance"),
    [("--device cpu --zero-stage 2", "pcgrad", 1e-4)]
    + [
        pytest.param(f"--device cuda {options}", aggregator, tolerance, marks=pytest.mark.gpu(count))
        for options, count, tolerance in ON_GPUS
        for aggregator in ("sum", "pcgrad", "upgrad")
    ],
)
def test_losses_gradients_and_conflicts_are_those_of_a_cpu(on_cpu, tmp_path, options, aggregator, tolerance):
    expected = on_cpu(aggregator)
    found = train(tmp_path / "run", f"--steps 3 {SAME} --aggregator {aggregator} {options}")
    assert len(found) == len(expected) == 3
    for own, reference in zip(found, expected):
        assert own.keys() == reference.keys()
        for name, value in reference.items():
            if name != "conflicts":  # a cosine near zero may have either sign
                assert own[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (own["step"], name)
        tolerance *= 3  # AdamW makes as large a step of a gradient that is nearly zero as of any


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "--precision bf16 --aggregator pcgrad", "--zero-stage 2"])
def test_a_run_that_was_resumed_ends_the_same_to_the_bit(tmp_path, options):
    options = f"--device cuda --deterministic --lr-schedule constant --warmup 0 {options}"
    for name, budgets in {"whole": (4,), "resumed": (2, 4)}.items():
        for steps in budgets:
            train(tmp_path / name, f"--steps {steps} {options}")
    one, other = (tensors_of(RunFolder(tmp_path / name).checkpoints / "step-00000004") for name in ("whole", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("aggregator", ["sum", "pcgrad"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_waited_for_between_logged_steps(tmp_path, aggregator, precision):
    """CUDA itself raises an error where the host would wait."""
    options = f"{SMALL} --aggregator {aggregator} --precision {precision}"
    run = prepare(parse_run_config([*options.split(), "--run", str(tmp_path / "run")]))
    config = run.read_config()
    world, splits = distributed.start(config.parallel), load_splits(config, run, "train")
    engine = assemble_engine(config, run, world, pretrained=False)
    step = assemble_step(config, engine, build_plan(config, splits), splits, world)
    window = MetricsWindow(world)
    for number in range(2):  # what is made once
        window.add(step(number))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            window.add(step(number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
