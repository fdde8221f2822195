"""Joint pairs: `[CLS] a [SEP] b [SEP]` made of cached tokens is what transformers makes of the texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_tasks import QUORA, SST, STS
from transformers import BertTokenizer

from minbert.data.batches.batch import Portion, make_batch
from minbert.data.batches.plan import share
from minbert.data.sequences.pairs import cut, join
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.tokens import load_tokenizer, tokenise
from minbert.data.sources.examples import Examples

WORDS = ("", "cat", "unbelievably", "What's up?", "Ünïcode 漢字", "a b c d e f g", "antidisestablishment!", "x" * 120)
TEXT = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def theirs(minilm) -> BertTokenizer:
    return BertTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def ours(minilm):
    return load_tokenizer(minilm)


def examples(*pairs: tuple[str, str], task=QUORA) -> Examples:
    columns = tuple([pair[side] for pair in pairs] for side in (0, 1))
    return Examples(task, "train", "", [str(row) for row in range(len(pairs))], columns, np.zeros(len(pairs), "f"))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.integers(8, 40))
@settings(deadline=None, max_examples=60)
def test_tokens_and_types_are_those_of_transformers(ours, theirs, pairs, max_length):
    """With and without a cut; at prediction, in both orders, each cut as if it had been written so."""
    split = tokenise(examples(*pairs), ours, max_length, joint=True)
    found = split.encode(np.arange(len(pairs)))
    assert found.sides == 1 and found.readings == 2
    for number, (first, second) in enumerate([*pairs, *((b, a) for a, b in pairs)]):
        expected = theirs(first, second, truncation="longest_first", max_length=max_length)
        own = slice(found.sequences.offsets[number], found.sequences.offsets[number + 1])
        assert found.sequences.ids[own].tolist() == expected["input_ids"], (first, second)
        assert found.types[own].tolist() == expected["token_type_ids"]
    lengths = found.sequences.lengths
    assert split.lengths.tolist() == (lengths[: len(pairs)] + lengths[len(pairs) :]).tolist()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 50))
def test_the_longer_sentence_is_cut_token_by_token(first, second, room):
    """The closed form against the loop that it stands for, and after an earlier cut to at least as much as fits."""
    a, b = first, second
    while a + b > room:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    for most in (60, room + 1, room):
        found = cut(np.array([min(first, most)]), np.array([min(second, most)]), room)
        assert (int(found[0][0]), int(found[1][0])) == (a, b)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8), st.integers(5, 25), st.integers(0, 1000))
def test_joining_keeps_the_beginnings_and_parts_them(lengths, max_length, seed):
    bodies = np.random.default_rng(seed).integers(5, 60, sum(lengths))
    sentences = [[1, *part.tolist(), 2] for part in np.split(bodies, np.cumsum(lengths)[:-1])]
    column = Ragged(np.concatenate([np.array(each) for each in sentences]), ends([np.array(lengths) + 2]))
    first, second = np.random.default_rng(seed).integers(0, len(lengths), (2, 5))
    pairs, types = join(column, first, second, max_length)
    for number, (a, b) in enumerate(zip(first, second)):
        own = slice(pairs.offsets[number], pairs.offsets[number + 1])
        ids, kinds = pairs.ids[own].tolist(), types[own].tolist()
        parted = ids.index(2)
        assert len(ids) == min(lengths[a] + lengths[b] + 3, max_length) and kinds == sorted(kinds)
        assert ids[:parted] == sentences[a][:parted] and kinds.count(0) == parted + 1
        assert [1, *ids[parted + 1 : -1]] == sentences[b][: len(ids) - parted - 1] and ids[-1] == 2


def test_what_cannot_hold_two_tokens_is_refused():
    with pytest.raises(ValueError, match="must leave room for"):
        join(Ragged(np.array([1, 7, 2]), np.array([0, 3])), np.array([0]), np.array([0]), 4)


def test_a_symmetric_pair_is_trained_in_a_drawn_order_and_another_as_written(ours):
    pairs = [(f"cat {number}", f"a longer dog {number}") for number in range(64)]
    split = tokenise(examples(*pairs), ours, 32, joint=True)
    rows = np.random.default_rng(0).permutation(64)

    def sequences(split: TokenisedSplit, places: np.ndarray, step: int = 0) -> list[list[int]]:
        batch = make_batch({"quora": split}, {"quora": Portion(rows[places], places, 64)}, draw=(3, step))
        assert batch.tasks["quora"].readings == 1
        layout, ids = batch.sentences.layout, batch.sentences.input_ids
        return [ids[layout.sequence == number].tolist() for number in range(len(layout))]

    whole = sequences(split, np.arange(64))
    both = split.encode(rows).sequences
    alone = [both.take(np.array([number])).ids.tolist() for number in range(128)]
    written, turned = alone[:64], alone[64:]
    assert all(one in (a, b) for one, a, b in zip(whole, written, turned))
    assert 16 < sum(one == a for one, a in zip(whole, written)) < 48
    assert sequences(split, np.arange(64), step=1) != whole
    shared = [share(share(np.arange(64), part, 3), rank, 4) for part in range(3) for rank in range(4)]
    assert [pair for places in shared for pair in sequences(split, places)] == whole
    fixed = tokenise(examples(*pairs, task=QUORA.model_copy(update={"symmetric": False})), ours, 32, joint=True)
    assert sequences(fixed, np.arange(64)) == written
    assert fixed.encode(rows).readings == 1 and (fixed.lengths * 2 == split.lengths).all()


def test_single_sentences_stay_as_they_are(ours):
    one = Examples(SST, "train", "", ["0"], (["a film"],), np.zeros(1, "f"))
    assert tokenise(one, ours, 32, joint=True).joint is None
    assert tokenise(examples(("a", "b"), task=STS), ours, 32).joint is None


def test_both_encodings_share_the_cache(ours, tmp_path):
    pair = examples(("one cat", "two dogs"))
    plain, joint = (tokenise(pair, ours, 32, tmp_path, joint) for joint in (False, True))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plain.columns, joint.columns))
