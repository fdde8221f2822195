"""PyTorch's flash operator for CPUs, which have none: what it does on a GPU, written out sequence by sequence.

So how it is called can be tested without a GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _sequences(offsets: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(N, heads, d) each -> those of one sequence after another, (heads, L, d)."""
    return zip(*([part.transpose(0, 1) for part in each.split(offsets.diff().tolist())] for each in tensors))


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)


def _together(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.transpose(0, 1) for part in parts])


def _check(q: Tensor, offsets: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    one, other = offsets
    assert one.dtype == torch.int32 and torch.equal(one, other) and one[0] == 0 and one[-1] == len(q)
    assert longest == (one.diff().max(),) * 2 and q.stride(-1) == 1


def forward(q, k, v, offsets_q, offsets_k, longest_q, longest_k, dropout, causal, debug, *, scale=None, **more):
    _check(q, (offsets_q, offsets_k), (longest_q, longest_k))
    assert dropout == 0.0 and not causal and not debug and scale is None
    nothing = torch.zeros(2, dtype=torch.uint64)
    sums = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    out = _together(_probabilities(q, k) @ v for q, k, v in _sequences(offsets_q, q, k, v))
    return out, sums, nothing, nothing, q.new_zeros(0)


def backward(dy, q, k, v, out, sums, offsets_q, offsets_k, longest_q, longest_k, dropout, causal, *rest, **more):
    found: list[tuple[Tensor, ...]] = []
    for one_q, one_k, one_v, one_dy in _sequences(offsets_q, q, k, v, dy):
        p, dp = _probabilities(one_q, one_k), one_dy @ one_v.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        found.append((ds @ one_k, ds.transpose(1, 2) @ one_q, p.transpose(1, 2) @ one_dy))
    return tuple(map(_together, zip(*found)))


@contextmanager
def on_cpu(forward: Callable = forward, backward: Callable = backward) -> Iterator[None]:
    """Inside, the operator is there for CPUs."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield
