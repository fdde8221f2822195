"""How many operations a step asks of a GPU.

No GPU is needed: tensors on the device "meta" have shapes and no values, and everything that PyTorch would launch for
them passes by here: of bf16, attention as the flash kernel's two operations, and else as some twenty, of which a GPU
makes few. That nothing is read back between logged steps is for `test_waiting` to say.
"""

from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
from known_tasks import QUORA, SST, STS
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minbert.data.batches.plan import BatchPlan
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import TokenisedSplit
from minbert.launch.options import parse_run_config
from minbert.trainer.engine.base import Engine, build_accelerator
from minbert.trainer.engine.optimizer import build_optimizer
from minbert.trainer.model import attention, tokenwise
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.multitask import Forward, MultitaskModel
from minbert.trainer.options import EncoderConfig, HeadsConfig, OptimizerConfig
from minbert.trainer.processes.world import World
from minbert.trainer.step import TrainingStep

BASE = BertConfig(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
)
META, RATES = torch.device("meta"), OptimizerConfig(lr=1e-5, head_lr=1e-3)


class Launches(TorchDispatchMode):
    """Counts what is done on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = dict[str, int]()

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        tensors = [one for one in tree_leaves([arguments, named, result]) if isinstance(one, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not _is_nothing(function):
            self.operations[function.__name__] = self.operations.get(function.__name__, 0) + 1
        return result


def _is_nothing(function) -> bool:
    """Whether it makes a view, or room."""
    returns = function._schema.returns
    aliases = [each.alias_info for each in returns if each.alias_info is not None]
    return (bool(aliases) and not any(each.is_write for each in aliases)) or "empty" in function.__name__


def lower(monkeypatch) -> None:
    """Do what autocast does, which does not know the device "meta": linear layers compute in bf16."""

    def linear(x, weight, bias):
        return torch.nn.functional.linear(*(each.to(torch.bfloat16) for each in (x, weight, bias)))

    monkeypatch.setattr(tokenwise, "plain_linear", linear)
    monkeypatch.setattr(tokenwise, "_lowered", lambda x: torch.bfloat16)


def attend_flat(monkeypatch) -> None:
    """As a GPU with the flash kernel does."""
    monkeypatch.setattr(attention, "serves", lambda qkv, heads: qkv.dtype == torch.bfloat16)


def build_step(aggregator: str, monkeypatch) -> TrainingStep:
    generator = np.random.default_rng(0)

    def column(rows: int) -> Ragged:
        lengths = generator.integers(4, 60, rows)
        return Ragged(generator.integers(999, 30000, lengths.sum()), ends([lengths]))

    splits = {
        task.name: TokenisedSplit([*map(str, range(64))], tuple(column(64) for _ in range(sides)), np.zeros(64, "f"))
        for task, sides in ((SST, 1), (QUORA, 2), (STS, 2))
    }
    with META:
        model = MultitaskModel([SST, QUORA, STS], BASE, EncoderConfig(), HeadsConfig())
    monkeypatch.setattr(Forward, "_arithmetic", lambda self: nullcontext())
    supported = [*_get_fused_kernels_supported_devices(), "meta"]
    optimizers = import_module("torch.optim.optimizer")  # `torch.optim` has taken it out
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: supported)
    accelerator = build_accelerator(parse_run_config([]), World(0, 1, torch.device("cpu")))
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, RATES), device_placement=False)
    monkeypatch.setattr(accelerator.state, "device", META)
    engine = Engine(accelerator, model, optimizer)
    engine.train()
    plan = BatchPlan(dict.fromkeys(splits, 64), 8)
    return TrainingStep(engine, plan, splits, World(0, 1, META), aggregator=aggregator)


def launches(aggregator: str, monkeypatch) -> Launches:
    step = build_step(aggregator, monkeypatch)
    for number in range(2):  # the first makes the optimizer's moments
        with Launches() as counted:
            step(number)
    return counted


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 1.07), ("fp32", 1.21)])
def test_surgery_launches_hardly_more_than_the_sum(precision, bound, monkeypatch):
    """Where attention is padded."""
    if precision == "bf16":
        lower(monkeypatch)
    plain, surgery = (launches(name, monkeypatch) for name in ("sum", "pcgrad"))
    grouped = surgery.operations.get("_grouped_mm.default", 0)
    assert grouped == (4 * 12 if precision == "bf16" else 0)  # one for each linear layer, of all tasks
    ratio = surgery.total / plain.total
    assert ratio <= bound, (ratio, plain.operations, surgery.operations)


def test_the_flash_kernel_saves_a_third_of_the_launches(monkeypatch):
    """Of the sum; surgery has as many more as it had before, which is a larger share of fewer."""
    lower(monkeypatch)
    padded = {name: launches(name, monkeypatch).total for name in ("sum", "pcgrad")}
    attend_flat(monkeypatch)
    flat = {name: launches(name, monkeypatch) for name in ("sum", "pcgrad")}
    for name, counted in flat.items():
        once = [counted.operations[f"_flash_attention_{way}.default"] for way in ("forward", "backward")]
        assert once == [12, 12]
        assert padded[name] - counted.total >= 45 * 12, (name, counted.operations)
    assert flat["sum"].total <= 0.65 * padded["sum"]
    assert flat["pcgrad"].total <= 1.11 * flat["sum"].total
