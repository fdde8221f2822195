"""What a step keeps for its backward pass: nothing below the lowest part of the encoder that it trains."""

import pytest
import torch

from minbert.launch.options import parse_run_config
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import build_plan, load_splits
from minbert.trainer.run.preparation import prepare
from minbert.trainer.step import TrainingStep

SMALL = "--train-limit 40 --eval-limit 10 --batch-size 4 --trackers"


@pytest.fixture
def step_of(tmp_path):
    def build(options: str) -> TrainingStep:
        run = prepare(parse_run_config([*SMALL.split(), *options.split(), "--run", str(tmp_path / "run")]))
        config, world = run.read_config(), World(0, 1, torch.device("cpu"))
        splits = load_splits(config, run, "train")
        engine = assemble_engine(config, run, world, pretrained=False)
        return assemble_step(config, engine, build_plan(config, splits), splits, world)

    return build


def parts_with_a_graph(step: TrainingStep, number: int) -> set[str]:
    """The encoder's parts whose outputs lead back to weights while the step is trained."""
    found = set()

    def note(part: str):
        def hook(module, inputs, output) -> None:
            if output.requires_grad:
                found.add(part)

        return hook

    hooks = [module.register_forward_hook(note(part)) for part, module in step.engine.module.bert.parts.items()]
    result = step(number)
    for hook in hooks:
        hook.remove()
    assert result.skipped is None
    return found


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_of_a_frozen_encoder_nothing_is_kept(step_of, pooling):
    step = step_of(f"--freeze encoder --pooling {pooling} --steps 3")
    before = {name: p.clone() for name, p in step.engine.module.named_parameters()}
    assert parts_with_a_graph(step, 0) == set()
    moved = {name for name, p in step.engine.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("heads.") for name in moved)


@pytest.mark.parametrize("aggregator", ["sum", "pcgrad"])
def test_the_graph_ends_at_the_lowest_part_that_is_trained(step_of, aggregator):
    options = "--steps 10 --head-warmup 0.2 --unfreeze gradual --unfreeze-share 0.6 --pooling cls"
    step = step_of(f"{options} --aggregator {aggregator}")
    seen = []
    for number in range(10):
        trained = {part for part, rate in step.rates(number).items() if rate and part in step.layers}
        kept = parts_with_a_graph(step, number)
        assert kept - {"pooler"} == trained - {"pooler"}  # the pooler, above all, is not worth an exception
        seen.append(len(trained))
    assert seen == sorted(seen) and {0, 1, 2, 3, 4} == set(seen)


def test_what_wants_gradients_of_the_embeddings_gets_them_through_frozen_layers(step_of):
    """SMART looks for its perturbation below layers that are not trained yet; what it then adds has no graph there."""
    step = step_of("--steps 10 --head-warmup 0.5 --smart-weight 1 --encoder-dropout 0")
    assert parts_with_a_graph(step, 0) == {"layer 0", "layer 1"}  # of the ascent
    assert step.engine.module.bert.fixed == 4 and step(1).skipped is None
