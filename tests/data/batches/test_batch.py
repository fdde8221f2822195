"""Batches are made whole on the host: what the layout says of tokens, what belongs to each task, and what is drawn."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.batches.layout import Layout
from minbert.data.batches.packing import Packed, _by_width
from minbert.data.batches.plan import share
from minbert.data.sequences.draw import Draw
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import Encoded, TokenisedSplit

LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=8)


def column(lengths: list[int], seed: int) -> Ragged:
    ids = np.random.default_rng(seed).integers(5, 60, sum(lengths)).astype(np.int32)
    return Ragged(ids, ends([np.array(lengths)]))


def split(*lengths: list[int], seed: int = 0) -> TokenisedSplit:
    """A split with a column for each list of lengths; labels are the row numbers."""
    columns = tuple(column(each, seed + number) for number, each in enumerate(lengths))
    return TokenisedSplit([str(row) for row in range(len(lengths[0]))], columns, np.arange(len(lengths[0]), dtype="f"))


def sequence(batch: Batch, number: int) -> list[int]:
    """The tokens of a sequence of a batch."""
    layout = batch.sentences.layout
    start, length = int(layout.starts[number]), int(layout.lengths[number])
    return batch.sentences.input_ids[start : start + length].tolist()


@given(LENGTHS)
@settings(deadline=None)
def test_a_layout_tells_where_each_token_lies(lengths):
    layout = Layout.of(np.array(lengths))
    assert sorted(zip(layout.sequence.tolist(), layout.position.tolist())) == [
        (number, place) for number, length in enumerate(lengths) for place in range(length)
    ]
    for number, length in enumerate(lengths):
        own = slice(int(layout.starts[number]), int(layout.starts[number]) + length)
        assert layout.sequence[own].tolist() == [number] * length and layout.position[own].tolist() == [*range(length)]
    assert [length for count, length in layout.groups for _ in range(count)] == sorted(lengths)
    assert len(layout.groups) == len(set(lengths)) and len(layout) == len(lengths)
    padded = layout.in_one()
    rectangle = torch.zeros(len(lengths) * max(lengths), dtype=torch.bool)
    rectangle[padded.cells] = True
    assert torch.equal(rectangle.view(len(lengths), 1, 1, -1), padded.mask)
    assert len(set(padded.cells.tolist())) == sum(lengths)


def test_a_layout_needs_sequences():
    with pytest.raises(ValueError, match="at least one sequence"):
        Layout.of(np.zeros(0, np.int64))


@given(LENGTHS, LENGTHS, st.integers(0, 10_000))
@settings(deadline=None)
def test_each_task_finds_its_examples(one, two, seed):
    splits = {"pair": split(two, two[::-1], seed=seed), "single": split(one, seed=seed)}
    generator = np.random.default_rng(seed)
    rows = {name: generator.permutation(len(part))[: seed % 3 + 1] for name, part in splits.items()}
    batch = make_batch(splits, {name: Portion(own, own, 50) for name, own in rows.items()})
    assert list(batch.tasks) == ["pair", "single"]
    first = 0
    for name, part in batch.tasks.items():
        assert part.first == first and part.labels.tolist() == rows[name].tolist() and part.weights.all()
        assert part.sides == len(splits[name].columns) and part.global_size == 50 and len(part) == len(rows[name])
        expected = [own.take(np.array([row])).ids.tolist() for own in splits[name].columns for row in rows[name]]
        assert [sequence(batch, first + number) for number in range(part.sequences)] == expected
        first += part.sequences
    layout = batch.sentences.layout
    assert first == len(layout)
    # Task by task, and of each the shortest first.
    whose = (layout.sequence >= batch.tasks["single"].first).long()
    assert (
        layout.tokens == tuple(whose.bincount().tolist())
        and layout.ends.tolist() == whose.bincount().cumsum(0).tolist()
    )
    order = list(zip(whose.tolist(), layout.lengths[layout.sequence].tolist()))
    assert order == sorted(order) and len(layout.groups) == len(set(order))
    for device in ("cpu", "meta"):  # for whose attention sequences are padded
        padded = batch.fit_for(torch.device(device))
        for name in batch.tasks:
            alone = make_batch({name: splits[name]}, {name: Portion(rows[name], rows[name], 50)})
            found, wanted = padded.only([name]), alone.fit_for(torch.device(device))
            assert all(map(torch.equal, _by_width(found), _by_width(wanted)))
            assert found.sentences.layout.groups == wanted.sentences.layout.groups
            assert found.sentences.layout.tokens == wanted.sentences.layout.tokens
    assert batch.tokens == sum(int(splits[name].lengths[own].sum()) for name, own in rows.items())


def test_a_process_without_examples_has_a_filler():
    nothing = np.zeros(0, np.int64)
    portions = {"a": Portion.whole(np.arange(2)), "b": Portion(nothing, nothing, 7)}
    batch = make_batch({"a": split([3, 4]), "b": split([5], [6])}, portions)
    assert batch.tasks["b"].weights.tolist() == [0.0] and batch.tasks["b"].global_size == 7
    assert batch.tasks["a"].weights.tolist() == [1.0, 1.0] and len(batch.sentences.layout) == 4


@dataclass(frozen=True)
class Masked(TokenisedSplit):
    """As a task that is made of text: tokens are replaced at random, and are their own labels."""

    share: float = 0.3

    def encode(self, rows: np.ndarray, draw: Draw | None = None) -> Encoded:
        plain = self.columns[0].take(rows)
        chances = draw.uniform("mask", 9)
        flat = np.concatenate([chances[number, :length] for number, length in enumerate(plain.lengths)])
        tokens = np.flatnonzero(flat < self.share)
        ids = np.where(flat < self.share, 4, plain.ids)
        return Encoded(Ragged(ids, plain.offsets), np.zeros_like(ids), plain.ids[tokens].astype("f"), tokens=tokens)


@given(LENGTHS, st.integers(0, 10_000))
@settings(deadline=None)
def test_labels_of_tokens_come_with_their_rows(lengths, step):
    text = Masked([str(row) for row in range(len(lengths))], (column(lengths, step),), None)
    everything = {"first": Portion.whole(np.arange(2)), "text": Portion.whole(np.arange(len(lengths)))}
    batch = make_batch({"first": split([3, 5]), "text": text}, everything, draw=(0, step))
    part, layout = batch.tasks["text"], batch.sentences.layout
    assert part.rows is not None and (batch.sentences.input_ids[part.rows] == 4).all()
    assert len(part.rows) == (batch.sentences.input_ids == 4).sum() == len(part.labels)
    for row, label in zip(part.rows.tolist(), part.labels.tolist()):
        example = int(layout.sequence[row]) - part.first
        assert label == text.columns[0].take(np.array([example])).ids[layout.position[row]]


@pytest.mark.parametrize(("parts", "processes"), [(1, 2), (3, 1), (2, 4), (1, 16)])
def test_what_is_drawn_does_not_depend_on_who_draws(parts, processes):
    lengths = np.random.default_rng(0).integers(2, 9, 12).tolist()
    text = Masked([str(row) for row in range(12)], (column(lengths, 0),), None)
    rows = np.random.default_rng(1).permutation(12)

    def tokens(places: np.ndarray, step: int = 3, seed: int = 0) -> list[list[int]]:
        batch = make_batch({"text": text}, {"text": Portion(rows[places], places, 12)}, draw=(seed, step))
        return [sequence(batch, number) for number in range(len(places))]

    whole = tokens(np.arange(12))
    pieces = [share(np.arange(12), part, parts) for part in range(parts)]
    shared = [share(piece, rank, processes) for piece in pieces for rank in range(processes)]
    assert [example for places in shared for example in tokens(places)] == whole
    assert tokens(np.arange(12), step=4) != whole != tokens(np.arange(12), seed=1)


def test_draws_differ_by_task_and_purpose_and_are_even():
    places = np.arange(4000)
    one = Draw(0, "sst", 5, places).uniform("order", 2)
    assert not np.array_equal(one, Draw(0, "sts", 5, places).uniform("order", 2))
    assert not np.array_equal(one, Draw(0, "sst", 5, places).uniform("mask", 2))
    assert one.shape == (4000, 2) and one.min() >= 0 and one.max() < 1
    assert abs(one.mean() - 0.5) < 0.02 and abs(np.corrcoef(one.T)[0, 1]) < 0.06


# In one piece; "meta" stands for a GPU, which wants padded attention


def build(one: list[int], two: list[int], seed: int) -> Batch:
    """Tasks with labels of examples, of tokens, and without any row."""
    text = Masked([str(row) for row in range(len(two))], (column(two, seed),), None)
    splits = {"pair": split(one, one[::-1], seed=seed), "text": text, "none": split(one, seed=seed)}
    nothing = np.zeros(0, np.int64)
    portions = {"pair": Portion.whole(np.arange(len(one))), "text": Portion.whole(np.arange(len(two)))}
    return make_batch(splits, portions | {"none": Portion(nothing, nothing, 3)}, draw=(seed, 1))


@given(LENGTHS, LENGTHS, st.integers(0, 1000))
def test_every_tensor_comes_out_as_it_went_in(one, two, seed):
    batch = build(one, two, seed)
    packed = Packed.of(batch, torch.device("meta"))  # padded, as for a GPU, and moved to the CPU all the same
    moved = packed.to(torch.device("cpu"))
    expected = batch.fit_for(torch.device("meta"))
    assert moved.sentences.layout.groups == batch.sentences.layout.groups and moved.tokens == batch.tokens
    assert [*moved.tasks] == [*batch.tasks] and moved.sentences.layout.mask is not None
    pairs = [(moved.sentences.layout, expected.sentences.layout), (moved.sentences, expected.sentences)]
    for found, wanted in [*pairs, *zip(moved.tasks.values(), expected.tasks.values())]:
        for name, value in vars(wanted).items():
            own = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert own.dtype == value.dtype and torch.equal(own, value)
                assert own.untyped_storage().data_ptr() == packed.buffer.untyped_storage().data_ptr()
            elif name != "layout":
                assert own == value


def test_a_batch_moves_whole_and_by_one_copy():
    batch = build([3, 4], [5], 0)
    packed, moved = Packed.of(batch, torch.device("meta")), batch.to(torch.device("meta"))
    tensors = _by_width(moved)
    assert len(tensors) > 12 and all(tensor.device.type == "meta" for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == len(packed.buffer)
    assert moved.sentences.layout.mask.shape == (6, 1, 1, 5)
    assert batch.to(torch.device("cpu")) is batch
