"""The wrapped model and optimizer: plain PyTorch, data parallel, or DeepSpeed ZeRO, behind the same few verbs.

Accelerate prepares all of them. The training step calls the engine forward, backward and step, and never asks which one
it is.
"""

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs
from torch import Tensor, nn

from minbert.data.batch import Batch
from minbert.trainer.config import RunConfig
from minbert.trainer.distributed import World
from minbert.trainer.model import MultitaskModel
from minbert.trainer.optimizer import set_rate


def build_accelerator(config: RunConfig, world: World, **kwargs: Any) -> Accelerator:
    """Accelerate's view of this run. `kwargs` go to Accelerator (trackers)."""
    stage = config.parallel.zero_stage
    if stage is None:
        # A step that trains one task leaves the other tasks' heads without a gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=config.batch.task_schedule != "all")
        return Accelerator(cpu=world.device.type == "cpu", kwargs_handlers=[unused], **kwargs)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage, config.optimizer.clip if stage else 0.0))
    # Not `cpu=True`: Accelerate would leave DeepSpeed out; it finds the CPU by itself.
    return Accelerator(deepspeed_plugin=plugin, **kwargs)


def deepspeed_config(stage: int, clip: float) -> dict:
    """DeepSpeed's configuration. Batches are cut, accumulated and scaled by the training step, so DeepSpeed is told
    of single micro-batches; arithmetic stays fp32 for it, as the model lowers its own."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,  # DeepSpeed's own default would be 1.0
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


class Engine:
    """A model that can be called, differentiated and stepped."""

    def __init__(self, accelerator: Accelerator, model: MultitaskModel, optimizer: torch.optim.Optimizer, clip: float):
        self.accelerator, self.clip = accelerator, clip
        self.stage: int | None = None
        if plugin := accelerator.state.deepspeed_plugin:
            self.stage = plugin.zero_stage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @property
    def module(self) -> MultitaskModel:
        """The model itself, without its wrapper. At stage 3 its parameters are shards outside of its modules."""
        return self.model if isinstance(self.model, MultitaskModel) else self.model.module

    def __call__(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        return self.model(batches)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, which is reduced over the processes with the `last` one before a step.

        The reduction is a mean: a loss that should be summed over processes must come multiplied by their number.
        """
        if self.stage is None:
            loss.backward()
        else:
            # accelerator.backward would step the engine, too.
            self.model.set_gradient_accumulation_boundary(last)
            self.model.backward(loss)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of a forward and backward pass: data parallelism reduces in the last one only."""
        if self.stage is None and not last:
            return self.accelerator.no_sync(self.model)
        return contextlib.nullcontext()

    def step(self, rate_factor: float) -> float | Tensor:
        """Clip, update with `rate_factor` times the peak learning rates, clear; returns the norm before clipping."""
        set_rate(self.optimizer, rate_factor)
        if self.stage:
            self.model.step()
            if self.stage == 3:
                # A parameter that a step does not use would keep the last step's gradient there.
                self.model.optimizer.grad_partitions_flat_buffer.zero_()
            return self.model.get_global_grad_norm()
        # Stage 0 reports no norm, so it is clipped here like plain PyTorch.
        norm = nn.utils.clip_grad_norm_(self._filled_parameters(), self.clip or float("inf"))
        if self.stage is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.model.step()
        return norm

    def _filled_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters; those that this step did not use get a gradient of zero, as a flat shard has it, so
        that their moments decay alike whatever the stage."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return parameters

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter, whole and on the CPU, on rank 0; an empty dictionary elsewhere. Collective.

        Shards are gathered one parameter at a time, so no process ever holds a second copy of the model on its device.
        """
        state = {}
        for name, parameter in self.module.named_parameters():
            with self._gathered(parameter):
                if self.accelerator.is_main_process:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def _gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        if self.stage != 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameter)
