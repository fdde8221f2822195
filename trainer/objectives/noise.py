"""Normal noise for the tokens of a batch, as a pure function of where each stands in the run.

A generator hands its numbers out in turn, so what a token gets would depend on which others are in this process. Here
every number is a hash of (seed, step, task, place in the global batch, sequence, position, column), computed for all at
once on the batch's device.
"""

from math import pi

import torch
from torch import Tensor

from minbert.data.batches.batch import Batch
from minbert.trainer.processes.random_state import stream

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as the signed number that int64 wraps around to
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def token_noise(batch: Batch, width: int, seed: int, step: int) -> Tensor:
    """(N, width) fp32 numbers of a standard normal distribution, row by row as the batch's tokens."""
    layout = batch.sentences.layout
    keys = torch.cat([_sequence_keys(batch, name, seed, step) for name in batch.tasks])
    return normal(_mix(keys[layout.sequence] + _GOLDEN * (layout.position + 1)), width)


def _sequence_keys(batch: Batch, task: str, seed: int, step: int) -> Tensor:
    """A key (S,) for each of a task's sequences."""
    part = batch.tasks[task]
    own = stream(seed, f"noise for {task}", step)
    of_examples = _mix(own + _GOLDEN * (part.places + 1))  # (B,)
    versions = torch.arange(part.sides * part.readings, device=of_examples.device)
    return _mix(of_examples + _GOLDEN * (versions[:, None] + 1)).flatten()


def normal(keys: Tensor, width: int) -> Tensor:
    """(N, width) standard normal numbers from keys (N,) int64: what SplitMix64 (Steele et al. 2014) gives out from each
    key on, of its bits two uniform numbers, and of these a normal one (Box and Muller 1958)."""
    columns = torch.arange(1, width + 1, device=keys.device)
    bits = _mix(keys[:, None] + _GOLDEN * columns)
    one = (_shifted(bits, 40) + 1).float() * 2.0**-24  # in (0, 1]
    other = (bits & 0xFFFFFF).float() * 2.0**-24
    return (-2.0 * one.log()).sqrt_() * (2.0 * pi * other).cos_()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's hash of int64 numbers."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, as if there were no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
