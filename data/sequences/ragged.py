"""A tokenised column: sentences of different lengths laid end to end, as arrays."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """`ids[offsets[i]:offsets[i + 1]]` are the tokens of sentence i."""

    ids: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (n + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Ragged":
        """The sentences of `rows`, in that order."""
        starts = self.offsets[rows]
        return gather(self.ids, starts, self.offsets[rows + 1] - starts)

    @staticmethod
    def concatenate(parts: "list[Ragged]") -> "Ragged":
        """The sentences of the first part, then those of the second, ..."""
        if len(parts) == 1:
            return parts[0]
        return Ragged(np.concatenate([part.ids for part in parts]), ends([part.lengths for part in parts]))


def gather(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
    """The pieces `ids[start : start + length]`, end to end."""
    offsets = ends([lengths])
    # Position of each token in `ids`: its piece's start plus its place within the piece.
    return Ragged(ids[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)], offsets)


def ends(lengths: list[np.ndarray]) -> np.ndarray:
    """Where pieces of these lengths begin, laid end to end, and the end of the last: int64, one more than pieces."""
    offsets = np.zeros(sum(map(len, lengths)) + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])
    return offsets
