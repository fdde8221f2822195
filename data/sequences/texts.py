"""The texts of a masked language model, tokenised once into memory-mapped arrays.

They may be larger than memory: files are read line by line, tokenised in chunks, and their tokens are written to a
folder of the cache as they come. Every process maps that folder and reads what a batch needs. Which texts are held out
is a function of each text alone.
"""

import hashlib
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock

from minbert.data.errors import DataError, UserError
from minbert.data.files import replacing
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.masking import Masking, evaluation_key, training_key
from minbert.data.sequences.ragged import Ragged
from minbert.data.sequences.split import Encoded, TokenisedSplit
from minbert.data.sequences.tokens import LOCK_SECONDS, Tokenizer
from minbert.data.sources.examples import BadRows, fingerprint
from minbert.data.sources.loading import load_examples
from minbert.data.task import Split, Task

logger = logging.getLogger(__name__)

LONGEST_LINE = 1 << 24  # bytes of a text, which is held in memory

_FORMAT = 1  # of the folders in the cache; part of their names
_CHUNK, _CHUNK_CHARACTERS = 8192, 1 << 22  # texts tokenised at a time, at most
_QUIET = 10.0  # seconds between two words on how far it is
_IDS, _OFFSETS, _ABOUT = "{}.ids", "{}.offsets", "about.json"


@dataclass(frozen=True)
class TextSplit(TokenisedSplit):
    """One split of a masked-LM task: what to hide is drawn when a batch is made of it.

    An example weighs as much as it has hidden tokens, so that a batch's loss is the mean over them.
    """

    masking: Masking = field(kw_only=True)
    digest: str = field(kw_only=True)  # SHA-256 of all tokens, as it was when they were written

    def encode(self, rows: np.ndarray, draw: Draw | None = None) -> Encoded:
        """Texts with words hidden; the labels are the tokens that were there."""
        tokens = self.columns[0].take(rows)
        seen, hidden = self._hide(tokens, rows, draw)
        example = np.repeat(np.arange(len(rows)), tokens.lengths)[hidden]
        weights = np.bincount(example, minlength=len(rows)).astype(np.float32)
        labels = tokens.ids[hidden].astype(np.int64)
        return Encoded(Ragged(seen, tokens.offsets), np.zeros_like(seen), labels, tokens=hidden, weights=weights)

    def total(self, rows: np.ndarray, draw: Draw) -> int:
        """The number of hidden tokens, which every process finds for itself."""
        return max(1, len(self._hide(self.columns[0].take(rows), rows, draw)[1]))

    def _hide(self, tokens: Ragged, rows: np.ndarray, draw: Draw | None) -> tuple[np.ndarray, np.ndarray]:
        if draw is None:
            return self.masking(tokens.ids, tokens.lengths, evaluation_key(), rows)
        return self.masking(tokens.ids, tokens.lengths, training_key(draw.seed, draw.task, draw.step), draw.places)

    def fingerprint(self) -> str:
        return f"{len(self):,} examples, SHA-256 {self.digest[:16]}"


@dataclass(frozen=True)
class RowNumbers(Sequence[str]):
    """The ids of n examples that have none of their own: "0", "1", ..., which take no memory."""

    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: Any) -> Any:
        found = range(self.rows)[row]
        return str(found) if isinstance(found, int) else list(map(str, found))


