"""Attention is softmax(q k^T / sqrt(d)) v, written out; with dropout, that of the numbers that were drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.data.batches.layout import Layout
from minbert.trainer.model.attention import attend

HEADS, WIDTH = 2, 8


def written_out(qkv: Tensor, lengths: list[int], dropout: float = 0.0) -> Tensor:
    """Sequence by sequence, the shortest first, as they are laid out; those of a length draw together."""
    kept: dict[int, list[Tensor]] = {}
    for length in sorted(set(lengths)):
        drawn = torch.empty(lengths.count(length), HEADS, length, length, dtype=qkv.dtype).bernoulli_(1 - dropout)
        kept[length] = list(drawn / (1 - dropout))
    found = []
    for sentence in qkv.split(sorted(lengths)):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in sentence.chunk(3, dim=-1))
        probabilities = torch.softmax(q @ k.mT / (WIDTH / HEADS) ** 0.5, dim=-1)
        found.append(((probabilities * kept[len(sentence)].pop(0)) @ v).transpose(0, 1).flatten(1))
    return torch.cat(found)


def test_attention_is_the_formula():
    lengths = [3, 5]
    qkv = torch.randn(sum(lengths), 3 * WIDTH, dtype=torch.float64)
    plain = Layout.of(np.array(lengths))
    for layout in (plain, plain.in_one()):
        found = attend(qkv, layout, HEADS, 0.0)
        torch.testing.assert_close(found, written_out(qkv, lengths), atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.sampled_from([0.1, 0.5]), st.integers(0, 9))
@settings(max_examples=40)
def test_with_dropout_so_are_values_and_gradients(lengths, dropout, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3 * WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, generator=generator)
    sides = []
    for side in (
        lambda: attend(qkv, Layout.of(np.array(lengths)), HEADS, dropout),
        lambda: written_out(qkv, lengths, dropout),
    ):
        torch.manual_seed(seed)
        value = side()
        sides.append((value, *torch.autograd.grad((value * weights).sum(), [qkv])))
    for found, expected in zip(*sides):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_in_bf16_it_computes_in_fp32():
    """Also a backward pass in autocast's own context."""
    lengths = [4, 2, 4, 7]
    start, weights = (torch.randn(sum(lengths), size).bfloat16() for size in (3 * WIDTH, WIDTH))
    sides = []
    for lowered in (True, False):
        qkv = (start if lowered else start.float()).requires_grad_()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            value = attend(qkv, Layout.of(np.array(lengths)), HEADS, 0.3)
            (gradient,) = torch.autograd.grad(value, [qkv], weights.to(value.dtype))
        assert gradient.dtype == qkv.dtype
        sides.append((value, gradient))
    (value, gradient), (expected, expected_gradient) = sides
    assert torch.equal(value, expected.bfloat16())
    torch.testing.assert_close(gradient, expected_gradient.bfloat16(), atol=0, rtol=0)


def test_it_has_no_second_derivative_and_says_so():
    qkv = torch.randn(5, 3 * WIDTH, requires_grad=True)
    value = attend(qkv, Layout.of(np.array([2, 3])), HEADS, 0.1).square().sum()
    (gradient,) = torch.autograd.grad(value, [qkv], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
