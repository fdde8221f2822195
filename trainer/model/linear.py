"""Products of matrices that run on oneDNN where that is faster: fp32 on a CPU.

PyTorch's own fp32 matrix product on a CPU is MKL's, which leaves half of an AMD processor's vector width unused;
oneDNN's is about twice as fast there and no slower elsewhere (`benchmarks/performance.py`). It is the same
arithmetic, in another order. Everything else (GPUs, bf16, float64) takes PyTorch's way.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN makes a kernel for each shape of a product, in bf16 too, and keeps the last 1,024. The shapes of batches
# without padding do not come again: what one step needs is enough, and takes hundreds of megabytes less.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b' + bias, of (n, k) and (m, k). Nothing that autograd can look into."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "") if _fast(a, b) else F.linear(a, b, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b for (N, in) inputs."""
    return _OneDnnLinear.apply(x, weight, bias) if _fast(x, weight) else F.linear(x, weight, bias)


def _fast(a: Tensor, b: Tensor) -> bool:
    fits = _AVAILABLE and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and a.ndim == 2
    return fits and not torch.is_autocast_enabled("cpu") and a.numel() > 0


class _OneDnnLinear(torch.autograd.Function):
    """y = x W' + b, with dx = dy W, dW = dy' x, db = sum dy, each as one oneDNN call.

    autograd cannot look into oneDNN's calls: a backward pass that is to be differentiated takes PyTorch's way.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        product = F.linear if torch.is_grad_enabled() else multiply
        dx = product(dy, weight.T) if ctx.needs_input_grad[0] else None
        dw = product(dy.T, x.T) if ctx.needs_input_grad[1] else None
        db = dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dw, db
