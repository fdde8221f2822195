"""Self-attention (Vaswani et al. 2017) within each of many sequences, which lie end to end in one matrix.

Three ways of the same arithmetic; the batch's layout and the device tell which: on a GPU the flash kernel, or a padded
rectangle with a mask, and on a CPU one small call for all sequences of a length.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minbert.data.batches.layout import Layout
from minbert.trainer.model.flash import attend_flat, serves


def attend(qkv: Tensor, layout: Layout, heads: int, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence and head: (N, 3 H) -> (N, H)."""
    if layout.offsets is not None and serves(qkv, heads):
        return attend_flat(qkv, layout.offsets, layout.longest, heads, dropout)
    if layout.cells is None or layout.mask is None:
        return _by_length(qkv, layout.groups, heads, dropout)
    count, longest = len(layout), layout.longest
    padded = qkv.new_zeros(count * longest, qkv.shape[1]).index_copy(0, layout.cells, qkv)
    return _attention(padded.view(count, longest, -1), heads, dropout, layout.mask)[layout.cells]


def _attention(qkv: Tensor, heads: int, dropout: float, mask: Tensor | None) -> Tensor:
    """(S, L, 3 H) -> (S L, H), every head attending over the L tokens that `mask` leaves."""
    sequences, length, width = qkv.shape
    q, k, v = qkv.view(sequences, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).reshape(sequences * length, width // 3)


def _by_length(qkv: Tensor, groups: Sequence[tuple[int, int]], heads: int, dropout: float) -> Tensor:
    """(N, 3 H) -> (N, H), where so many sequences of so many tokens follow each other."""
    if dropout:
        return _Dropped.apply(qkv, groups, heads, dropout)
    # split, not slices: the backward of a slice fills a whole matrix with zeros for each group.
    parts = zip(qkv.split([count * length for count, length in groups]), groups)
    return torch.cat([_attention(part.view(*shape, -1), heads, 0.0, None) for part, shape in parts])


class _Dropped(torch.autograd.Function):
    """`_by_length` with dropout, for which PyTorch has no kernel on a CPU: its own way takes twice as many operations,
    and there are dozens of groups. Of bf16 it computes in fp32, as PyTorch does; products so small gain nothing by it.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Sequence[tuple[int, int]], heads: int, dropout: float) -> Tensor:
        width = qkv.shape[1] // 3
        ctx.groups, ctx.heads, ctx.scale = groups, heads, (width // heads) ** -0.5
        rows = [count * length for count, length in groups]
        context, kept = qkv.new_empty(len(qkv), width), []
        with torch.autocast("cpu", enabled=False):
            for part, result, (count, length) in zip(qkv.split(rows), context.split(rows), groups):
                q, k, v = _by_head(part, count, 3, heads)
                shares = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=ctx.scale).softmax(-1)
                keep = torch.empty_like(shares).bernoulli_(1 - dropout).mul_(1 / (1 - dropout))
                found = torch.bmm(shares * keep, v)
                result.view(count, length, heads, -1).copy_(found.view(count, heads, length, -1).transpose(1, 2))
                kept += [shares, keep]
        ctx.save_for_backward(qkv, *kept)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (qkv, *kept), heads = ctx.saved_tensors, ctx.heads
        rows = [count * length for count, length in ctx.groups]
        found, parts = torch.empty_like(qkv), zip(qkv.split(rows), gradient.split(rows), kept[::2], kept[1::2])
        with torch.autocast("cpu", enabled=False):
            for (inputs, part, shares, keep), result, (count, length) in zip(parts, found.split(rows), ctx.groups):
                q, k, v = _by_head(inputs, count, 3, heads)
                (of_context,) = _by_head(part, count, 1, heads)
                of_shares = torch.bmm(of_context, v.mT).mul_(keep)
                of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
                dq = torch.baddbmm(q, of_scores, k, beta=0, alpha=ctx.scale)
                dk = torch.baddbmm(k, of_scores.mT, q, beta=0, alpha=ctx.scale)
                dv = torch.bmm((shares * keep).mT, of_context)
                for place, each in enumerate((dq, dk, dv)):
                    into = result.view(count, length, 3, heads, -1)[:, :, place]
                    into.copy_(each.view(count, heads, length, -1).transpose(1, 2))
        return found, None, None, None


def _by_head(rows: Tensor, count: int, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(count L, parts H) -> for each part (count heads, L, d), in fp32 or what is finer."""
    split = rows.view(count, len(rows) // count, parts, heads, -1).permute(2, 0, 3, 1, 4)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return split.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(1, 2).unbind()
