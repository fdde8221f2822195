"""Attention over sequences end to end in one call: how PyTorch's operator is called, and when it is trusted."""

from dataclasses import replace

import flash_operator
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert.data.batches.layout import Sentences
from minbert.data.sequences.ragged import Ragged, ends
from minbert.trainer.model import attention as module
from minbert.trainer.model import flash
from minbert.trainer.model.bert import Bert, BertConfig

SMALL = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def outcome(bert: Bert, sentences: Sentences) -> list[torch.Tensor]:
    bert.zero_grad()
    hidden = bert(sentences)
    (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).cos().view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in bert.parameters() if p.grad is not None)]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_states_and_gradients_are_those_of_the_other_ways(tasks, seed):
    torch.manual_seed(seed)
    bert = Bert(SMALL).double().eval()
    lengths = np.concatenate(tasks)
    ids = np.random.default_rng(seed).integers(5, 60, lengths.sum())
    ragged = Ragged(ids, ends([lengths]))
    by_length = Sentences.lay(ragged, np.zeros_like(ids), [len(task) for task in tasks])
    expected = outcome(bert, by_length)
    in_one = replace(by_length, layout=by_length.layout.in_one())
    with flash_operator.on_cpu(), pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(module, "serves", lambda qkv, heads: calls.append(heads) or True)
        found = outcome(bert, in_one)
    assert calls == [2, 2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.fixture
def capable(monkeypatch):
    """What is asked of a GPU before the comparison, as an H100 would answer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash._is_right.cache_clear()
    yield
    flash._is_right.cache_clear()


def trusted() -> bool:
    return flash._is_right(torch.device("cpu"), torch.bfloat16, 32)


def test_an_operator_that_is_right_is_trusted(capable, caplog):
    state = torch.get_rng_state()
    with flash_operator.on_cpu():
        assert trusted() and not caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_an_operator_that_does_not_see_where_sequences_end_is_not(capable, caplog):
    def one_sequence(q, k, v, offsets, *rest, **more):
        whole = torch.tensor([0, len(q)], dtype=torch.int32)
        return flash_operator.forward(q, k, v, whole, whole, len(q), len(q), *rest[3:], **more)

    with flash_operator.on_cpu(forward=one_sequence):
        assert not trusted()
    assert "gave other results" in caplog.text


def test_nor_one_whose_gradient_is_wrong(capable, caplog):
    def swapped(*arguments, **more):
        dq, dk, dv = flash_operator.backward(*arguments, **more)
        return dk, dq, dv

    with flash_operator.on_cpu(backward=swapped):
        assert not trusted()
    assert "gave other results" in caplog.text


def test_nor_one_that_is_missing(capable, caplog):
    assert not trusted()
    assert "attention is padded" in caplog.text and "CPU" in caplog.text


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_gpus_before_ampere_do_without(capable, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with flash_operator.on_cpu():
        assert trusted() == expected


def test_a_cpu_and_fp32_do_without():
    assert not flash.serves(torch.zeros(4, 3 * 64, dtype=torch.bfloat16), 2)
    assert not flash.serves(torch.zeros(4, 3 * 64, device="meta"), 2)


@pytest.mark.gpu
def test_a_gpu_attends_as_a_cpu_does():
    torch.manual_seed(0)
    bert = Bert(SMALL).eval()
    lengths = np.array([7, 3, 9, 1])
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum())
    sentences = Sentences.lay(Ragged(ids, ends([lengths])), np.zeros_like(ids))
    expected = bert(sentences)
    layout = sentences.layout.to(torch.device("cuda"))
    moved = Sentences(sentences.input_ids.cuda(), sentences.token_type_ids.cuda(), layout)
    with torch.autocast("cuda", torch.bfloat16):
        found = bert.cuda()(moved)
    assert flash.serves(torch.zeros(4, 3 * 16, dtype=torch.bfloat16, device="cuda"), 2)
    torch.testing.assert_close(found.float().cpu(), expected, atol=0.05, rtol=0)
