"""Surgery on shards of any cut, and what the training step makes of difficult cases, in one process."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert.data.errors import UserError
from minbert.data.sequences.tokens import load_tokenizer
from minbert.launch.options import parse_run_config
from minbert.trainer import train as training
from minbert.trainer.engine.base import build_accelerator, build_engine
from minbert.trainer.engine.optimizer import build_optimizer
from minbert.trainer.engine.parts import Shard, blocks_of
from minbert.trainer.metrics import MetricsWindow
from minbert.trainer.processes.random_state import seed_everything
from minbert.trainer.processes.world import World
from minbert.trainer.run import data
from minbert.trainer.run.data import build_plan, load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.preparation import prepare
from minbert.trainer.run.saved_model import build_model
from minbert.trainer.step import TrainingStep
from minbert.trainer.surgery.combination import combine, drop_signs, gramians, uniform
from minbert.trainer.surgery.conflicts import cosines, gramian_record, read_gramians

NAMES = {"bert.embeddings.word.weight": 40, "bert.layers.0.attention.qkv.weight": 33, "heads.sst.layers.1.bias": 9}
LAYERS = ("embeddings", "layer 0")
PARTS = dict(zip(NAMES, (*LAYERS, "heads.sst")))


def cut(name: str, start: int, length: int) -> Shard:
    return Shard(name, start, length, PARTS.get(name, "embeddings"), PARTS.get(name) != "heads.sst")


class Held:
    """Stands where an engine is asked for its shards: one process's part of a gradient."""

    def __init__(self, shards):
        self.shards = shards
        self.accelerator = type("A", (), {"device": torch.device("cpu")})

    def sum_over_shards(self, value):
        return value


@st.composite
def cuts(draw):
    """Shards of the three parameters over several processes, each cut anywhere."""
    processes = draw(st.integers(1, 4))
    bounds = {
        name: [0, *sorted(draw(st.lists(st.integers(0, size), min_size=processes - 1, max_size=processes - 1))), size]
        for name, size in NAMES.items()
    }
    return [[cut(name, edges[p], edges[p + 1] - edges[p]) for name, edges in bounds.items()] for p in range(processes)]


def whole_gradients(tasks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(size, generator=generator) for size in NAMES.values()] for _ in range(tasks)]


def held_by(shards, gradients):
    """The blocks of one process; the head is the first task's."""
    own = [[part[s.start : s.start + s.length] for s, part in zip(shards, g)] for g in gradients]
    return blocks_of(shards, own, ["heads.sst", "heads.quora", "heads.sts"])


WHOLE = [cut(name, 0, size) for name, size in NAMES.items()]


@given(cuts())
@settings(max_examples=40)
def test_gramians_of_shards_add_up(processes):
    gradients = whole_gradients()
    parts = [gramians(Held(shards), held_by(shards, gradients), LAYERS, 3).by_layer for shards in processes]
    for layer in range(2):
        rows = torch.stack([gradient[layer] for gradient in gradients]).double()
        torch.testing.assert_close(sum(parts)[layer], rows @ rows.T, rtol=1e-5, atol=1e-5)


@given(cuts())
@settings(max_examples=40)
def test_combining_and_dropping_do_not_depend_on_the_cut(processes):
    weights = {"embeddings": [0.5, -1.0, 3.0], "layer 0": [2.0, 1.0, 3.0], "heads.sst": [1.0]}
    weights = {part: torch.tensor(own) for part, own in weights.items()}
    expected = combine(WHOLE, held_by(WHOLE, whole_gradients()), weights)
    dropped = drop_signs(WHOLE, held_by(WHOLE, whole_gradients()), seed=7)
    for shards in processes:
        found = combine(shards, held_by(shards, whole_gradients()), weights)
        signs = drop_signs(shards, held_by(shards, whole_gradients()), seed=7)
        for shard, part, sign, whole, whole_sign in zip(shards, found, signs, expected, dropped):
            here = slice(shard.start, shard.start + shard.length)
            torch.testing.assert_close(part, whole[here])
            torch.testing.assert_close(sign, whole_sign[here])


