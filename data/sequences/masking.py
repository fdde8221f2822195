"""Masked language modelling on the host: which tokens are hidden from the encoder, behind what, and which they were.

Devlin et al. 2019 ("BERT"), section 3.1, with their later whole-word masking: a word is hidden with all its pieces or
not at all. What is drawn is a pure function of the seed, the task, the step and an example's place in the step's global
batch, so every process knows what all others hide; in an evaluation it depends on nothing but the example's row.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from minbert.data.sequences.tokens import SPECIAL_TOKENS, Tokenizer

MASKED, REPLACED = 0.8, 0.1  # shares of the hidden tokens that become [MASK], and a random token; the others stay

_CHOOSE, _HIDE = 0, 1  # what is drawn: words, and what their tokens become
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Masking:
    """What masking must know of a vocabulary of V tokens, and the share of an example's tokens that it hides."""

    mask: int  # the id of [MASK]
    special: np.ndarray  # (V,) bool: never hidden, never put in the place of another
    continuation: np.ndarray  # (V,) bool: "##ing", a piece that belongs to the word before
    share: float = 0.15
    whole_words: bool = True

    @staticmethod
    def of(tokenizer: Tokenizer, share: float = 0.15, whole_words: bool = True) -> "Masking":
        tokens = [tokenizer.backend.id_to_token(number) or "" for number in range(tokenizer.vocabulary_size)]
        special = np.isin(np.arange(len(tokens)), [tokenizer.token_id(token) for token in SPECIAL_TOKENS])
        continuation = np.array([token.startswith("##") and len(token) > 2 for token in tokens])
        return Masking(tokenizer.token_id("[MASK]"), special, continuation, share, whole_words)

    def __call__(
        self, ids: np.ndarray, lengths: np.ndarray, key: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hide words of S sentences that lie end to end: ids (N,), lengths (S,), and `places` (S,), by which sentences
        under one `key` (2,) differ in what is drawn for them.

        Returns the ids that the encoder sees (N,), and where tokens are hidden (M,), in order. Words come in a random
        order; those are hidden whose middle lies within the first `share` of their sentence's tokens, and always the
        first: so many tokens as the share asks for, give or take half a word.
        """
        sentence = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of a token in its sentence
        maskable = ~self.special[ids]
        begins = maskable.copy()
        if self.whole_words:
            after_token = np.zeros(len(ids), bool)
            after_token[1:] = maskable[:-1]
            begins &= ~(self.continuation[ids] & after_token & (place > 0))
        word = np.cumsum(begins) - 1  # (N,) of a token that is maskable
        size = np.bincount(word[maskable], minlength=int(begins.sum()))  # (W,) tokens of each word
        owner = sentence[begins]  # (W,) its sentence

        order = np.argsort(owner + uniform(key[_CHOOSE], places[owner], place[begins]), kind="stable")
        ordered, end = owner[order], np.cumsum(size[order])
        first = np.ones(len(order), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        tokens = np.bincount(sentence[maskable], minlength=len(lengths))  # (S,) that may be hidden
        before = np.cumsum(tokens) - tokens
        chosen = np.zeros(len(order), bool)
        chosen[order] = first | (end - before[ordered] - size[order] / 2 < self.share * tokens[ordered])

        hidden = np.flatnonzero(maskable)
        hidden = hidden[chosen[word[hidden]]]
        draw = uniform(key[_HIDE], places[sentence[hidden]], place[hidden])
        seen, ordinary = ids.copy(), np.flatnonzero(~self.special)
        other = ((draw - MASKED) / REPLACED * len(ordinary)).astype(np.int64).clip(0, len(ordinary) - 1)
        seen[hidden] = np.where(
            draw < MASKED, self.mask, np.where(draw < MASKED + REPLACED, ordinary[other], ids[hidden])
        )
        return seen, hidden


def training_key(seed: int, task: str, step: int) -> np.ndarray:
    """What a step draws by; places are those in its global batch."""
    return np.random.SeedSequence((seed, zlib.crc32(task.encode()), step)).generate_state(2, np.uint64)


def evaluation_key() -> np.ndarray:
    """What evaluations draw by, all of them the same, so that their scores compare; places are row numbers."""
    return np.random.SeedSequence(0).generate_state(2, np.uint64)


def uniform(key: np.uint64, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each (row, column), a hash of them and the key: the finaliser of SplitMix64 (Steele, Lea
    and Flood 2014), once for each coordinate."""
    with np.errstate(over="ignore"):
        mixed = _mix(key + _GOLDEN * row.astype(np.uint64))
        mixed = _mix(mixed + _GOLDEN * (column.astype(np.uint64) + np.uint64(1)))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
