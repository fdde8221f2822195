"""A pair of sentences as one sequence, `[CLS] a [SEP] b [SEP]` (Devlin et al. 2019, section 3.2).

It is made of sentences that are tokenised each for itself: nothing is tokenised twice, and both ways of encoding pairs
share the cached tokens.
"""

from dataclasses import dataclass

import numpy as np

from minbert.data.sequences.ragged import Ragged, gather


@dataclass(frozen=True)
class JointPairs:
    """Pairs as one sequence each, of at most `max_length` tokens; of a `symmetric` task in either order."""

    max_length: int
    symmetric: bool


def cut(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens (n,) stay of sentences with so many, if both together have `room`: the longer one is cut first.

    Where both are longer than half of the room, the first keeps the odd token, as in `transformers.BertTokenizer` with
    truncation="longest_first". Sentences that were cut before to at least `room` tokens give the same.
    """
    first = np.minimum(first, np.maximum(-(-room // 2), room - second))
    return first, np.minimum(second, room - first)


def join(sentences: Ragged, first: np.ndarray, second: np.ndarray, max_length: int) -> tuple[Ragged, np.ndarray]:
    """The pairs of the sentences numbered `first` (m,) and `second` (m,), and the types (N,) of their tokens: 0 up to
    the first [SEP], 1 after it.

    Each of the sentences begins with [CLS] and ends with [SEP]. Raises ValueError for a `max_length` in which no two
    tokens fit.
    """
    if max_length < 5:
        raise ValueError(f"max_length must leave room for [CLS] a [SEP] b [SEP], not be {max_length}")
    starts, stops, lengths = sentences.offsets[:-1], sentences.offsets[1:], sentences.lengths - 2
    kept = cut(lengths[first], lengths[second], max_length - 3)
    separator = np.ones_like(first)
    begin = np.stack([starts[first], stops[first] - 1, starts[second] + 1, stops[second] - 1], axis=1).ravel()
    size = np.stack([kept[0] + 1, separator, kept[1], separator], axis=1).ravel()
    pieces = gather(sentences.ids, begin, size)
    types = np.repeat(np.tile(np.array([0, 0, 1, 1], sentences.ids.dtype), len(first)), size)
    return Ragged(pieces.ids, pieces.offsets[::4]), types
