"""Gradient surgery on shards: the Gramian of the task gradients, and their combination by weights.

Each process computes with its own coordinates only. A Gramian is a sum over coordinates, so the processes' parts add
up to that of the whole gradients in one all-reduce of a few numbers; all get the same weights from it; and each
combines its own shards. The result equals that of one process with the whole batch, at every ZeRO stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert.trainer.engine.base import Engine
from minbert.trainer.engine.parts import CHUNK, Block, Gradient, Shard


@dataclass(frozen=True)
class Gramians:
    """Inner products of the task gradients, float64 on the device: over the encoder (T, T), by its parts (L, T, T)."""

    layers: tuple[str, ...]
    by_layer: Tensor

    @property
    def encoder(self) -> Tensor:
        return self.by_layer.sum(0)


def gramians(engine: Engine, blocks: Sequence[Block], layers: Sequence[str], tasks: int) -> Gramians:
    """Gramians of the gradients of so many tasks: products of pieces in float32, their sums in float64. Collective."""
    device = engine.accelerator.device
    by_layer = dict.fromkeys(layers, torch.zeros(tasks, tasks, dtype=torch.float64, device=device))
    for block in blocks:
        if block.is_shared and block.rows.numel():
            pieces = block.rows.view(tasks, -1, CHUNK).transpose(0, 1)
            by_layer[block.part] = torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64)
    empty = torch.zeros(0, tasks, tasks, dtype=torch.float64, device=device)
    result = torch.stack([*by_layer.values()]) if layers else empty
    found = engine.sum_over_shards(result)
    return Gramians(tuple(layers), (found + found.mT) / 2)


def combine(shards: Sequence[Shard], blocks: Sequence[Block], weights: Mapping[str, Tensor]) -> Gradient:
    """The combination of the gradients by the weights, (rows,) fp32 for each part. Those on a GPU are not looked at.

    It may lie in the memory of the first.
    """
    totals, alike = dict[str, Tensor](), dict[tuple[float, ...], list[Block]]()
    for block in blocks:
        own = weights[block.part]
        if own.device.type == "cpu":
            alike.setdefault(tuple(own.tolist()), []).append(block)
        else:
            totals[block.part] = torch.mv(block.rows.T, own)
    for (first, *others), some in alike.items():
        # Without what follows the coordinates, which stays zero whatever the weights are.
        rows = [block.rows[:, : block.width(shards)] for block in some]
        combined = [each[0] for each in rows]
        if first != 1.0:
            torch._foreach_mul_(combined, first)
        for number, weight in enumerate(others, 1):
            torch._foreach_add_(combined, [each[number] for each in rows], alpha=weight)
        totals |= {block.part: total for block, total in zip(some, combined)}
    return _pieces(shards, blocks, [totals[block.part] for block in blocks])


def drop_signs(shards: Sequence[Shard], blocks: Sequence[Block], seed: int) -> Gradient:
    """GradDrop (Chen et al. 2020, algorithm 1, lines 10 to 15): each coordinate keeps one sign's gradients.

    A coordinate keeps the positive ones with probability (1 + sum g / sum |g|) / 2. The draw is a function of seed,
    parameter and coordinate, so that it is the same however the coordinates are cut into shards. Heads are summed.
    """
    totals = []
    for block in blocks:
        rows = block.rows
        if block.is_shared:
            draws = torch.cat([uniform(shard, seed, rows.device) for shard in shards[block.first : block.last]])
            rows = rows[:, : block.width(shards)]
            purity = 0.5 * (1 + (rows.sum(0) / rows.abs().sum(0)).nan_to_num(0.0))
            rows = torch.where(purity > draws, rows.clamp_min(0), rows.clamp_max(0))
        totals.append(rows.sum(0))
    return _pieces(shards, blocks, totals)


def _pieces(shards: Sequence[Shard], blocks: Sequence[Block], totals: Sequence[Tensor]) -> Gradient:
    """The gradient that has these totals of the blocks, shard by shard."""
    gradient: Gradient = [None] * len(shards)
    for block, total in zip(blocks, totals, strict=True):
        gradient[block.first : block.last] = block.pieces(shards, total)
    return gradient


def uniform(shard: Shard, seed: int, device: torch.device) -> Tensor:
    """(length,) numbers in [0, 1), each a hash of seed, parameter name and coordinate (the mixer of Stafford 2011,
    variant 13, as in SplitMix64), so a coordinate gets the same one on every process that holds it."""
    key = seed
    for letter in shard.name.encode():
        key = (key * 1_000_003 + letter) % 2**63
    x = torch.arange(shard.start, shard.start + shard.length, dtype=torch.int64, device=device)
    x = (x + 1) * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, wrapping around
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 40).float() / 2**24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift, where torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