def test_combination_is_the_weighted_sum_and_heads_keep_their_gradients():
    weights = {layer: torch.tensor([0.5, -2.0, 1.0]) for layer in LAYERS} | {"heads.sst": torch.ones(1)}
    first, second, third = whole_gradients()
    found = combine(WHOLE, held_by(WHOLE, whole_gradients()), weights)
    torch.testing.assert_close(found[0], 0.5 * first[0] - 2 * second[0] + third[0])
    torch.testing.assert_close(found[2], first[2])


def test_dropped_signs_follow_the_formula():
    """Chen et al. 2020, algorithm 1, with the draw that the shard makes."""
    gradients = whole_gradients()
    rows = torch.stack([gradient[0] for gradient in gradients])
    purity = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0))
    mask = purity > uniform(WHOLE[0], 3, torch.device("cpu"))
    expected = sum(torch.where(mask, row * (row > 0), row * (row < 0)) for row in rows)
    torch.testing.assert_close(drop_signs(WHOLE, held_by(WHOLE, gradients), seed=3)[0], expected)


def test_hashed_numbers_are_uniform_and_independent():
    shard = cut("bert.embeddings.word.weight", 5, 200_000)
    draws = uniform(shard, 1, torch.device("cpu")).double()
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi square with 49 degrees of freedom
    others = [
        uniform(cut(shard.name, 6, shard.length), 1, torch.device("cpu")),
        uniform(shard, 2, torch.device("cpu")),
        uniform(cut("bert.embeddings.position.weight", 5, shard.length), 1, torch.device("cpu")),
    ]
    for other in others:
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01


# --- the step ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("surgery")


def build_step(folder, options="", **arguments):
    """A training step of a small model on the built-in corpus, in this process."""
    name = f"run{abs(hash(options))}"
    text = f"--train-limit 40 --eval-limit 10 --batch-size 6 --encoder-dropout 0 --head-dropout 0 {options} --trackers"
    run = prepare(parse_run_config([*text.split(), "--run", str(folder / name)]))
    config = run.read_config()
    world = World(0, 1, torch.device("cpu"))
    splits = {task: load_split(config, task, "train", load_tokenizer(run.encoder)) for task in config.corpus.names}
    seed_everything(0)
    model = build_model(config, run).train()
    engine = build_engine(build_accelerator(config, world), model, build_optimizer(model, config.optimizer))
    return TrainingStep(engine, build_plan(config, splits), splits, world, **arguments)


def parameters(step):
    return {name: parameter.detach().clone() for name, parameter in step.engine.module.named_parameters()}


def assert_same(first, second, tolerance=0.0):
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("aggregator", ["sum", "uncertainty"])
def test_measuring_does_not_change_the_update(folder, aggregator):
    plain, measured = build_step(folder, aggregator=aggregator), build_step(folder, aggregator=aggregator)
    for number in range(3):
        first, second = plain(number), measured(number, measure=True)
        assert first.gramians is None and second.gramians.encoder.shape == (3, 3)
    # AdamW turns rounding errors of tiny gradients into parts of an update, which is 1e-3.
    assert_same(parameters(plain), parameters(measured), 1e-4)


def test_surgery_per_layer_is_surgery_on_each_layers_gradients(folder):
    step = build_step(folder, aggregator="upgrad", per_layer=True)
    result = step(0)
    from torchjd.aggregation import UPGradWeighting

    expected = torch.stack([UPGradWeighting()(g / g.diagonal().mean()) for g in result.gramians.by_layer])
    torch.testing.assert_close(torch.tensor(list(result.weights.values())).double(), expected.mean(0))
    assert result.gramians.layers == ("embeddings", "layer 0", "layer 1")


def test_bf16_keeps_gradients_in_fp32(folder):
    full, low = build_step(folder, aggregator="pcgrad"), build_step(folder, "--precision bf16", aggregator="pcgrad")
    first, second = full(0), low(0)
    for name, loss in first.losses.items():
        assert second.losses[name] == pytest.approx(loss, rel=0.03)
        assert second.losses[name] != loss
    assert all(parameter.dtype == torch.float32 for parameter in low.engine.parameters.values())
    low.engine.backward(low._losses(low.batch(low.plan.names, 1, 0), 1, 0)["sts"], True)
    assert {part.dtype for part in low.engine.collect_gradient() if part is not None} == {torch.float32}


