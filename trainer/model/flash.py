"""Attention over sequences that stand end to end, by the flash kernel (Dao 2023, "FlashAttention-2"), on a GPU.

It takes the matrix of tokens as it is, with the rows where the sequences begin: nothing is padded, no mask is read, and
a layer's attention is two operations. PyTorch's public way to it (`torch.nn.attention.varlen`) has no dropout, so this
calls the operator beneath. That has no promise of staying as it is: before its first use on a GPU it is compared with
attention sequence by sequence, and where it is missing or wrong the padded way is taken.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

_LARGEST_HEAD = 256
_TOLERANCE = 0.02  # of bf16, for values around 1


def serves(qkv: Tensor, heads: int) -> bool:
    """Whether the kernel is there for (N, 3 H) queries, keys and values of so many heads, and allowed: its backward
    pass adds up in any order, so not where kernels are to be deterministic."""
    size = qkv.shape[1] // (3 * heads)
    fits = qkv.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= _LARGEST_HEAD
    return fits and qkv.is_cuda and torch.backends.cuda.flash_sdp_enabled() and _is_right(qkv.device, qkv.dtype, size)


def attend_flat(qkv: Tensor, offsets: Tensor, longest: int, heads: int, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence and head: (N, 3 H) -> (N, H).

    `offsets` (S + 1,) int32 are the rows where the sequences begin, in order, and N; `longest` is the largest length.
    """
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    arguments = q, k, v, offsets, offsets, longest, longest, dropout
    found = torch.ops.aten._flash_attention_forward(*arguments, is_causal=False, return_debug_mask=False)
    return found[0].flatten(1)


@cache
def _is_right(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether outputs and gradients are those of attention sequence by sequence."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    lengths, heads = [3, 1, 17, 40], 2
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    # Numbers of which no generator knows: the run's own draws stay as they are.
    start = torch.arange(sum(lengths) * 3 * heads * size, device=device).sin().view(sum(lengths), -1).to(dtype)
    weights = torch.arange(sum(lengths) * heads * size, device=device).cos().view(sum(lengths), -1)

    def outcome(qkv: Tensor, flat: bool) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().requires_grad_()
        if flat:
            found = attend_flat(qkv, offsets, max(lengths), heads, 0.0)
        else:
            parts = [part.view(1, len(part), 3, heads, size).permute(2, 0, 3, 1, 4) for part in qkv.split(lengths)]
            found = torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1).flatten(1) for part in parts])
        (gradient,) = torch.autograd.grad((found.float() * weights).sum(), qkv)
        return found.detach().float(), gradient.float()

    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pairs = zip(outcome(start, True), outcome(start.float(), False))
            right = all(torch.allclose(found, wanted, atol=_TOLERANCE, rtol=_TOLERANCE) for found, wanted in pairs)
    except (RuntimeError, TypeError) as error:
        log.warning("attention is padded, as PyTorch's flash kernel failed: %s", str(error).splitlines()[0])
        return False
    if not right:
        log.warning("attention is padded, as PyTorch's flash kernel gave other results than attention by sequence")
    return right
