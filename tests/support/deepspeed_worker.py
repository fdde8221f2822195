"""One process of the conversion tests: trains a few steps and saves with DeepSpeed's own `save_checkpoint`, as a user's
script would that has this model and knows nothing of our checkpoints.

Started by the launcher: `python deepspeed_worker.py RUN STEPS OUT`; makes OUT/stage-0 to OUT/stage-3.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import save_file

from minbert.data.sequences.tokens import load_tokenizer
from minbert.launch.processes import record_errors
from minbert.trainer.checkpoint.shards import owned
from minbert.trainer.engine.base import build_accelerator, build_engine
from minbert.trainer.engine.optimizer import build_optimizer
from minbert.trainer.processes import world as distributed
from minbert.trainer.processes.random_state import seed_everything
from minbert.trainer.processes.world import World
from minbert.trainer.run.data import build_plan, load_split
from minbert.trainer.run.folder import RunFolder
from minbert.trainer.run.saved_model import build_model
from minbert.trainer.step import TrainingStep


def run_stage(run: RunFolder, stage: int, steps: int, world: World, out: Path) -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    config = run.read_config()
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": stage})})
    tokenizer = load_tokenizer(run.encoder)
    splits = {name: load_split(config, name, "train", tokenizer) for name in config.corpus.names}
    seed_everything(config.seed)
    model = build_model(config, run)
    engine = build_engine(build_accelerator(config, world), model, build_optimizer(model, config.optimizer))
    engine.train()
    step = TrainingStep(engine, build_plan(config, splits), splits, world)
    for number in range(steps):
        step(number)
    engine.model.save_checkpoint(str(out / "deepspeed"), tag=f"global_step{steps}")
    parts = owned(engine.parts(), world.rank, world.size)
    tensors = {f"{kind}/{p.name}[{p.start}:{p.start + p.length}]": t for p in parts for kind, t in p.tensors.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, out / f"rank-{world.rank}.safetensors")
    world.barrier()


def main() -> None:
    run, steps, out = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    world = distributed.start(run.read_config().parallel)
    for stage in range(4):
        (out / f"stage-{stage}").mkdir(exist_ok=True)
        run_stage(run, stage, steps, world, out / f"stage-{stage}")
    distributed.stop()


if __name__ == "__main__":
    with record_errors():
        main()
