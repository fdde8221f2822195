"""Shards: kept by their content, shared by several at once, and made again where they are damaged."""

import logging
import os
import threading

import pytest

from minbert.data.augmentation.recipe import Decoding, Recipe
from minbert.data.augmentation.store import Store, Translation
from minbert.data.augmentation.work import UNIT, Unit, missing, units

RECIPE = Recipe("model", ("1" * 64, "2" * 64), "en", "es", Decoding())
FIRST = {"a": Translation("ä", "A"), "two\nlines \u2028": Translation("", "")}
SECOND = {"b": Translation("ß", "B")}


def test_what_was_added_is_read_by_another(tmp_path):
    store = Store(tmp_path, RECIPE)
    store.add(FIRST)
    store.add(SECOND)
    assert Store(tmp_path, RECIPE).translations == store.translations == FIRST | SECOND
    assert store.missing(["b", "c", "a", "c"]) == ["c"]


@pytest.mark.parametrize(
    "other",
    [
        Recipe("model", ("1" * 64, "3" * 64), "en", "es", Decoding()),
        Recipe("model", ("1" * 64, "2" * 64), "en", "ca", Decoding()),
        Recipe("model", ("1" * 64, "2" * 64), "en", "es", Decoding(beam=4)),
        Recipe("model", ("1" * 64, "2" * 64), "en", "es", Decoding(sample=True)),
        Recipe("model", ("1" * 64, "2" * 64), "en", "es", Decoding(), variant=1),
    ],
)
def test_another_recipe_has_translations_of_its_own(tmp_path, other):
    Store(tmp_path, RECIPE).add(FIRST)
    assert not Store(tmp_path, other).translations


def test_settings_that_do_not_count_and_names_share(tmp_path):
    Store(tmp_path, RECIPE).add(FIRST)
    same = Recipe("called otherwise", RECIPE.revisions, "en", "es", Decoding(temperature=0.5, seed=3))
    assert Store(tmp_path, same).translations == FIRST


def flip(content: bytes) -> bytes:
    return content[:5] + bytes([content[5] ^ 1]) + content[6:]


@pytest.mark.parametrize(
    "damage", [flip, lambda content: content[:-3], lambda content: b"", lambda content: b"\xff" * 9]
)
def test_a_damaged_shard_is_noticed_and_made_again(tmp_path, damage, caplog):
    store = Store(tmp_path, RECIPE)
    store.add(FIRST)
    (shard,) = store.folder.glob("*.jsonl")
    store.add(SECOND)
    shard.write_bytes(damage(shard.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = Store(tmp_path, RECIPE)
    assert shard.name in caplog.text and "translated again" in caplog.text
    assert again.translations == SECOND
    again.add({text: FIRST[text] for text in again.missing(FIRST)})
    assert Store(tmp_path, RECIPE).translations == FIRST | SECOND


def test_work_is_cut_in_the_same_units_whatever_is_done(tmp_path):
    texts = [str(number) for number in range(UNIT + 10)]
    work = units([*texts, *texts], [RECIPE])
    assert [len(unit.texts) for unit in work] == [UNIT, 10]
    assert [count for _, count in missing(tmp_path, work)] == [UNIT, 10]
    Store(tmp_path, RECIPE).add({text: Translation(text, text) for text in texts[:UNIT]})
    assert missing(tmp_path, work) == [(work[1], 10)]
    assert units(texts, [RECIPE]) == work


def test_a_unit_is_claimed_by_one_at_a_time(tmp_path):
    ours, theirs = Store(tmp_path, RECIPE), Store(tmp_path, RECIPE)
    name = Unit(RECIPE, ("a",)).name
    with ours.claim(name) as claimed:
        assert claimed
        with theirs.claim(name) as second, theirs.claim("another") as another:
            assert not second and another
        ours.add(FIRST)
    with theirs.claim(name) as claimed:
        assert claimed and theirs.translations == FIRST  # what was done meanwhile is seen
    assert not list(ours.folder.glob("*.lock"))


def test_a_dead_owner_claims_nothing(tmp_path):
    store = Store(tmp_path, RECIPE)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with Store(tmp_path, RECIPE).claim("unit"):
            os.write(writer, b"x")
            os.kill(os.getpid(), 9)
    os.read(reader, 1)
    os.waitpid(child, 0)
    assert list(store.folder.glob("*.lock"))
    with store.claim("unit") as claimed:
        assert claimed


def test_many_writers_lose_nothing(tmp_path):
    def write(number: int) -> None:
        store = Store(tmp_path, RECIPE)
        for part in range(10):
            store.add({f"{number}-{part}": Translation("x", "y")})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Store(tmp_path, RECIPE).translations) == 40
    assert not [path for path in (tmp_path / RECIPE.folder).iterdir() if path.name.startswith(".")]
