"""What masking hides: whole words, the share that was asked for, never a special token, and the same wherever it is
drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minbert.data.sequences.masking import Masking, evaluation_key, training_key, uniform

# A vocabulary of 60: five special tokens, of which 4 is [MASK], and every third of the others continues a word.
SIZE, SPECIAL, CLS, SEP, MASK = 60, 5, 2, 3, 4
CONTINUATION = (np.arange(SIZE) >= SPECIAL) & (np.arange(SIZE) % 3 == 0)


def masking(**more) -> Masking:
    return Masking(MASK, np.arange(SIZE) < SPECIAL, CONTINUATION, **more)


@st.composite
def batches(draw):
    """Sentences as the tokenizer gives them, with unknown words amid them and cuts inside of words."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return [[CLS, *rng.integers(0, SIZE, length).tolist(), SEP] for length in lengths]


def flat(sentences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([token for each in sentences for token in each]), np.array([len(each) for each in sentences])


def words(sentence: list[int], whole: bool = True) -> list[list[int]]:
    """The places of each word's tokens, as one would write it without arrays."""
    found: list[list[int]] = []
    for place, token in enumerate(sentence):
        if token < SPECIAL:
            continue
        if whole and CONTINUATION[token] and found and place - 1 == found[-1][-1]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@given(batches(), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.15, 0.5, 1.0]), st.booleans())
def test_words_are_hidden_whole_and_about_so_many_tokens_as_asked(sentences, seed, share, whole):
    ids, lengths = flat(sentences)
    seen, hidden = masking(share=share, whole_words=whole)(
        ids, lengths, training_key(seed, "t", 3), np.arange(len(lengths))
    )
    untouched = np.setdiff1d(np.arange(len(ids)), hidden)
    assert (seen[untouched] == ids[untouched]).all()
    assert (ids[hidden] >= SPECIAL).all()
    assert ((seen[hidden] == MASK) | (seen[hidden] >= SPECIAL)).all()
    start = 0
    for sentence in sentences:
        own = {int(place) - start for place in hidden if start <= place < start + len(sentence)}
        parts = words(sentence, whole)
        assert all(own.issuperset(part) or own.isdisjoint(part) for part in parts)
        tokens, longest = sum(map(len, parts)), max(map(len, parts), default=0)
        assert not parts or own
        # The word in whose middle the share ends is in or out as a whole.
        assert abs(len(own) - share * tokens) <= longest / 2 or len(own) <= longest
        start += len(sentence)


@given(batches(), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_what_an_example_hides_depends_on_its_place_alone(sentences, step, random):
    """However a batch is cut up and ordered: on any process, in any part of an accumulated step."""
    hide, key = masking(), training_key(1, "t", step)
    ids, lengths = flat(sentences)
    whole, hidden = hide(ids, lengths, key, np.arange(len(lengths)))
    order = list(range(len(sentences)))
    random.shuffle(order)
    ends = np.cumsum(lengths)
    for row in order:
        seen, own = hide(*flat([sentences[row]]), key, np.array([row]))
        span = slice(ends[row] - lengths[row], ends[row])
        assert (seen == whole[span]).all()
        assert (own + span.start == hidden[(hidden >= span.start) & (hidden < span.stop)]).all()


def test_shares_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    ids, lengths = flat([[CLS, *rng.integers(SPECIAL, SIZE, 98), SEP] for _ in range(2000)])
    seen, hidden = masking()(ids, lengths, training_key(0, "t", 0), np.arange(len(lengths)))
    assert len(hidden) / (98 * 2000) == pytest.approx(0.15, abs=0.002)
    is_mask, same = seen[hidden] == MASK, seen[hidden] == ids[hidden]
    assert is_mask.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / (SIZE - SPECIAL), abs=0.006)  # a random token may be the same
    replaced = seen[hidden][~is_mask & ~same]
    assert stats.chisquare(np.bincount(replaced, minlength=SIZE)[SPECIAL:]).pvalue > 1e-4  # any token, equally
    # Every place of a sentence is as likely as any other, but for the cut words at its end.
    places = np.bincount(hidden % 100, minlength=100)[1:90]
    assert stats.chisquare(places).pvalue > 1e-4


def test_steps_tasks_and_seeds_hide_other_words_and_evaluations_the_same():
    ids, lengths = flat([[CLS, *range(SPECIAL, SIZE), SEP]] * 4)

    def places(key):
        return masking()(ids, lengths, key, np.arange(4))[1].tolist()

    keys = [training_key(0, "t", 0), training_key(0, "t", 1), training_key(0, "u", 0), training_key(1, "t", 0)]
    assert len({str(places(key)) for key in [*keys, evaluation_key()]}) == 5
    assert places(evaluation_key()) == places(evaluation_key()) and places(keys[0]) == places(training_key(0, "t", 0))


def test_draws_are_uniform_and_unrelated():
    rows, columns = (grid.ravel() for grid in np.meshgrid(np.arange(300), np.arange(300), indexing="ij"))
    draws = uniform(training_key(0, "t", 0)[0], rows, columns)
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    grid = draws.reshape(300, 300)
    for other in (grid[1:, :], grid[:, 1:], grid[1:, 1:]):
        mine = grid[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(mine.ravel(), other.ravel())[0, 1]) < 0.015
    assert len(np.unique(draws)) == len(draws)


def test_a_word_that_goes_on_is_told_from_the_vocabulary(minilm):
    from minbert.data.sequences.tokens import load_tokenizer

    tokenizer = load_tokenizer(minilm)
    hide = Masking.of(tokenizer)
    ids = tokenizer.encode(["unaffable embeddings [MASK]"], 32).ids.astype(np.int64)
    tokens = [tokenizer.backend.id_to_token(int(number)) for number in ids]
    assert [hide.continuation[number] for number in ids] == [token.startswith("##") for token in tokens]
    assert {token for token, number in zip(tokens, ids) if hide.special[number]} == {"[CLS]", "[SEP]", "[MASK]"}