def silence(step, task):
    """Make a task's outputs constant, so that it has no gradient in the encoder."""
    with torch.no_grad():
        step.engine.module.heads[task].layers[-1].weight.zero_()


def test_a_task_without_gradient_has_no_say(folder):
    both, pair = build_step(folder, aggregator="upgrad"), build_step(folder, aggregator="upgrad")
    silence(both, "quora")
    result = both(0)
    assert result.gramians.encoder[1].abs().max() == 0 and result.weights["quora"] == 1.0
    silence(pair, "quora")
    gramian = result.gramians.encoder[[0, 2]][:, [0, 2]]
    expected = pair.aggregator.from_gramian(gramian, 0)
    torch.testing.assert_close(torch.tensor([result.weights["sst"], result.weights["sts"]]).double(), expected)


@pytest.mark.parametrize("aggregator", ["sum", "pcgrad", "uncertainty", "graddrop"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(folder, aggregator, value):
    """Weights, moments, the number of updates and the average stay, and the next step goes on from them."""
    step = build_step(folder, aggregator=aggregator, copies={"average": lambda _: 0.5})
    step(0)
    before = parameters(step)
    states = step.engine.optimizer.state.values()
    kept = [{kind: tensor.clone() for kind, tensor in state.items()} for state in states]
    intact = step.splits["sts"]
    step.splits["sts"] = replace(intact, labels=np.full(40, value, np.float32))
    step.feed._made.clear()
    result = step(1)
    assert result.skipped and "sts" in result.skipped and "quora" not in result.skipped
    assert_same(before, parameters(step))
    assert kept[0].keys() == {"step", "exp_avg", "exp_avg_sq", "average"}
    assert all(torch.equal(old[kind], now[kind]) for old, now in zip(kept, states, strict=True) for kind in old)
    step.splits["sts"] = intact
    step.feed._made.clear()
    assert step(2).skipped is None
    assert all(parameter.isfinite().all() for parameter in parameters(step).values())
    assert all(not torch.equal(old["average"], now["average"]) for old, now in zip(kept, states) if old["step"])


def test_a_run_that_keeps_skipping_stops_with_an_explanation(folder, monkeypatch):
    arguments = "--train-limit 40 --eval-limit 10 --batch-size 6 --steps 9 --max-skipped 3 --trackers"
    run = prepare(parse_run_config([*arguments.split(), "--run", str(folder / "skipping")]))
    load = data.load_split

    def broken(config, task, split, tokenizer):
        loaded = load(config, task, split, tokenizer)
        if (task, split) == ("sts", "train"):
            loaded = replace(loaded, labels=np.full_like(loaded.labels, np.nan))
        return loaded

    monkeypatch.setattr(data, "load_split", broken)
    with pytest.raises(UserError, match=r"last 3 steps, up to step 3, were skipped: .* sts"):
        training.train(run)


def test_a_frozen_encoder_makes_surgery_a_sum_and_says_so(folder, caplog):
    frozen = "--freeze encoder"
    surgery, plain = build_step(folder, frozen, aggregator="pcgrad"), build_step(folder, frozen, aggregator="sum")
    assert surgery.layers == ()
    for number in range(2):
        surgery(number)
        plain(number)
    assert_same(parameters(surgery), parameters(plain), 1e-6)
    arguments = f"--train-limit 40 --eval-limit 10 --steps 1 --aggregator pcgrad {frozen} --trackers"
    with caplog.at_level(logging.WARNING):
        training.train(prepare(parse_run_config([*arguments.split(), "--run", str(folder / "frozen")])))
    assert "the tasks share nothing" in caplog.text


def test_task_weights_scale_the_losses(folder):
    step = build_step(folder, aggregator="sum", task_weights={"sst": 2.0, "quora": 1.0, "sts": 0.5})
    plain = build_step(folder, aggregator="sum")
    weighted, measured = step(0, measure=True), plain(0, measure=True)
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        weighted.gramians.encoder, measured.gramians.encoder * scale[:, None] * scale, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("aggregator", ["sum", "uncertainty"])
def test_measuring_does_not_change_the_weights_that_are_told(folder, aggregator):
    task_weights = {"sst": 2.0, "quora": 1.0, "sts": 0.5}
    plain, measured = (build_step(folder, aggregator=aggregator, task_weights=task_weights) for _ in range(2))
    found = [plain(0).weights, measured(0, measure=True).weights]
    assert found[0] == pytest.approx(found[1]) and found[0]["sst"] == pytest.approx(4 * found[0]["sts"])


@pytest.mark.parametrize("aggregator", ["sum", "uncertainty", "famo", "upgrad"])
def test_tokens_are_counted_once(folder, aggregator):
    """Not again where the losses are looked at before the first part's backward pass, or after the update."""
    step = build_step(folder, aggregator=aggregator, accumulation=2)
    rows = {name: step.plan.rows(name, 0) for name in step.plan.names}
    tokens = sum(int(column.lengths[rows[name]].sum()) for name in rows for column in step.splits[name].columns)
    result = step(0)
    assert result.tokens == tokens and result.seconds > 0
    window = MetricsWindow(step.world)
    window.add(result)
    window.add(result)
    assert window.close()["tokens_per_second"] == pytest.approx(
        tokens / result.seconds, rel=0.2
    )  # whatever else took time


def test_conflicts_are_recorded_and_read_back(folder, tmp_path):
    step = build_step(folder, aggregator="pcgrad")
    results = [step(number) for number in range(2)]
    record = results[0].measurements
    angles = cosines(results[0].gramians.encoder)
    assert record["cosine/sst-quora"] == pytest.approx(float(angles[0, 1]))
    assert record["conflicts"] == sum(float(angles[i, j]) < 0 for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert record["gradient_norm/sts"] == pytest.approx(float(results[0].gramians.encoder[2, 2]) ** 0.5)
    for number, result in enumerate(results):
        RunFolder(tmp_path).append_gramians(gramian_record(number, list(result.losses), result.gramians))
    with (tmp_path / "gramians.jsonl").open("a") as file:
        file.write('{"step": 2, "ta')  # torn by a kill
    steps, tasks, layers, values = read_gramians(tmp_path / "gramians.jsonl")
    assert (steps, tasks, layers) == ([0, 1], ["sst", "quora", "sts"], ["embeddings", "layer 0", "layer 1"])
    torch.testing.assert_close(values[1], results[1].gramians.by_layer)


def test_a_part_at_rate_zero_stays_as_it_is_and_has_no_say(folder):
    """Weights, moments and their bias correction; it is left out of the Gramian and of the gradient's norm."""
    step, other = build_step(folder, aggregator="pcgrad"), build_step(folder, aggregator="pcgrad")
    names = [name for name, part in step.engine.part_of.items() if part == "layer 1"]
    assert names and set(step.engine.shared_parts) == {"embeddings", "layer 0", "layer 1"}
    step(0)
    before = {part.name: {kind: t.clone() for kind, t in part.tensors.items()} for part in step.engine.parts()}
    counts = step.engine.updates()
    step.rates = lambda number: step.engine.peak_rates | {"layer 1": 0.0, "heads.sts": 0.0}
    other(0)
    result, whole = step(1), other(1)
    for part in step.engine.parts():
        same = [torch.equal(tensor, before[part.name][kind]) for kind, tensor in part.tensors.items()]
        frozen = step.engine.part_of[part.name] in ("layer 1", "heads.sts", "pooler")
        assert all(same) if frozen else not any(same), part.name
    moved = {name for name, count in step.engine.updates().items() if count > counts[name]}
    assert moved == {"embeddings", "layer 0", "heads.sst", "heads.quora"}
    place = result.gramians.layers.index("layer 1")
    assert result.gramians.by_layer[place].abs().max() == 0 < whole.gramians.by_layer[place].abs().max()
    assert result.grad_norm < whole.grad_norm
    step.rates = lambda number: step.engine.peak_rates
    step(2)
    assert not any(torch.equal(step.engine.parameters[name].flatten(), before[name]["weight"]) for name in names)
