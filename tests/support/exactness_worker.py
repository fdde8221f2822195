"""One process of the exactness tests: runs several cases of the training step in turn and saves what became of each.

Started by the launcher: `python exactness_worker.py RUN CASES OUT`, where CASES is a JSON list of cases.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401
import torch
import torch._dynamo
from accelerate.state import AcceleratorState, GradientState, PartialState
from known_tasks import COSENT, MLM, PEARSON, TASKS
from safetensors.torch import save_file
from toy_objectives import OBJECTIVES, TAUGHT, TEACHERS_DECAY

from minbert.data.sequences.tokens import load_tokenizer
from minbert.launch.processes import record_errors
from minbert.trainer.config import RunConfig
from minbert.trainer.engine.base import SMALLEST_BUCKET, build_accelerator, build_engine
from minbert.trainer.engine.copies import AVERAGE, TEACHER, Decays, warmed_up
from minbert.trainer.engine.optimizer import parameter_groups
from minbert.trainer.engine.optimizer import rates as scheduled_rates
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.processes import world as distributed
from minbert.trainer.processes.random_state import seed_everything
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import build_plan, load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import build_model
from minbert.trainer.step import TrainingStep

# AdamW divides by the root of its second moment: where a gradient is nothing but rounding error, an update would be as
# large as any other. A large epsilon leaves only what can be compared.
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=1.0), "adamw": partial(torch.optim.AdamW, lr=1.0, eps=1e-3)}
# Of five steps, the first trains the heads, and the others the encoder down to layer 1, layer 0, the embeddings.
UNFREEZING = {"head_warmup": 0.2, "unfreeze": "gradual", "unfreeze_share": 0.6, "lr_schedule": "constant"}


def configured(config: RunConfig, case: dict) -> RunConfig:
    batch = {
        key: case[key]
        for key in ("aggregator", "batch_size", "accumulation", "surgery_scope", "task_schedule")
        if key in case
    }
    heads = {key: case[key] for key in ("pair_encoding",) if key in case}
    parallel = {"zero_stage": case["zero_stage"]}
    optimizer = UNFREEZING if "unfreezing" in case else {}
    encoder = {"freeze": case["freeze"]} if "freeze" in case else {}
    tasks = tuple(
        (TASKS | {"mlm": MLM, "cosent": COSENT, "pearson": PEARSON})[name]
        for name in case.get("tasks", config.corpus.names)
    )
    return config.model_copy(
        update={
            "corpus": config.corpus.model_copy(update={"tasks": tasks}),
            "optimizer": config.optimizer.model_copy(update=optimizer),
            "batch": config.batch.model_copy(update=batch),
            "encoder": config.encoder.model_copy(update=encoder),
            "heads": config.heads.model_copy(update=heads),
            "parallel": config.parallel.model_copy(update=parallel),
        }
    )


def run_case(run: RunFolder, case: dict, world: World, out: Path) -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    config = configured(run.read_config(), case)
    tokenizer = load_tokenizer(run.encoder)
    splits = {name: load_split(config, name, "train", tokenizer) for name in config.corpus.names}
    seed_everything(0)
    model = build_model(config, run)
    groups = parameter_groups(model, config.optimizer)
    optimizer = OPTIMIZERS[case["optimizer"]](groups)
    engine = build_engine(build_accelerator(config, world), model, optimizer)
    engine.train()
    if engine.is_sharded:  # DeepSpeed's own reductions, which have nothing to do, would have 2 GB for it
        assert engine.zero.reduce_bucket_size == SMALLEST_BUCKET

    def rates(number: int) -> dict[str, float]:
        if "unfreezing" in case:
            return scheduled_rates(number, case["steps"], config.optimizer, engine.peak_rates)
        frozen = {"layer 0": 0.0} if number == case.get("frozen_at") else {}
        return engine.peak_rates | frozen

    step = TrainingStep(
        engine,
        build_plan(config, splits),
        splits,
        world,
        aggregator=config.batch.aggregator,
        accumulation=config.batch.accumulation,
        clip=case.get("clip", 0.0),
        per_layer=config.batch.surgery_scope == "layer",
        objective=(OBJECTIVES | TAUGHT)[case.get("objective", "supervised")],
        rates=rates,
        copies=copies_in(case),
    )
    assert step.in_one_backward
    step.in_one_backward = "per_task" not in case
    history, sent = {}, list[str]()
    distribute = engine._one_backward._distribute

    def noted(part: str, block: torch.Tensor) -> None:
        sent.append(part)
        distribute(part, block)

    engine._one_backward._distribute = noted
    for number in range(case["steps"]):
        if number == case.get("broken_step"):
            labels = splits["sts"].labels.copy()
            splits["sts"].labels[:] = float("nan")
            step.feed._made.clear()  # they may have been made before
            result = step(number)
            assert result.skipped and "sts" in result.skipped, result.skipped
            splits["sts"].labels[:] = labels
            step.feed._made.clear()
            continue
        result = step(number)
        assert result.skipped is None, result.skipped
        history[f"losses/{number}"] = torch.tensor(list(result.losses.values()), dtype=torch.float64)
        history[f"weights/{number}"] = torch.tensor(list(result.weights.values()), dtype=torch.float64)
        history[f"norm/{number}"] = torch.tensor(result.grad_norm, dtype=torch.float64)
        if "average" in case:
            average = averaged_weights(step, lambda: build_model(config, run))
    state = engine.full_state()
    held = sum(shard.length for shard in engine.shards if shard.is_shared)
    counts = {"held": torch.tensor(held), "sent": torch.tensor(len(sent))}
    save_file(history | counts, out / f"{case['name']}-rank{world.rank}.safetensors")
    if world.is_main:
        save_file(state, out / f"{case['name']}.safetensors")
        if "average" in case:
            save_file(average, out / f"{case['name']}.average")


def copies_in(case: dict) -> Decays:
    copies: Decays = {AVERAGE: partial(warmed_up, case["average"])} if "average" in case else {}
    return copies | ({TEACHER: lambda step: TEACHERS_DECAY} if case.get("objective") in TAUGHT else {})


def averaged_weights(step: TrainingStep, build: Callable[[], MultitaskModel]) -> dict[str, torch.Tensor]:
    """The average, on rank 0, from the middle of an evaluation; the weights are afterwards what they were."""
    engine, batch = step.engine, step.batch(step.plan.names, 0, 0)
    before = engine.full_state()
    with engine.evaluating(), torch.no_grad():
        average = engine.full_state()
        outputs = engine(batch)
    if average:
        model = build().eval()
        model.load_state_dict(average)
        for name, expected in model(batch).items():
            torch.testing.assert_close(outputs[name], expected.detach())
    after = engine.full_state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return average


def main() -> None:
    run, cases, out = RunFolder(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    size = int(os.environ.get("WORLD_SIZE", 1))
    parallel = run.read_config().parallel.model_copy(update={"processes": size, "zero_stage": 0})
    world = distributed.start(parallel)
    # Stage 3 collects garbage whenever it starts: that takes a quarter of the time if what libraries hold is looked at.
    gc.freeze()
    for case in cases:
        run_case(run, case, world, out)
    world.barrier()
    distributed.stop()


if __name__ == "__main__":
    with record_errors():
        main()
