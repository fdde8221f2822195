"""AdamW over named parameter groups, and the learning rate as a pure function of the step.

Nothing about the schedule needs saving: the rate is computed from the step number, once per optimizer step, whatever
the number of processes. Encoder ("trunk") and heads are separate groups, because they may learn at different rates,
because what the tasks share is the trunk alone, and because a step leaves the heads of tasks that it does not train as
they are.
"""

import math

import torch
from torch import Tensor

from minbert.trainer.config import OptimizerConfig
from minbert.trainer.model import MultitaskModel


def parameter_groups(model: MultitaskModel, config: OptimizerConfig) -> list[dict]:
    """Groups `trunk` and one `heads.TASK` for each task, each with and without weight decay (vectors, i.e. biases and
    norms, have none)."""
    groups = []
    heads = [(head_group(task), head, config.head_lr) for task, head in model.heads.items()]
    for part, module, peak in [("trunk", model.bert, config.lr), *heads]:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [parameter for parameter in trainable if (parameter.ndim > 1) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "name": part, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return groups


def head_group(task: str) -> str:
    """The name of the groups with the parameters of a task's head."""
    return f"heads.{task}"


def build_optimizer(model: MultitaskModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with bias-corrected moments, in one fused kernel per group."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=True)


def rate_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`: linear warm-up, then the schedule."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` of a parameter; before its first update zeros, as that makes them."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
