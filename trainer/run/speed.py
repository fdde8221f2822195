"""How much of what the machine can do a run does: model FLOPs of its encoder, beside this process's matrix products.

Model FLOPs are those that any implementation needs (Chowdhery et al. 2022, appendix B, without the attention scores,
which are few at the lengths here): 2 for each weight of the encoder's layers and token forward, as much for the
gradient of the activations, and as much for that of the weights that are trained. Second passes, as of surgery or
SMART, count for nothing.
"""

import time

import torch

from minbert.trainer.config import RunConfig
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.linear import linear

SIZE = {"cpu": 512, "cuda": 4096}  # of the matrices
LONGEST = 0.1  # seconds


def flops_per_token(config: RunConfig, shape: BertConfig) -> float:
    """Model FLOPs of a training step for each token, as `config` freezes layers."""
    each = 2 * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size)
    freeze = config.encoder.freeze
    frozen = shape.num_hidden_layers if freeze == "encoder" else freeze if isinstance(freeze, int) else 0
    return each * (shape.num_hidden_layers + 2 * max(0, shape.num_hidden_layers - frozen))


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of the fastest of a few matrix products, as this process does them; takes up to a tenth of a
    second."""
    size = SIZE.get(device.type, 512)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + LONGEST
    linear(a, b, None)
    while time.perf_counter() < end:
        _wait(device)
        started = time.perf_counter()
        linear(a, b, None)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
