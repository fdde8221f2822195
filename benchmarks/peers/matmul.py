"""What the machine can do at best: one large matrix product after another, in the precision of the sides. Its work are
floating-point operations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Step

SECONDS = 0.2  # of a step


def peak(run, config) -> Step:
    """The faster of PyTorch's product and the one that this project takes on a CPU."""
    from time import perf_counter

    from minbert.trainer.model.linear import linear
    from minbert.trainer.processes.world import pick_device

    device = pick_device(config.parallel)
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds(product: Callable[[Tensor, Tensor], Tensor], times: int) -> float:
        started = perf_counter()
        for _ in range(times):
            product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started

    with torch.no_grad():
        products = [F.linear, lambda a, b: linear(a, b, None)]
        for product in products:
            seconds(product, 2)
        fastest = min(products, key=lambda product: min(seconds(product, 3) for _ in range(3)))
        times = max(1, round(SECONDS / (seconds(fastest, 3) / 3)))

    @torch.no_grad()
    def step(_: int) -> float:
        seconds(fastest, times)
        return times * 2.0 * size**3

    return step
