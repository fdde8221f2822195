"""Gradient surgery on shards: the Gramian of the task gradients, and their combination by weights.

Each process computes with its own coordinates only. A Gramian is a sum over coordinates, so the processes' parts add
up to that of the whole gradients in one all-reduce of a few numbers; all get the same weights from it; and each
combines its own shards. The result equals that of one process with the whole batch, at every ZeRO stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from minbert.trainer.engine.base import Engine
from minbert.trainer.engine.parts import Gradient, Shard

BLOCK = 1 << 20  # coordinates that are summed in float32


@dataclass(frozen=True)
class Gramians:
    """Inner products of the task gradients, float64 on the device: over the encoder (T, T), by its parts (L, T, T)."""

    layers: tuple[str, ...]
    by_layer: Tensor

    @property
    def encoder(self) -> Tensor:
        return self.by_layer.sum(0)


def gramians(engine: Engine, gradients: Sequence[Gradient], layers: Sequence[str]) -> Gramians:
    """Gramians of T gradients: products of blocks in float32, their sums in float64. Collective.

    Blocks are multiplied where they lie: gathering a layer's rows into a matrix for one product would take four times
    as long on a CPU, for the memory that it touches.
    """
    count, device = len(gradients), engine.accelerator.device
    result = torch.zeros(len(layers), count, count, dtype=torch.float64, device=device)
    pairs = list(combinations_with_replacement(range(count), 2))
    for index, layer in enumerate(layers):
        products: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in pairs}
        for k, shard in enumerate(engine.shards):
            if shard.part == layer and shard.length:
                blocks = [None if (part := g[k]) is None else part.flatten().split(BLOCK) for g in gradients]
                for i, j in pairs:
                    first, second = blocks[i], blocks[j]
                    if first is not None and second is not None:
                        products[i, j] += [torch.dot(a, b) for a, b in zip(first, second)]
        for (i, j), found in products.items():
            if found:
                result[index, i, j] = result[index, j, i] = torch.stack(found).double().sum()
    return Gramians(tuple(layers), engine.sum_over_shards(result))


def combine(
    shards: Sequence[Shard],
    gradients: Sequence[Gradient],
    weights: Sequence[Mapping[str, float]],
    heads: Sequence[float],
) -> Gradient:
    """The combination of T gradients, in the memory of the first.

    `weights[t]` maps the encoder's layers to the weight of task t there; `heads[t]` is its weight in the heads.
    """
    result: Gradient = []
    for k, shard in enumerate(shards):
        total = None
        for gradient, by_layer, head in zip(gradients, weights, heads, strict=True):
            weight, part = by_layer[shard.part] if shard.is_shared else head, gradient[k]
            if part is None:
                continue
            if total is None:
                total = part if weight == 1.0 else part.mul_(weight)
            else:
                total.add_(part, alpha=weight)
        result.append(total)
    return result


def drop_signs(shards: Sequence[Shard], gradients: Sequence[Gradient], seed: int) -> Gradient:
    """GradDrop (Chen et al. 2020, algorithm 1, lines 10 to 15): each coordinate keeps one sign's gradients.

    A coordinate keeps the positive ones with probability (1 + sum g / sum |g|) / 2. The draw is a function of seed,
    parameter and coordinate, so that it is the same however the coordinates are cut into shards. Heads are summed.
    """
    result: Gradient = []
    for k, shard in enumerate(shards):
        parts = [part for gradient in gradients if (part := gradient[k]) is not None]
        if not parts:
            result.append(None)
            continue
        rows = torch.stack([part.flatten() for part in parts])
        if shard.is_shared:
            purity = 0.5 * (1 + (rows.sum(0) / rows.abs().sum(0)).nan_to_num(0.0))
            keep_positive = purity > uniform(shard, seed, rows.device)
            rows = torch.where(keep_positive, rows.clamp_min(0), rows.clamp_max(0))
        result.append(rows.sum(0).view_as(parts[0]))
    return result


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