def load_texts(
    task: Task,
    split: Split,
    data: str,
    tokenizer: Tokenizer,
    max_length: int,
    cache_dir: Path,
    bad_rows: BadRows = "refuse",
    most: int | None = None,
) -> TextSplit:
    """A masked-LM task's train or dev split, `most` rows of it spread evenly, of at most `max_length` tokens each.

    The first process that asks tokenises all texts, and the others wait for it. Raises DataError for a file that is
    missing or no UTF-8, or texts of which none are left for a split; UserError if `cache_dir` cannot be written.
    """
    texts, words = task.texts, task.masking
    assert texts is not None and words is not None, task.name
    if split == "test":
        raise DataError(f"task {task.name} has texts for train and dev only")
    sources = _sources(task, data, bad_rows)
    key = [_FORMAT, sources.key, texts.held_out, texts.packed, tokenizer.fingerprint, max_length]
    folder = cache_dir / f"texts-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    try:
        if not _is_whole(folder):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _lock(folder, -1 if sources.files else LOCK_SECONDS):
                if not _is_whole(folder):
                    _write(folder, sources, tokenizer, max_length, texts.packed)
        tokens, digest = _map(folder, split)
    except OSError as error:
        raise UserError(
            f"the tokens of {task.name} could not be kept in {cache_dir}: {error.strerror or error}. "
            "Make room there, or name another folder by --cache"
        ) from None
    if not len(tokens):
        other = (
            "more texts, or a smaller held_out" if split == "train" else "files to score (`dev`), or a larger held_out"
        )
        raise DataError(f"task {task.name} has no text for {split}: give it {other}")
    masking = Masking.of(tokenizer, words.share, words.whole)
    rows = len(tokens)
    if most is not None and most < rows:
        tokens = tokens.take(np.arange(most) * rows // most)
        digest = hashlib.sha256(f"{digest} {most}".encode()).hexdigest()
    nothing = np.broadcast_to(np.float32(0), len(tokens))  # labels, of which the tokens are the truth
    return TextSplit(RowNumbers(len(tokens)), (tokens,), nothing, masking=masking, digest=digest)


def training_texts(task: Task, data: str, bad_rows: BadRows = "refuse") -> Iterator[str]:
    """The texts that a masked-LM task trains on, one at a time."""
    return (text for split, text in _sources(task, data, bad_rows).texts() if split == "train")


@dataclass(frozen=True)
class _Sources:
    """Where texts come from. `key` changes with what they are: of files, their size and time."""

    own: list[str]  # of other tasks
    files: tuple[Path, ...]
    dev: tuple[Path, ...]
    held_out: float
    key: list[Any]

    def texts(self) -> Iterator[tuple[Split, str]]:
        """Each text with its split."""
        for text in chain(self.own, *map(read_lines, self.files)):
            held_out = not self.dev and zlib.crc32(text.encode()) < self.held_out * 2**32
            yield "dev" if held_out else "train", text
        for text in chain.from_iterable(map(read_lines, self.dev)):
            yield "dev", text


def _sources(task: Task, data: str, bad_rows: BadRows) -> _Sources:
    texts = task.texts
    assert texts is not None, task.name
    own: dict[str, None] = {}  # in the order of their first occurrence
    key: list[Any] = []
    for each in texts.tasks:
        for split in texts.splits:
            examples = load_examples(data, each, split, bad_rows)
            own |= dict.fromkeys(text for column in examples.sentences for text in column if text)
            key.append(fingerprint(examples))
    for path in (*texts.files, *texts.dev):
        if not path.is_file():
            raise DataError(f"{path}, which task {task.name} has its texts from, is no file")
        about = path.stat()
        key.append([str(path), about.st_size, about.st_mtime_ns])
    return _Sources(list(own), texts.files, texts.dev, texts.held_out, [*key, len(texts.dev)])


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, stripped, without those that are empty. Raises DataError with the place."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes. One sentence or document a line"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte 0x{line[error.start]:02x} is not UTF-8. Convert the file, for example by: "
                    f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > converted{path.suffix}"
                ) from None
            if text:
                yield text


def _chunks(texts: Iterable[tuple[Split, str]]) -> Iterator[dict[Split, list[str]]]:
    """Texts by split, so many at a time as fit into memory with what tokenisation makes of them."""
    chunk: dict[Split, list[str]] = {"train": [], "dev": []}
    count = characters = 0
    for split, text in texts:
        chunk[split].append(text)
        count, characters = count + 1, characters + len(text)
        if count >= _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk = {"train": [], "dev": []}
            count = characters = 0
    yield chunk


def _write(folder: Path, sources: _Sources, tokenizer: Tokenizer, max_length: int, packed: bool) -> None:
    """Tokenise all texts into `folder`, which appears when it is whole."""
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}")
    unfinished.mkdir()
    try:
        # Half the space where two bytes hold every id.
        kind = np.dtype(np.uint16 if tokenizer.vocabulary_size <= 1 << 16 else np.int32)
        writers = {split: _Writer(unfinished, split, kind, max_length, packed) for split in ("train", "dev")}
        done, said = 0, time.monotonic()
        for chunk in _chunks(sources.texts()):
            for split, texts in chunk.items():
                writers[split].add(tokenizer.encode(texts, sys.maxsize if packed else max_length))
                done += len(texts)
            if time.monotonic() - said > _QUIET:
                said = time.monotonic()
                print(f"tokenised {done:,} texts", file=sys.stderr, flush=True)
        about = {"ids": kind.str, "texts": done} | {split: writer.close() for split, writer in writers.items()}
        with replacing(unfinished / _ABOUT) as temporary:
            temporary.write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            unfinished.rename(folder)
        except OSError:  # where there are no locks, another process may have been first
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _lock(folder: Path, timeout: float) -> Iterator[None]:
    """Let others wait until `folder` is there; on a file system without locks each process makes its own."""
    lock: AbstractContextManager
    try:
        lock = FileLock(f"{folder}.lock").acquire(timeout)
    except NotImplementedError as error:
        logger.warning("%s cannot be locked: %s", folder, error)
        lock = nullcontext()
    with lock:
        yield


