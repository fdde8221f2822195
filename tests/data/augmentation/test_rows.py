"""The new rows of a task: which there are, and that their files are read as rows of the task."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minbert.data.augmentation.filters import plain
from minbert.data.augmentation.rows import ORIGIN, Variant, new_rows, write_rows
from minbert.data.sources.examples import Examples
from minbert.data.sources.own import read_columns, read_own
from minbert.data.task import Task, resolve_task

STS, SST = resolve_task("sts"), resolve_task("sst")
MULTI = Task(name="topics", kind="multilabel", sentences=("text",), label="topic", classes=("x", "y", "z"))
WORD = st.text(alphabet="abc\n\"',\té", min_size=1, max_size=8).map(str.strip).filter(bool)


def pairs(*rows: tuple[str, str, float]) -> Examples:
    first, second, labels = zip(*rows)
    ids = [f"id{number}" for number in range(len(rows))]
    return Examples(STS, "train", "here", ids, (list(first), list(second)), np.asarray(labels, np.float32))


def of(text: str, pivot: str = "es", variant: int = 0) -> Variant:
    return Variant(text, pivot, "model@1", variant)


def test_a_pair_becomes_three_as_in_the_paper():
    kept, equal = new_rows(pairs(("s1", "s2", 2.4)), {"s1": [of("t1")], "s2": [of("t2")]})
    assert [row.sentences for row in kept] == [("t1", "s2"), ("s1", "t2"), ("t1", "t2")]
    assert [dict(zip(ORIGIN, row.origin))["replaced"] for row in kept] == [
        "sentence1",
        "sentence2",
        "sentence1+sentence2",
    ]
    assert {row.label for row in kept} == {2.4} and not equal


def test_both_sides_come_of_one_pivot_and_variant():
    variants = {"s1": [of("es0"), of("ca0", "ca")], "s2": [of("es1", variant=1), of("ca2", "ca")]}
    kept, _ = new_rows(pairs(("s1", "s2", 1)), variants)
    both = [row.sentences for row in kept if dict(zip(ORIGIN, row.origin))["replaced"].count("+")]
    assert both == [("ca0", "ca2")]
    assert len(kept) == 5


def test_a_pair_that_became_equal_is_dropped_unless_it_was():
    kept, equal = new_rows(pairs(("a b", "c", 3), ("d", "d!", 5)), {"a b": [of("C")], "d": [of("e")], "d!": [of("e")]})
    assert [row.sentences for row in equal] == [("C", "c")]
    assert ("e", "e") in [row.sentences for row in kept]


def test_a_single_sentence_becomes_one():
    examples = Examples(SST, "train", "here", ["a"], (["good film"],), np.asarray([3], np.float32))
    kept, _ = new_rows(examples, {"good film": [of("fine movie"), of("nice film", "ca")]})
    assert [(row.sentences, row.label) for row in kept] == [(("fine movie",), 3), (("nice film",), 3)]


@given(
    rows=st.lists(st.tuples(WORD, WORD, st.integers(0, 50).map(lambda n: n / 10)), min_size=1, max_size=5),
    news=st.dictionaries(WORD, st.lists(st.tuples(WORD, st.sampled_from(["es", "ca"])), max_size=2), max_size=6),
)
def test_rows_keep_label_and_the_other_side(rows, news):
    variants = {text: [of(new, pivot, n) for n, (new, pivot) in enumerate(found)] for text, found in news.items()}
    examples = pairs(*rows)
    kept, equal = new_rows(examples, variants)
    assert len({row.id for row in kept + equal}) == len(kept + equal)
    assert not {row.id for row in kept} & set(examples.ids)
    for row in kept:
        origin = dict(zip(ORIGIN, row.origin))
        first, second, label = rows[examples.ids.index(origin["source"])]
        assert np.float32(row.label) == np.float32(label)
        for column, old, new in zip(STS.sentences, (first, second), row.sentences):
            if column in origin["replaced"].split("+"):
                assert new in [variant.text for variant in variants[old]]
            else:
                assert new == old
        assert plain(row.sentences[0]) != plain(row.sentences[1]) or plain(first) == plain(second)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
@given(rows=st.lists(st.tuples(WORD, WORD, st.integers(0, 50).map(lambda n: n / 10)), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_file_is_read_as_rows_of_the_task(tmp_path, kind, rows):
    examples = pairs(*rows)
    kept, _ = new_rows(examples, {text: [of(f"{text} x")] for row in rows for text in row[:2]})
    path = tmp_path / f"sts.{kind}"
    write_rows(path, STS, kept)
    read = read_own(own_files(STS, path), "train")
    assert read.ids == [row.id for row in kept]
    assert list(zip(*read.sentences)) == [row.sentences for row in kept]
    assert read.labels.tolist() == [np.float32(row.label) for row in kept]
    for (_, record), row in zip(read_columns(path), kept, strict=True):
        assert tuple(record[name] for name in ORIGIN) == row.origin


def own_files(task: Task, path: Path) -> Task:
    return Task.model_validate(task.model_dump() | {"files": {"train": path, "dev": path}})


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_labels_of_several_classes(tmp_path, kind):
    labels = np.asarray([[1, 0, 1], [0, 1, 0]], np.float32)
    examples = Examples(MULTI, "train", "here", ["a", "b"], (["one", "two"],), labels)
    kept, _ = new_rows(examples, {"one": [of("uno")], "two": [of("dos")]})
    path = tmp_path / f"topics.{kind}"
    write_rows(path, MULTI, kept)
    assert read_own(own_files(MULTI, path), "train").labels.tolist() == labels.tolist()
