"""How training sees new rows: drawn in the place of theirs, the same on any number of processes, or appended."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from minbert.data.augmentation.augmented import AugmentedSplit, appended, read_augmentation
from minbert.data.augmentation.rows import Variant, new_rows, write_rows
from minbert.data.batches.batch import Portion, make_batch
from minbert.data.batches.plan import BatchPlan, share
from minbert.data.errors import DataError
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.tokens import build_vocabulary, load_tokenizer, tokenise, write_vocabulary
from minbert.data.sources.examples import Examples, limit
from minbert.data.sources.loading import load_examples
from minbert.data.task import resolve_task

STS = resolve_task("sts")
VARIANTS = 2
BATCH = 8


@pytest.fixture(scope="module")
def examples() -> Examples:
    return limit(load_examples("builtin", STS, "train"), 60)


def variants_of(examples: Examples) -> dict[str, list[Variant]]:
    """Of every second row's first sentence."""
    texts = dict.fromkeys(examples.sentences[0][::2])
    return {text: [Variant(f"{text} new{n}", "es", "model@1", n) for n in range(VARIANTS)] for text in texts}


@pytest.fixture(scope="module")
def file(examples, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("new") / "sts.tsv"
    write_rows(path, STS, new_rows(examples, variants_of(examples))[0])
    return path


def tokens(examples: Examples, folder: Path, joint: bool = False) -> TokenisedSplit:
    write_vocabulary(folder, build_vocabulary([text for column in examples.sentences for text in column], 2000))
    return tokenise(examples, load_tokenizer(folder), 64, joint=joint)


@pytest.fixture(scope="module", params=[False, True], ids=["siamese", "joint"])
def split(request, examples, file, tmp_path_factory) -> AugmentedSplit:
    new = read_augmentation([file], ["sts"], examples, part=False)
    folder = tmp_path_factory.mktemp("vocabulary")
    both = tokens(appended(examples, new.examples), folder, request.param)
    tokenizer = load_tokenizer(folder)
    old, more = (tokenise(part, tokenizer, 64, joint=request.param) for part in (examples, new.examples))
    order = np.random.default_rng(0).permutation(len(new))  # a file may have any order
    shuffled = TokenisedSplit(
        [more.ids[row] for row in order],
        tuple(column.take(order) for column in more.columns),
        more.labels[order],
        more.joint,
    )
    assert len(both) == len(old) + len(new)
    return AugmentedSplit.of(old, shuffled, new.sources[order], share=0.5)


def draw(step: int, count: int) -> Draw:
    return Draw(0, "sts", step, np.arange(count))


def test_a_row_gives_its_place_to_its_own(split, examples):
    rows = np.arange(len(split))
    taken = {}
    for step in range(400):
        for row, drawn in zip(rows, split.drawn(rows, draw(step, len(rows)))):
            taken.setdefault(int(row), []).append(split.joined.ids[drawn])
    have = [row for row in rows if split.first[row + 1] > split.first[row]]
    assert 0 < len(have) < len(rows)
    for row, names in taken.items():
        assert {name.partition("~")[0] for name in names} == {examples.ids[row]}
        if row not in have:
            assert set(names) == {examples.ids[row]}
            continue
        new = [name for name in names if "~" in name]
        assert len(new) / len(names) == pytest.approx(0.5, abs=0.12)
        assert len(set(new)) == split.first[row + 1] - split.first[row]  # each of them comes up
    shares = np.mean([name != examples.ids[row] for row in have for name in taken[row]])
    assert shares == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(split, probability):
    never_or_always = replace(split, share=probability)
    rows = np.arange(len(split))
    drawn = never_or_always.drawn(rows, draw(3, len(rows)))
    have = split.first[1:] > split.first[:-1]
    assert ((drawn >= len(split)) == (have if probability else np.zeros_like(have))).all()


def test_labels_and_tokens_are_those_of_the_drawn_rows(split):
    rows = np.arange(BATCH)
    numbers = draw(5, BATCH)
    encoded, expected = split.encode(rows, numbers), split.joined.encode(split.drawn(rows, numbers), numbers)
    assert (encoded.sequences.ids == expected.sequences.ids).all()
    assert (encoded.labels == split.joined.labels[split.drawn(rows, numbers)]).all()
    assert (split.drawn(rows, numbers) >= len(split)).any()


def test_prediction_sees_the_rows_themselves(split):
    rows = np.arange(len(split))
    plain = TokenisedSplit(split.ids, split.columns, split.labels, split.joint)
    assert (split.encode(rows).sequences.ids == plain.encode(rows).sequences.ids).all()
    assert (split.lengths == plain.lengths).all() and len(split) == len(plain)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_is_the_same_at_any_number_of_processes_and_parts(split, processes, parts):
    plan = BatchPlan({"sts": len(split)}, BATCH, seed=7)

    def sequences(step: int, part: int, number: int, rank: int, size: int) -> list[tuple[float, ...]]:
        """Labels and tokens of each example of a process's slice."""
        rows, places = plan.rows("sts", step), np.arange(BATCH)
        mine = [share(share(each, part, number), rank, size) for each in (rows, places)]
        if not len(mine[0]):
            return []
        batch = make_batch({"sts": split}, {"sts": Portion(*mine, BATCH)}, (plan.seed, step))
        layout, ids = batch.sentences.layout, batch.sentences.input_ids
        texts = [ids[layout.sequence == number].tolist() for number in range(len(layout))]
        count = len(mine[0])
        return [(float(label), *chain(*texts[row::count])) for row, label in enumerate(batch.tasks["sts"].labels)]

    for step in (0, 1, 9):
        whole = sequences(step, 0, 1, 0, 1)
        split_up = [
            example
            for part in range(parts)
            for rank in range(processes)
            for example in sequences(step, part, parts, rank, processes)
        ]
        assert split_up == whole


def test_each_epoch_draws_anew(split):
    rows = np.arange(len(split))
    seen = {tuple(split.drawn(rows, draw(step, len(rows)))) for step in range(5)}
    assert len(seen) == 5


def test_appended_rows_come_after_the_others(examples, file):
    new = read_augmentation([file], ["sts"], examples, part=False)
    both = appended(examples, new.examples)
    assert both.ids == examples.ids + new.examples.ids
    assert len(both) == len(examples) + len(new) and len(both.labels) == len(both)
    for row, source in enumerate(new.sources):
        assert both.labels[len(examples) + row] == examples.labels[source]


def test_the_identity_covers_new_rows_places_and_nothing_else(split):
    moved = replace(split, first=np.roll(split.first, 1))
    plain = TokenisedSplit(split.ids, split.columns, split.labels, split.joint)
    assert len({split.fingerprint(), moved.fingerprint(), plain.fingerprint()}) == 3
    assert replace(split, share=0.1).fingerprint() == split.fingerprint()  # an option, which the settings hold


def changed(examples: Examples, **fields) -> Examples:
    return replace(examples, **fields)


def test_rows_of_other_data_are_refused(examples, file, tmp_path):
    other = [list(column) for column in examples.sentences]
    other[1] = [f"{text} more" for text in other[1]]
    with pytest.raises(
        DataError, match=r"sts.tsv:2: made of row .* of sts, which .* has otherwise: run minbert augment"
    ):
        read_augmentation([file], ["sts"], changed(examples, sentences=tuple(other)), part=False)
    with pytest.raises(DataError, match="has otherwise"):
        read_augmentation([file], ["sts"], changed(examples, labels=examples.labels / 2), part=False)
    with pytest.raises(DataError, match="does not have"):
        read_augmentation([file], ["sts"], limit(examples, 20), part=False)
    some = read_augmentation([file], ["sts"], limit(examples, 20), part=True)
    assert 0 < len(some) < len(read_augmentation([file], ["sts"], examples, part=False))


def test_files_that_are_none_are_refused(examples, file, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_augmentation([tmp_path / "no.tsv"], ["sts"], examples, part=False)
    plain = tmp_path / "plain.tsv"
    plain.write_text("id\tsentence1\tsentence2\tsimilarity\n1\ta\tb\t2\n")
    with pytest.raises(DataError, match=r"plain.tsv:2: no task and source.*minbert augment"):
        read_augmentation([plain], ["sts"], examples, part=False)
    with pytest.raises(DataError, match="a row of task sts, which is not among sst, quora"):
        read_augmentation([file], ["sst", "quora"], examples, part=False)
    with pytest.raises(DataError, match="is there twice"):
        read_augmentation([file, file], ["sts"], examples, part=False)
    lines = file.read_text().splitlines()
    bad = tmp_path / "bad.tsv"
    fields = lines[1].split("\t")
    bad.write_text("\n".join([lines[0], "\t".join([*fields[:3], "9", *fields[4:]])]) + "\n")
    with pytest.raises(DataError, match=r"bad.tsv:2: label 9 is outside 0..5"):
        read_augmentation([bad], ["sts"], examples, part=False)
