"""Tokenisation: BERT's WordPiece tokenizer, vocabularies for models trained from scratch, and the cache of tokens.

A split is tokenised once for a vocabulary and a length; every later run, and every other process of the same run, reads
the token arrays from a file named after the content they were made from. The cache is never needed: whatever is wrong
with it, the tokens are made anew.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from minbert.data.errors import UserError
from minbert.data.files import replacing
from minbert.data.sequences.pairs import JointPairs
from minbert.data.sequences.ragged import Ragged
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sources.examples import Examples, fingerprint

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LOCK_SECONDS = 120.0  # how long to wait for another process that tokenises the same split

_FORMAT = 2  # of the cache files; part of their names
_CHUNK = 8192  # sentences encoded at a time, which bounds the memory of the library's encodings
_LONGEST_WORD = 100  # characters; WordPiece gives [UNK] for longer ones


@dataclass(frozen=True)
class Tokenizer:
    """A WordPiece tokenizer. `fingerprint` is SHA-256 over all that decides tokens: vocabulary, casing, splitting."""

    backend: tokenizers.Tokenizer
    directory: Path
    fingerprint: str

    @property
    def vocabulary_size(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int:
        """The id of a token, such as "[MASK]". Raises UserError if the vocabulary lacks it."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"the vocabulary in {self.directory} has no token {token}: it is not a BERT vocabulary")
        return number

    def encode(self, texts: list[str], max_length: int) -> Ragged:
        """Each text as [CLS] tokens [SEP], tokens cut off at the end so that at most `max_length` ids remain."""
        if max_length < 3:
            raise ValueError(f"max_length must leave room for [CLS], a token and [SEP], not be {max_length}")
        first, last = self.token_id("[CLS]"), self.token_id("[SEP]")
        ids, lengths = [np.empty(0, np.int32)], [0]
        for start in range(0, len(texts), _CHUNK):
            encodings = self.backend.encode_batch_fast(texts[start : start + _CHUNK], add_special_tokens=False)
            rows = [(first, *encoding.ids[: max_length - 2], last) for encoding in encodings]
            ids.append(np.fromiter(chain.from_iterable(rows), np.int32))
            lengths.extend(map(len, rows))
        return Ragged(np.concatenate(ids), np.cumsum(lengths, dtype=np.int64))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a BERT checkpoint: vocab.txt, cased as tokenizer_config.json says, or else tokenizer.json.

    Padding and truncation stored in tokenizer.json are ignored. Raises UserError if there is neither file, or one that
    cannot be read, or a vocabulary without BERT's special tokens.
    """
    vocabulary, serialised = directory / "vocab.txt", directory / "tokenizer.json"
    if not vocabulary.is_file() and not serialised.is_file():
        raise UserError(f"{directory} has neither vocab.txt nor tokenizer.json: it is no folder of a BERT checkpoint")
    try:
        if vocabulary.is_file():
            backend = _from_vocabulary(vocabulary)
        else:
            backend = tokenizers.Tokenizer.from_file(str(serialised))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    parts = json.loads(backend.to_str())
    decisive = [parts[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    tokenizer = Tokenizer(backend, directory, digest)
    for token in SPECIAL_TOKENS:
        tokenizer.token_id(token)
    return tokenizer


def build_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """A lower-cased WordPiece vocabulary of at most `size` tokens, by frequency; the same for the same texts.

    First the special tokens (ids 0 to 4), then the characters, each alone and as a continuation ("##x"), then the whole
    words seen at least twice. Characters take at most half of the vocabulary, so that a corpus with many scripts keeps
    room for words; unless that cuts some off, no word of the texts is unknown. Raises ValueError for a `size` below 64.
    """
    if size < 64:
        raise ValueError(f"a vocabulary of {size} tokens holds no alphabet; use at least 64")
    normaliser, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    alphabet = _by_frequency(characters)[: (size // 2 - len(SPECIAL_TOKENS)) // 2]
    frequent = (word for word in _by_frequency(words) if words[word] > 1 and 1 < len(word) <= _LONGEST_WORD)
    pieces = chain.from_iterable((character, f"##{character}") for character in alphabet)
    return [*SPECIAL_TOKENS, *pieces, *frequent][:size]


def write_vocabulary(directory: Path, vocabulary: list[str]) -> None:
    """Write what `load_tokenizer` and `transformers` read: vocab.txt and tokenizer_config.json, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    # The vocabulary comes last: a folder that has one is complete.
    for name, text in (("tokenizer_config.json", json.dumps(settings)), ("vocab.txt", "\n".join(vocabulary))):
        with replacing(directory / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


def default_cache_dir() -> Path:
    """$MINBERT_CACHE, else $XDG_CACHE_HOME/minbert, else ~/.cache/minbert."""
    if own := os.environ.get("MINBERT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minbert"


def tokenise(
    examples: Examples, tokenizer: Tokenizer, max_length: int, cache_dir: Path | None = None, joint: bool = False
) -> TokenisedSplit:
    """Tokenise every sentence column, at most `max_length` ids a sentence, through the cache in `cache_dir` if given.

    `joint` makes one sequence of at most `max_length` ids of a pair, of the same cached tokens.

    Of several processes that ask for the same split at once, one tokenises and the others wait for its file. A cache
    that is locked for long, broken or not writable costs a warning and time, never the run.
    """

    def compute() -> tuple[Ragged, ...]:
        return tuple(tokenizer.encode(sentences, max_length) for sentences in examples.sentences)

    if cache_dir is None:
        columns = compute()
    else:
        key = f"{_FORMAT} {fingerprint(examples)} {tokenizer.fingerprint} {max_length}"
        name = f"{examples.task.name}-{examples.split}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        shape = _Shape(len(examples.sentences), len(examples), tokenizer.vocabulary_size, max_length)
        columns = _through_cache(cache_dir / name, compute, shape)
    pairs = JointPairs(max_length, examples.task.symmetric) if joint and examples.task.is_pair else None
    return TokenisedSplit(examples.ids, columns, examples.labels, pairs)


def _from_vocabulary(path: Path) -> tokenizers.Tokenizer:
    settings_file = path.with_name("tokenizer_config.json")
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    vocabulary = WordPiece.read_file(str(path))
    backend = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    backend.normalizer = BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),  # None: as the casing
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = BertPreTokenizer()
    # Only those it has: adding another would give it an id beyond the model's embeddings.
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return backend


@dataclass(frozen=True)
class _Shape:
    """What a cache file must hold to be of a split: so many columns and rows, no other ids, no longer sentences."""

    columns: int
    rows: int
    vocabulary_size: int
    max_length: int

    def fits(self, tokens: tuple[Ragged, ...]) -> bool:
        return all(
            len(column) == self.rows
            and column.offsets[0] == 0
            and column.offsets[-1] == len(column.ids)
            and (column.lengths >= 2).all()  # [CLS] and [SEP]
            and (column.lengths <= self.max_length).all()
            and ((column.ids >= 0) & (column.ids < self.vocabulary_size)).all()
            for column in tokens
        )


def _through_cache(path: Path, compute: Callable[[], tuple[Ragged, ...]], shape: _Shape) -> tuple[Ragged, ...]:
    # Without the lock first: the cache may be somebody else's, readable and not writable.
    tokens = _read(path, shape)
    if tokens is not None:
        return tokens
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            tokens = _read(path, shape)
            if tokens is None:
                tokens = compute()
                _write(path, tokens)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        logger.warning("token cache %s is not used: %s", path, error)
    return compute() if tokens is None else tokens


def _read(path: Path, shape: _Shape) -> tuple[Ragged, ...] | None:
    """The cached columns, or None if there is no file or not a sound one."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tokens = tuple(Ragged(arrays[f"ids{i}"], arrays[f"offsets{i}"]) for i in range(shape.columns))
            digest = arrays["sha256"].tobytes()
        if digest != _digest(tokens):
            raise ValueError("it is not as it was written")
        if not shape.fits(tokens):
            raise ValueError("its arrays do not fit the split")
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive fails in as many ways as it can be damaged
        logger.warning("token cache %s cannot be read and is made anew: %s", path, error)
        return None
    return tokens


def _write(path: Path, tokens: tuple[Ragged, ...]) -> None:
    arrays = {f"ids{i}": column.ids for i, column in enumerate(tokens)}
    arrays |= {f"offsets{i}": column.offsets for i, column in enumerate(tokens)}
    arrays["sha256"] = np.frombuffer(_digest(tokens), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # none is called like its option


def _digest(tokens: tuple[Ragged, ...]) -> bytes:
    digest = hashlib.sha256()
    for column in tokens:
        for array in (column.ids, column.offsets):
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]  # an array is a buffer
    return digest.digest()


def _by_frequency(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda token: (-counts[token], token))
