"""The host never waits for the device between two logged steps: one copy to it for each batch, none back.

The meta device stands for a GPU. It does the same operations without data, and raises an error where somebody looks at
a number of a tensor or copies one to the host: `.item()`, `.cpu()`, `float()`, `if tensor`, a boolean index.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minbert.launch.options import parse_run_config
from minbert.trainer import assembly
from minbert.trainer.engine.base import build_accelerator
from minbert.trainer.metrics import MetricsWindow
from minbert.trainer.model.multitask import Forward
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.preparation import prepare
from minbert.trainer.step import TrainingStep
from minbert.trainer.surgery.methods import METHODS, Aggregator

META, CPU = torch.device("meta"), torch.device("cpu")


class Copies(TorchDispatchMode):
    """Counts what is brought from the host to the device; a number alone travels with the operation that takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        given = [one for one in tree_leaves([arguments, named]) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if any(one.device == META for one in made) and any(one.device == CPU and one.ndim for one in given):
            self.found.append(str(function))
        return result


@pytest.fixture
def step_of(tmp_path, monkeypatch):
    def build(options: str) -> TrainingStep:
        small = "--train-limit 40 --eval-limit 10 --batch-size 4 --trackers --device cpu"
        run = prepare(parse_run_config([*small.split(), *options.split(), "--run", str(tmp_path / "run")]))
        config, world = run.read_config(), World(0, 1, META)

        def on_meta(config, world, **arguments):
            accelerator = build_accelerator(config, World(0, 1, CPU), **arguments)
            monkeypatch.setitem(PartialState._shared_state, "device", META)
            monkeypatch.setattr(accelerator.state, "device", META)
            return accelerator

        monkeypatch.setattr(assembly, "build_accelerator", on_meta)
        adam = sys.modules["torch.optim.adam"]  # `torch.optim` hides it
        monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
        monkeypatch.setattr(Forward, "_arithmetic", lambda _: nullcontext())  # autocast knows no such device
        splits = load_splits(config, run, "train")
        engine = assembly.assemble_engine(config, run, world, pretrained=False)
        return assembly.assemble_step(config, engine, build_plan(config, splits), splits, world)

    return build


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ("--accumulation 2 --task-schedule round_robin", 2),
        ("--average-decay 0.9 --proximal-weight 1 --smart-weight 1 --pair-encoding joint", 1),
        ("--smart-weight 0 2 1 --rdrop-weight 1 0 1", 1),
        ("--aggregator pcgrad --smart-weight 0 2 1", 1),
    ],
)
def test_a_step_is_one_copy_for_each_batch_and_no_look_back(step_of, options, copies):
    step = step_of(options)
    window = MetricsWindow(step.world)
    window.add(step(0))  # what a method remembers comes to the device once
    for number in range(1, 3):
        with Copies() as counted:
            window.add(step(number))
        assert len(counted.found) == copies, counted.found


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.unseeing])
def test_a_method_of_plain_arithmetic_looks_at_nothing(name):
    for groups, shape in ((1, (3, 3)), (2, (2, 3, 3))):
        gramian = torch.ones(shape, dtype=torch.float64, device=META)
        aggregator = Aggregator(name, 3, 0, groups)
        aggregator.from_gramian(gramian, 0)
        with Copies() as counted:
            weights = aggregator.from_gramian(gramian, 1)
        assert weights.device == META and weights.shape == shape[:-1] and not counted.found
