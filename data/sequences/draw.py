"""What is drawn at random for an example while training, as a pure function of where it stands in the run."""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """Random numbers for the examples at `places` (n,) of the global batch of `task` at a step.

    They depend on (seed, task, step, place) alone: not on the row that stands there, the number of processes or the
    parts of an accumulated step.
    """

    seed: int
    task: str
    step: int
    places: np.ndarray

    def uniform(self, purpose: str, width: int) -> np.ndarray:
        """(n, width) float64 in [0, 1), for one `purpose`, which has a stream of its own.

        Who needs as many numbers as an example has tokens asks for as many as its longest sequence may have: the
        `width` is part of what is drawn, so it must be the same in every process.
        """
        key = self.seed, zlib.crc32(self.task.encode()), self.step, zlib.crc32(purpose.encode())
        # Philox is counter-based: the stream is a function of the key alone, the same on every platform. It is read
        # from the batch's first place on.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        return generator.random((int(self.places.max()) + 1, width))[self.places]
