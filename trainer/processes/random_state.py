"""Random streams: a seed of its own for every use of random numbers, and the states of a process's generators, as bytes
that a checkpoint can hold without pickle."""

import hashlib
import json
import random

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, purpose: str, *numbers: int) -> int:
    """The seed of one random stream of a run with `seed`: a hash of what it is for and, where each rank or step has a
    stream of its own, of these. So no two uses share numbers, nor do runs with neighbouring seeds."""
    digest = hashlib.sha256(json.dumps([seed, purpose, *numbers]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # PyTorch takes signed numbers


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Tensor]:
    """Each generator's state as (n,) uint8."""
    state = np.random.get_state()
    assert isinstance(state, tuple)  # a dictionary is given to who asks for one
    numpy_name, keys, *position = state
    states = {
        "torch": torch.get_rng_state(),
        "python": _bytes(random.getstate()),
        "numpy": _bytes([numpy_name, keys.tolist(), *position]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    numpy_name, keys, *position = json.loads(bytes(states["numpy"].tolist()))
    np.random.set_state((numpy_name, np.array(keys, dtype=np.uint32), *position))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
