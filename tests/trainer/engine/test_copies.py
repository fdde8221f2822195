"""Named copies of the weights in one process: how far they follow, and how they are exchanged.

That they are the same on several processes and under ZeRO is shown with the exactness of the step, that they resume
with the checkpoints.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from minbert.launch.options import parse_run_config
from minbert.trainer.config import RunConfig
from minbert.trainer.engine import copies
from minbert.trainer.engine.base import Engine, build_accelerator, build_engine
from minbert.trainer.engine.copies import AVERAGE, copies_of, swap, warmed_up
from minbert.trainer.engine.optimizer import build_optimizer
from minbert.trainer.processes.random_state import seed_everything
from minbert.trainer.processes.world import World
from minbert.trainer.run.preparation import prepare
from minbert.trainer.run.saved_model import build_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies") / "run"
    return prepare(
        parse_run_config(["--train-limit", "20", "--eval-limit", "5", "--freeze", "1", "--run", str(folder)])
    )


@pytest.fixture
def engine(run) -> Engine:
    config = run.read_config()
    seed_everything(0)
    model = build_model(config, run)
    accelerator = build_accelerator(config, World(0, 1, torch.device("cpu")))
    return build_engine(accelerator, model, build_optimizer(model, config.optimizer))


def random_update(engine: Engine) -> None:
    gradient = [torch.randn(shard.length).view_as(p) for shard, p in zip(engine.shards, engine.parameters.values())]
    engine.update(gradient, engine.peak_rates, torch.tensor(True))


def test_the_decay_warms_up_to_its_value():
    assert [warmed_up(0.999, n) for n in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert warmed_up(0.9, 80) == 0.9 and warmed_up(0.9, 79) < 0.9 and warmed_up(0.9, 10**6) == 0.9
    assert copies_of(RunConfig(), 10) == {}
    assert copies_of(RunConfig(optimizer={"average_decay": 0.5}), 10)[AVERAGE](100) == 0.5


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 25), chunk=st.integers(1, 9))
def test_a_swap_exchanges_all_values(length, chunk):
    one, other = torch.arange(length) + 0.0, -torch.arange(length) - 1.0
    expected = other.clone(), one.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "CHUNK", chunk)
        swap(one, other)
    assert torch.equal(one, expected[0]) and torch.equal(other, expected[1])


def test_an_exchange_takes_no_third_copy(engine, monkeypatch):
    """What it allocates at a time is a piece, however large the tensors are."""
    monkeypatch.setattr(copies, "CHUNK", 100)
    engine.keep_copy("one")
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if function in (torch.Tensor.clone, torch.clone):
                largest.append(result.numel())
            return result

    with Watch(), engine.exchanged("one"):
        pass
    assert max(largest) == 100


def test_copies_are_exchanged_in_place_and_back(engine):
    first = engine.full_state()
    engine.keep_copy("first")
    random_update(engine)
    engine.keep_copy("second")
    random_update(engine)
    last = engine.full_state()
    with engine.exchanged("first"):
        assert all(torch.equal(tensor, first[name]) for name, tensor in engine.full_state().items())
        with engine.exchanged("second"):  # changes places with the first ones
            assert not torch.equal(engine.full_state()["heads.sst.layers.1.weight"], first["heads.sst.layers.1.weight"])
    assert all(torch.equal(tensor, last[name]) for name, tensor in engine.full_state().items())
    with pytest.raises(ZeroDivisionError), engine.exchanged("first"):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, last[name]) for name, tensor in engine.full_state().items())


def test_parts_hold_a_copy_of_what_is_trained_and_only_of_that(engine):
    engine.keep_copy("first")
    kinds = {part.name: set(part.tensors) for part in engine.parts()}
    trained = {"weight", "exp_avg", "exp_avg_sq", "first"}
    assert kinds == {
        name: trained if name in engine.parameters else {"weight"} for name, _ in engine.module.named_parameters()
    }
    assert len(engine.parameters) < len(kinds)
