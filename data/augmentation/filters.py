"""What drops a back translation: reasons to think that it is no paraphrase, no new sentence, or no fair one.

A filter is a function of the text and its back translation. They are asked in the order of `FILTERS`, and the first
that objects counts. Similarity by an encoder, which needs a model, comes last, for what the others left.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from rapidfuzz.distance import Levenshtein

Filter = Literal["empty", "unknown", "equal", "copy", "length", "numbers", "names", "leakage"]
SIMILARITY = "similarity"

# Numbers that are written out and mean nothing else; "one" may be a pronoun.
_TWO_ON = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WORDS = {word: str(number) for number, word in enumerate(_TWO_ON, 2)}
_MARK = re.compile(r"(?<![\w*@#])[*@#](?=\w)")
_TOKEN = re.compile(r"[*@#]\w+")
_MARKED = re.compile(r"(?<![\w*@#])[*@#](\w[\w'’-]*)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class FilterOptions:
    """`names`: the filters that are on. `max_copy`: the largest share of characters that may be as they were;
    `max_length_ratio`: of the words of the longer text to those of the shorter. `forbidden`: plain forms of the
    sentences of dev and test splits."""

    names: Collection[str] = ("empty", "unknown", "equal", "copy", "length", "numbers", "names", "leakage")
    max_copy: float = 0.95
    max_length_ratio: float = 1.8
    forbidden: Collection[str] = field(default_factory=frozenset)


def first_objection(text: str, raw: str, options: FilterOptions) -> str | None:
    """The first of the filters that are on which drops `raw`, the back translation of `text` with the translator's
    marks, or None."""
    back = unmark(text, raw)
    on = ((name, drops) for name, drops in FILTERS.items() if name in options.names)
    return next((name for name, drops in on if drops(text, raw, back, options)), None)


def plain(text: str) -> str:
    """Lower-cased words alone: what two texts have in common that differ in case, accents, punctuation or spacing."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return " ".join(re.findall(r"[^\W_]+", "".join(c for c in decomposed if not unicodedata.combining(c))))


def unmark(text: str, raw: str) -> str:
    """`raw` without the marks of a rule-based translator; those that stand in `text`, too, stay."""
    own = set(_TOKEN.findall(text))

    def drop(mark: re.Match[str]) -> str:
        token = _TOKEN.match(raw, mark.start())
        return mark[0] if token and token[0] in own else ""

    return _MARK.sub(drop, raw)


def unknown_words(text: str, raw: str) -> list[str]:
    """Marked words of `raw` that are not words of `text`: left over from the pivot language. What was carried through
    unknown in both directions, such as a name, is as good as it was."""
    there = set(plain(text).split())
    return [word for word in _MARKED.findall(raw) if not set(plain(word).split()) <= there]


def is_copy(a: str, b: str, share: float) -> bool:
    """Whether more than `share` of the characters stayed: 1 - edit distance / length of the longer."""
    return Levenshtein.normalized_similarity(a, b, score_cutoff=share) > share


def numbers(text: str) -> Counter[str]:
    """How often each number stands in a text, in digits or written out up to twelve."""
    found = Counter(re.sub(r"[.,](?=\d{3}\b)", "", number) for number in _NUMBER.findall(text))
    return found + Counter(_WORDS[word] for word in plain(text).split() if word in _WORDS)


def names(text: str) -> set[str]:
    """Capitalised words, but for a sentence's first: lower-cased, without a possessive. None of a title, whose long
    words all begin with a capital."""
    words = list(_WORD.finditer(text))
    long = [match[0] for match in words[1:] if len(match[0]) > 4]
    if len(long) > 2 and all(word[0].isupper() for word in long):
        return set()
    inner = [word[0] for before, word in pairwise(words) if not set(".!?:") & set(text[before.end() : word.start()])]
    return {_bare(word) for word in inner if word[0].isupper() and not re.fullmatch(r"I(['’]\w+)?", word)}


def _bare(word: str) -> str:
    return plain(re.sub(r"['’]s$", "", word))


def _length_ratio(a: str, b: str) -> float:
    short, long = sorted((len(_WORD.findall(a)), len(_WORD.findall(b))))
    return long / short if short else float("inf")


# filter -> whether it drops `back`, which is `raw` without marks.
FILTERS: dict[str, Callable[[str, str, str, FilterOptions], bool]] = {
    "empty": lambda text, raw, back, options: not plain(back),
    "unknown": lambda text, raw, back, options: bool(unknown_words(text, raw)),
    "equal": lambda text, raw, back, options: plain(text) == plain(back),
    "copy": lambda text, raw, back, options: is_copy(plain(text), plain(back), options.max_copy),
    "length": lambda text, raw, back, options: _length_ratio(text, back) > options.max_length_ratio,
    "numbers": lambda text, raw, back, options: numbers(text) != numbers(back),
    "names": lambda text, raw, back, options: not names(text) <= set(plain(back).split()),
    "leakage": lambda text, raw, back, options: plain(back) in options.forbidden,
}
