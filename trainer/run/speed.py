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
from minbert.trainer.options import ParallelConfig

SIZE = {"cpu": 512, "cuda": 4096}  # of the matrices
LONGEST = 0.02  # seconds


def flops_per_token(config: RunConfig, shape: BertConfig) -> float:
    """Model FLOPs of a training step for each token, as `config` freezes layers."""
    each = 2 * (4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size)
    freeze = config.encoder.freeze
    frozen = shape.num_hidden_layers if freeze == "encoder" else freeze if isinstance(freeze, int) else 0
    return each * (shape.num_hidden_layers + 2 * max(0, shape.num_hidden_layers - frozen))


def arithmetic(parallel: ParallelConfig) -> torch.dtype:
    """In which a run multiplies. Accelerate is told of no precision: the model lowers its own."""
    return torch.bfloat16 if parallel.precision == "bf16" else torch.float32


class Product:
    """A matrix product that is as fast as the machine can, as this process does them: `flops` of it in a call."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, size = device, SIZE.get(device.type, 512)
        self.a, self.b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        self.flops = 2.0 * size**3

    @torch.no_grad()
    def __call__(self, times: int = 1) -> float:
        """Seconds that so many of them take."""
        self._wait()
        started = time.perf_counter()
        for _ in range(times):
            linear(self.a, self.b, None)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of the fastest of a few matrix products; takes a few hundredths of a second."""
    product = Product(device, dtype)
    product()  # kernels and memory are there after it
    fastest, end = product(), time.perf_counter() + LONGEST
    while time.perf_counter() < end:
        fastest = min(fastest, product())
    return product.flops / fastest
