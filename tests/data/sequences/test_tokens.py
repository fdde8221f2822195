"""Tokens as BERT's, vocabularies that know their texts, and a cache that processes share and none depends on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_tasks import QUORA, SST

from minbert.data.errors import UserError
from minbert.data.sequences import tokens
from minbert.data.sequences.ragged import Ragged
from minbert.data.sequences.tokens import (
    SPECIAL_TOKENS,
    Tokenizer,
    build_vocabulary,
    default_cache_dir,
    load_tokenizer,
    tokenise,
    write_vocabulary,
)
from minbert.data.sources.builtin import builtin_examples
from minbert.data.sources.examples import limit

AWKWARD = [
    "The Rock is destined to be the 21st Century 's new `` Conan ''",
    "Crème brûlée, naïve café; ÅNGSTRÖM İstanbul",
    "数学 is 难 and 한국어 too",
    "tabs\tand\nbreaks\u00a0and\u200bzero-width \x00 nulls",
    "an [MASK] in the [SEP] text",
    "x" * 150 + " y",
    "😀 emoji… “quotes” — dashes",
    "",
    "word " * 400,
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    texts = [text for column in builtin_examples(QUORA, "train").sentences for text in column]
    directory = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(directory, build_vocabulary(texts, 1000))
    return load_tokenizer(directory)


def rows(column) -> list[list[int]]:
    return [column.ids[start:end].tolist() for start, end in zip(column.offsets, column.offsets[1:])]


def same(one, other) -> bool:
    pairs = zip(one.columns, other.columns, strict=True)
    return all(np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets) for a, b in pairs)


# Tokenizer


@pytest.mark.parametrize("max_length", [5, 64, 512])
def test_tokens_are_those_of_transformers(minilm, max_length):
    from transformers import BertTokenizerFast

    texts = AWKWARD + limit(builtin_examples(SST, "train"), 100).sentences[0]
    theirs = BertTokenizerFast.from_pretrained(minilm)(texts, truncation=True, max_length=max_length)["input_ids"]
    ours = load_tokenizer(minilm).encode(texts, max_length)
    assert rows(ours) == theirs
    assert ours.ids.dtype == np.int32
    assert ours.offsets.dtype == np.int64


def test_tokens_are_those_of_transformers_on_real_sentences(minilm, course_data):
    from transformers import BertTokenizerFast

    from minbert.data.sources.loading import load_examples

    texts = limit(load_examples(str(course_data), QUORA, "train"), 3000).sentences[1]
    theirs = BertTokenizerFast.from_pretrained(minilm)(texts, truncation=True, max_length=40)["input_ids"]
    assert rows(load_tokenizer(minilm).encode(texts, 40)) == theirs


def test_both_kinds_of_files_give_the_same_tokenizer(minilm, tmp_path):
    shutil.copy(minilm / "tokenizer.json", tmp_path)  # with padding and truncation to 128 stored in it
    serialised, plain = load_tokenizer(tmp_path), load_tokenizer(minilm)
    assert serialised.fingerprint == plain.fingerprint
    assert rows(serialised.encode(AWKWARD, 512)) == rows(plain.encode(AWKWARD, 512))
    assert plain.vocabulary_size == 30522
    assert [plain.token_id(token) for token in SPECIAL_TOKENS] == [0, 100, 101, 102, 103]


def test_casing_follows_the_settings_and_is_part_of_the_fingerprint(small, tmp_path):
    write_vocabulary(tmp_path, [*SPECIAL_TOKENS, "cafe", "Café"])
    uncased = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = load_tokenizer(tmp_path)
    assert rows(uncased.encode(["Café"], 8)) == [[2, 5, 3]]
    assert rows(cased.encode(["Café"], 8)) == [[2, 6, 3]]
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).fingerprint == uncased.fingerprint
    assert len({uncased.fingerprint, cased.fingerprint, small.fingerprint}) == 3


def test_nothing_to_encode(small):
    assert rows(small.encode([], 8)) == []
    assert rows(small.encode([""], 8)) == [[2, 3]]
    with pytest.raises(ValueError, match="max_length"):
        small.encode(["a"], 2)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither vocab\.txt nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("some\nwords\n")
    with pytest.raises(UserError, match=r"no token \[PAD\]"):
        load_tokenizer(tmp_path)


# Vocabulary


@settings(max_examples=50)
@given(st.lists(st.text(max_size=40), max_size=8))
def test_a_vocabulary_is_read_back_and_knows_its_texts(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("vocabulary")
    vocabulary = build_vocabulary(texts, 2000)
    write_vocabulary(directory, vocabulary)
    tokenizer = load_tokenizer(directory)
    assert [tokenizer.token_id(token) for token in vocabulary] == list(range(len(vocabulary)))
    assert tokenizer.token_id("[UNK]") not in tokenizer.encode(texts, 512).ids


def test_a_vocabulary_is_ordered_by_frequency_and_bounded():
    texts = ["The café was good, the food too", "good food", "The end"]
    vocabulary = build_vocabulary(texts, 200)
    assert vocabulary[:9] == [*SPECIAL_TOKENS, "o", "##o", "d", "##d"]
    assert vocabulary[-3:] == ["the", "food", "good"]
    assert build_vocabulary(reversed(texts), 200) == vocabulary
    assert "cafe" not in vocabulary  # seen once
    many = [chr(0x4E00 + i // 2) for i in range(4000)] + ["word"] * 2
    crowded = build_vocabulary(many, 300)
    assert len(crowded) == len(set(crowded)) <= 300
    assert "word" in crowded
    with pytest.raises(ValueError, match="at least 64"):
        build_vocabulary(texts, 10)


# Cache


def test_the_cache_is_hit_only_by_the_same_content(small, minilm, tmp_path, monkeypatch):
    examples = limit(builtin_examples(QUORA, "train"), 200)
    fresh = tokenise(examples, small, 32)
    assert fresh.ids == examples.ids
    assert fresh.labels is examples.labels
    assert same(tokenise(examples, small, 32, tmp_path), fresh)
    assert same(tokenise(limit(examples, 100), small, 32, tmp_path), tokenise(limit(examples, 100), small, 32))
    assert same(tokenise(examples, small, 6, tmp_path), tokenise(examples, small, 6))
    assert same(
        tokenise(examples, load_tokenizer(minilm), 32, tmp_path), tokenise(examples, load_tokenizer(minilm), 32)
    )
    assert len(list(tmp_path.glob("quora-train-*.npz"))) == 4
    monkeypatch.setattr(Tokenizer, "encode", None)
    assert same(tokenise(examples, small, 32, tmp_path), fresh)


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def pickle_instead(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object))


def change(edit: Callable[[np.ndarray], object], signed: bool = False) -> Callable[[Path], None]:
    """Edit the ids of the first column, and put the right hash beside them if it is to be `signed`."""

    def damage(path: Path) -> None:
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["ids0"] = arrays["ids0"].copy()
        edit(arrays["ids0"])
        if signed:
            columns = tuple(Ragged(arrays[f"ids{i}"], arrays[f"offsets{i}"]) for i in (0, 1))
            arrays["sha256"] = np.frombuffer(tokens._digest(columns), np.uint8)
        np.savez(path, **arrays)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        damage_middle,
        lambda path: np.savez(path, ids0=np.zeros(3)),
        lambda path: np.savez(path, **{f"{name}{i}": np.zeros(1, int) for name in ("ids", "offsets") for i in (0, 1)}),
        pickle_instead,
        change(lambda ids: ids.__setitem__(7, 10**6)),
        change(lambda ids: ids.__setitem__(7, 10**6), signed=True),
        change(lambda ids: ids.__setitem__(7, -1), signed=True),
        change(lambda ids: ids[1:5].sort()),
    ],
    ids=[
        *["empty", "text", "cut off", "flipped bits", "arrays missing", "wrong arrays", "pickle"],
        *["an id changed", "ids beyond the vocabulary", "negative ids", "other tokens"],
    ],
)
def test_a_damaged_file_is_made_anew(small, tmp_path, caplog, damage):
    examples = limit(builtin_examples(QUORA, "dev"), 50)
    fresh = tokenise(examples, small, 32, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    damage(path)
    assert same(tokenise(examples, small, 32, tmp_path), fresh)
    assert "cannot be read and is made anew" in caplog.text
    caplog.clear()
    assert same(tokenise(examples, small, 32, tmp_path), fresh)
    assert not caplog.text


def test_without_a_place_to_write_there_is_a_warning_and_no_cache(small, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    examples = builtin_examples(QUORA, "dev")
    assert same(tokenise(examples, small, 32, tmp_path / "file" / "cache"), tokenise(examples, small, 32))
    assert "is not used" in caplog.text


def test_a_full_disk_leaves_nothing_behind(small, tmp_path, caplog, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    examples = builtin_examples(QUORA, "dev")
    assert same(tokenise(examples, small, 32, tmp_path), tokenise(examples, small, 32))
    assert "No space left" in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_a_lock_that_is_never_released_is_waited_for_and_left(small, tmp_path, caplog, monkeypatch):
    examples = builtin_examples(QUORA, "dev")
    tokenise(examples, small, 32, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    path.unlink()
    monkeypatch.setattr(tokens, "LOCK_SECONDS", 0.2)
    with tokens.FileLock(f"{path}.lock"):
        assert same(tokenise(examples, small, 32, tmp_path), tokenise(examples, small, 32))
    assert "is not used" in caplog.text


PROGRAM = """
import sys, time
from pathlib import Path
from minbert.data.sequences import tokens
from minbert.data.sources.builtin import builtin_examples
from minbert.data.task import resolve_task

encode = tokens.Tokenizer.encode
def slow(self, *arguments):
    with open(sys.argv[2] + "/encoded", "a") as file:
        file.write("x")
    time.sleep(0.2)
    return encode(self, *arguments)
tokens.Tokenizer.encode = slow

tokenizer = tokens.load_tokenizer(Path(sys.argv[1]))
split = tokens.tokenise(builtin_examples(resolve_task("quora"), "train"), tokenizer, 32, Path(sys.argv[2]))
print(sum(int(column.ids.sum()) for column in split.columns), len(split))
"""


def test_of_several_processes_one_tokenises(small, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(small.directory), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    split = tokenise(builtin_examples(QUORA, "train"), small, 32)
    assert outputs == [f"{sum(int(column.ids.sum()) for column in split.columns)} 4000\n"] * 3
    assert (tmp_path / "encoded").read_text() == "xx"  # the two columns, once


def test_the_default_place(monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE", "~/here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path.home() / "here"
    monkeypatch.delenv("MINBERT_CACHE")
    assert default_cache_dir() == Path("/cache/minbert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path(os.path.expanduser("~/.cache/minbert"))
