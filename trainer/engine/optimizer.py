"""AdamW over named parameter groups, and the learning rate as a pure function of the step.

Nothing about the schedule needs saving: the rate is computed from the step number, once per optimizer step, whatever
the number of processes. Every part of the model has groups of its own, because parts may learn at different rates, and
because a step leaves those that it does not train as they are.
"""

import math
from collections.abc import Iterable
from inspect import unwrap

import torch
from torch import Tensor

from minbert.trainer.model.multitask import MultitaskModel, head_part
from minbert.trainer.options import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(model: MultitaskModel, config: OptimizerConfig) -> list[dict]:
    """Groups named by the parts of the model, each with and without weight decay (vectors, i.e. biases and norms, have
    none)."""
    groups, peaks = [], peak_rates(model.parts, config)
    for part, module in model.parts.items():
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [parameter for parameter in trainable if (parameter.ndim > 1) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "name": part, "lr": peaks[part], "weight_decay": decay})
    return groups


def peak_rates(parts: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """The peak learning rate of each part of the model: `head_lr` of a head and `lr` of the encoder's pooler and top
    layer, from which each layer down to the embeddings has `layer_decay` times the rate of the one above (Sun et al.
    2019, "How to Fine-Tune BERT for Text Classification?").

    `parts` are the encoder's from the embeddings, or the lowest that is trained, up to the top.
    """
    lr, head_lr = config.peaks
    peaks = {part: head_lr if part.startswith(head_part("")) else lr for part in parts}
    stack = [part for part in peaks if part == "embeddings" or part.startswith("layer ")]
    for depth, part in enumerate(reversed(stack)):
        peaks[part] *= config.layer_decay**depth
    return peaks


def rates(step: int, total: int, config: OptimizerConfig, parts: Iterable[str]) -> dict[str, float]:
    """The learning rate of each part of the model at `step` (from 0) of `total`; zero means frozen.

    `parts`: all that are trained, the encoder's from the embeddings up.
    """
    starts = first_steps(total, config, parts)
    peaks = peak_rates(starts, config)
    return {part: peaks[part] * rate_factor(step, total, config, first) for part, first in starts.items()}


def first_steps(total: int, config: OptimizerConfig, parts: Iterable[str]) -> dict[str, int]:
    """The step from which each of `parts` is trained; all are before the last of `total` steps.

    Heads are from the beginning, and after `head_warmup` the encoder: all at once, or from the top down in equal
    intervals (gradual unfreezing, Howard and Ruder 2018, section 3.3), so that its lowest part joins at
    `unfreeze_share`.
    """
    starts = dict.fromkeys(parts, 0)
    from_the_top = [part for part in reversed(starts) if not part.startswith(head_part(""))]
    first, last = (min(total - 1, round(share * total)) for share in (config.head_warmup, config.unfreeze_share))
    intervals = max(1, len(from_the_top) - 1)
    for number, part in enumerate(from_the_top):
        starts[part] = first if config.unfreeze == "at_once" else first + (last - first) * number // intervals
    return starts


class AdamW(torch.optim.AdamW):
    """PyTorch's own, as it is without torch.compile. To keep that off these functions, PyTorch wraps them in others,
    which import the compiler: a second of every process for something that is not used."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def build_optimizer(model: MultitaskModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with bias-corrected moments, in one fused kernel per group."""
    return AdamW(parameter_groups(model, config), fused=True)


def rate_factor(step: int, total: int, config: OptimizerConfig, first: int = 0) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`, of a part that is trained from step `first`.

    Its own linear warm-up times the schedule, which is the same for all. AdamW's first updates of a part are as large
    as the rate, whatever its gradients: a part that joins late needs the warm-up as those that begin do.
    """
    if step < first:
        return 0.0
    warmup = round(config.warmup * total)
    rise = min(1.0, (step - first + 1) / warmup) if warmup else 1.0
    if config.lr_schedule == "constant" or step < warmup:
        return rise
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return rise * (1.0 - progress if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` of a parameter; before its first update zeros, as that makes them."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