class _Writer:
    """The files of one split, as sequences come."""

    def __init__(self, folder: Path, split: Split, kind: np.dtype, max_length: int, packed: bool):
        self.ids = (folder / _IDS.format(split)).open("wb")
        self.offsets = (folder / _OFFSETS.format(split)).open("wb")
        self.offsets.write(np.zeros(1, np.int64).tobytes())
        self.kind, self.max_length, self.packed = kind, max_length, packed
        self.rows = self.tokens = 0
        self.digests = hashlib.sha256(), hashlib.sha256()  # of ids and of lengths, whatever the chunks
        self.waiting = np.empty(0, np.int32)  # of a packed split: tokens that do not fill a sequence yet
        self.first = np.empty(0, np.int32)  # [CLS]

    def add(self, tokens: Ragged) -> None:
        """Texts as the tokenizer gives them, each as [CLS] tokens [SEP]. Those without a token are left out."""
        lengths = tokens.lengths
        if not self.packed:
            kept = lengths > 2
            self._put(tokens.ids[np.repeat(kept, lengths)], lengths[kept])
            return
        kept = np.repeat(lengths > 2, lengths)
        kept[tokens.offsets[:-1]] = False  # one [CLS] a sequence, not one a text
        self.first = tokens.ids[:1] if len(tokens.ids) else self.first
        stream = np.concatenate([self.waiting, tokens.ids[kept]])
        width = self.max_length - 1
        whole = len(stream) // width
        self.waiting = stream[whole * width :]
        block = stream[: whole * width].reshape(whole, width)
        filled = np.concatenate([np.repeat(self.first, whole)[:, None], block], axis=1)
        self._put(filled.ravel(), np.full(whole, self.max_length))

    def close(self) -> dict[str, Any]:
        """Finish the files; what there is to tell of them."""
        if len(self.waiting):
            self._put(np.concatenate([self.first, self.waiting]), np.array([len(self.waiting) + 1]))
        self.ids.close()
        self.offsets.close()
        digest = hashlib.sha256(b"".join(each.digest() for each in self.digests)).hexdigest()
        return {"rows": self.rows, "tokens": self.tokens, "sha256": digest}

    def _put(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.ids.write(ids.astype(self.kind).tobytes())
        self.offsets.write((self.tokens + np.cumsum(lengths, dtype=np.int64)).tobytes())
        self.digests[0].update(ids.astype("<i4").tobytes())
        self.digests[1].update(lengths.astype("<i8").tobytes())
        self.rows, self.tokens = self.rows + len(lengths), self.tokens + len(ids)


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there with all its files, of the sizes that they had."""
    if not (folder / _ABOUT).exists():
        return False
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        size = np.dtype(about["ids"]).itemsize
        return all(
            (folder / _IDS.format(split)).stat().st_size == size * about[split]["tokens"]
            and (folder / _OFFSETS.format(split)).stat().st_size == 8 * (about[split]["rows"] + 1)
            for split in ("train", "dev")
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("token cache %s cannot be read and is made anew: %s", folder, error)
        return False


def _map(folder: Path, split: Split) -> tuple[Ragged, str]:
    """The tokens of a split, mapped into memory, and their digest."""
    about = json.loads((folder / _ABOUT).read_bytes())
    ids: np.ndarray = np.empty(0, np.int32)
    if about[split]["tokens"]:  # nothing cannot be mapped
        ids = np.memmap(folder / _IDS.format(split), about["ids"], mode="r")
    return Ragged(ids, np.memmap(folder / _OFFSETS.format(split), np.int64, mode="r")), about[split]["sha256"]
