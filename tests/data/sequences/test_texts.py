"""Texts of a masked language model: what is trained on, what is held out, and token arrays that no memory bounds."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from known_tasks import QUORA, SST

from minbert.data.errors import DataError, UserError
from minbert.data.sequences import texts as module
from minbert.data.sequences.texts import load_texts, read_lines, training_texts
from minbert.data.sequences.tokens import Tokenizer, build_vocabulary, load_tokenizer, write_vocabulary
from minbert.data.sources.builtin import builtin_examples
from minbert.data.task import Task, resolve_task

LENGTH = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    texts = [text for task in (SST, QUORA) for column in builtin_examples(task, "train").sentences for text in column]
    directory = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(directory, build_vocabulary(texts, 1000))
    return load_tokenizer(directory)


def corpus(**texts) -> Task:
    return resolve_task({"name": "mlm", "kind": "masked_lm", "texts": texts})


def rows(split) -> list[list[int]]:
    (column,) = split.columns
    return [column.ids[start:end].tolist() for start, end in zip(column.offsets, column.offsets[1:])]


def both(task: Task, tokenizer: Tokenizer, cache: Path, length: int = LENGTH):
    return [load_texts(task, split, "builtin", tokenizer, length, cache) for split in ("train", "dev")]


def tokens_of(tokenizer: Tokenizer, texts: list[str], length: int = LENGTH) -> list[list[int]]:
    encoded = tokenizer.encode(texts, length)
    return [encoded.ids[start:end].tolist() for start, end in zip(encoded.offsets, encoded.offsets[1:])]


def test_every_distinct_training_text_of_the_tasks_is_there_once(small, tmp_path):
    task = corpus(tasks=["sst", "quora"], held_out=0.1)
    train, dev = both(task, small, tmp_path)
    wanted = {text for each in (SST, QUORA) for column in builtin_examples(each, "train").sentences for text in column}
    assert sorted(rows(train) + rows(dev)) == sorted(tokens_of(small, list(wanted)))
    assert 0.07 < len(dev) / len(wanted) < 0.13
    # What the tasks are scored on is nowhere, unless that is asked for.
    scored = builtin_examples(SST, "dev").sentences[0]
    assert not set(map(str, tokens_of(small, scored))) & set(map(str, rows(train) + rows(dev)))
    more = corpus(tasks=["sst"], splits=["train", "dev"])
    train, dev = both(more, small, tmp_path)
    assert set(map(str, tokens_of(small, scored))) <= set(map(str, rows(train) + rows(dev)))
    assert set(training_texts(task, "builtin")) < wanted


def test_files_are_read_line_by_line_and_equal_texts_are_on_one_side(small, tmp_path):
    lines = builtin_examples(SST, "train").sentences[0][:500] * 4
    (tmp_path / "a.txt").write_text("\n\n".join(lines[:1000]) + "\n  \n")
    (tmp_path / "b.txt").write_text("\ufeff" + "\r\n".join(lines[1000:]))
    train, dev = both(corpus(files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]), small, tmp_path)
    assert sorted(rows(train) + rows(dev)) == sorted(tokens_of(small, lines))
    assert not set(map(str, rows(train))) & set(map(str, rows(dev)))
    assert dev.ids[0] == "0" and len(dev.ids) == len(dev) and list(dev.ids)[-1] == str(len(dev) - 1)
    assert (dev.labels[np.arange(len(dev))] == 0).all()
    # Files of its own score it, and then nothing is held out.
    scored = corpus(files=[str(tmp_path / "a.txt")], dev=[str(tmp_path / "b.txt")])
    train, dev = both(scored, small, tmp_path)
    assert (len(train), len(dev)) == (1000, 1000)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_packed_texts_fill_their_sequences_and_lose_nothing(small, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    lines = [f"the film number {n} is good " + "and long " * (n % 40) for n in range(150)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("one line")
    train, dev = both(
        corpus(files=[str(tmp_path / "a.txt")], dev=[str(tmp_path / "b.txt")], packed=True), small, tmp_path
    )
    first, last = small.token_id("[CLS]"), small.token_id("[SEP]")
    assert all(len(row) == LENGTH for row in rows(train)[:-1]) and all(row[0] == first for row in rows(train))
    laid = [token for row in rows(train) for token in row[1:]]
    assert laid == [token for row in tokens_of(small, lines, 1000) for token in row[1:]]
    assert rows(dev) == [[first, *tokens_of(small, ["one line"])[0][1:-1], last]]


def test_the_second_time_nothing_is_tokenised_and_chunks_do_not_matter(small, tmp_path, monkeypatch):
    task = corpus(tasks=["sst"])
    before = both(task, small, tmp_path / "one")
    monkeypatch.setattr(module, "_CHUNK", 100)
    other = both(task, small, tmp_path / "two")
    assert [split.fingerprint() for split in before] == [split.fingerprint() for split in other]
    assert list(map(rows, before)) == list(map(rows, other))
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("tokenised twice"))
    again = both(task, small, tmp_path / "one")
    assert list(map(rows, again)) == list(map(rows, before))


def test_what_changes_the_tokens_makes_them_anew_and_the_masking_does_not(small, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"line {n}" for n in range(200)))
    cache = tmp_path / "cache"

    def made(length: int = LENGTH, **more) -> int:
        both(corpus(files=[str(file)], **more), small, cache, length)
        return len(list(cache.glob("texts-*/")))

    masked = resolve_task(
        {"name": "other", "kind": "masked_lm", "texts": {"files": [str(file)]}, "masking": {"share": 0.4}}
    )
    assert made() == 1
    assert [split.masking.share for split in both(masked, small, cache)] == [0.4, 0.4]
    assert made() == 1 and made(packed=True) == 2 and made(held_out=0.1) == 3 and made(length=16) == 4
    file.write_text("\n".join(f"other line {n}" for n in range(200)))
    assert made() == 5


@pytest.mark.parametrize("damage", ["cut", "about", "gone"])
def test_damaged_arrays_are_made_anew(small, tmp_path, damage):
    task = corpus(tasks=["sst"])
    before = list(map(rows, both(task, small, tmp_path)))
    (folder,) = tmp_path.glob("texts-*/")
    if damage == "about":
        (folder / "about.json").write_text(json.dumps({"ids": "float"}))
    elif damage == "cut":
        (folder / "train.ids").write_bytes((folder / "train.ids").read_bytes()[:-10])
    else:
        (folder / "dev.offsets").unlink()
    assert list(map(rows, both(task, small, tmp_path))) == before
    assert not list(tmp_path.glob(".texts-*"))


def test_a_file_far_larger_than_a_chunk_takes_the_memory_of_a_chunk(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 500)
    with (tmp_path / "large.txt").open("w") as file:
        for number in range(60_000):
            file.write(f"the film number {number} is good and the story of it is long\n")
    size = (tmp_path / "large.txt").stat().st_size
    tracemalloc.start()
    try:
        train, _ = both(corpus(files=[str(tmp_path / "large.txt")]), small, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(train) > 58_000 and peak < size / 3, (peak, size)
    assert isinstance(train.columns[0].ids, np.memmap)


def test_what_cannot_be_read_is_located(small, tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(DataError, match=r"a\.txt, which task mlm has its texts from, is no file"):
        both(corpus(files=[str(file)]), small, tmp_path)
    file.write_bytes(b"good\n\xe4\n")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 0xe4 is not UTF-8.*iconv"):
        list(read_lines(file))
    with pytest.raises(DataError, match=r"a\.txt:2: byte"):
        both(corpus(files=[str(file)]), small, tmp_path)
    file.write_bytes(b"one\n" + b"x" * (module.LONGEST_LINE + 1))
    with pytest.raises(DataError, match=r"a\.txt:2: the line has more than 16,777,216 bytes"):
        list(read_lines(file))
    file.write_text("a single line\n")
    with pytest.raises(DataError, match="task mlm has no text for dev: give it files to score"):
        both(corpus(files=[str(file)]), small, tmp_path)
    with pytest.raises(DataError, match="texts for train and dev only"):
        load_texts(corpus(files=[str(file)]), "test", "builtin", small, LENGTH, tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"could not be kept in .*taken.*--cache"):
        both(corpus(tasks=["sst"]), small, tmp_path / "taken")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"texts": {}}, "name `tasks` or `files`"),
        ({}, "a masked_lm task needs them"),
        ({"texts": {"tasks": ["nothing"]}}, "there is no task 'nothing'"),
        ({"texts": {"tasks": ["sst"], "held_out": 0}}, "texts.held_out"),
        ({"texts": {"tasks": ["sst"]}, "classes": ["a", "b"]}, "a masked_lm task has none"),
        ({"texts": {"tasks": ["sst"]}, "files": {"train": "a.csv", "dev": "b.csv"}}, "has `texts` instead"),
        ({"kind": "binary", "label": "l", "sentences": ["s"], "texts": {"tasks": ["sst"]}}, "only a masked_lm task"),
        ({"texts": {"tasks": ["sst"]}, "masking": {"share": 2}}, "masking.share"),
    ],
)
def test_wrong_declarations_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        resolve_task({"name": "mlm", "kind": "masked_lm"} | keys)
