"""What the filters drop and keep, and the pieces that they are made of, against references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.augmentation.filters import (
    FILTERS,
    FilterOptions,
    first_objection,
    names,
    numbers,
    plain,
    unknown_words,
    unmark,
)

ALL = FilterOptions()
TEXT = st.text(alphabet="abAB 12.,'é", max_size=25)


@given(TEXT)
def test_a_text_itself_is_always_dropped(text):
    assert first_objection(text, text, ALL) in ("empty", "equal")
    assert first_objection(text, f"  {text.upper()}!", ALL) in ("empty", "equal", "numbers", "names")


@given(TEXT, TEXT)
def test_filters_that_are_off_drop_nothing(text, back):
    assert first_objection(text, back, FilterOptions(names=())) is None
    for name in FILTERS:
        assert first_objection(text, back, FilterOptions(names=(name,))) in (None, name)


@given(TEXT, TEXT)
def test_the_first_filter_that_drops_alone_drops_together(text, back):
    alone = [name for name in FILTERS if first_objection(text, back, FilterOptions(names=(name,)))]
    assert first_objection(text, back, ALL) == (alone[0] if alone else None)


@pytest.mark.parametrize(
    ("reason", "text", "back"),
    [
        ("empty", "A man sings.", " . "),
        ("unknown", "The woman puts on lipstick.", "The woman puts *pintalabios."),
        ("unknown", "The woman puts on lipstick.", "The woman #put lipstick on."),
        ("equal", "A man, singing.", "a man singing"),
        ("equal", "A café.", "A cafe"),
        ("copy", "A man is walking his dog on the sunny beach.", "A man is walking his dog in the sunny beach."),
        ("length", "A dog runs.", "It is a dog that in this very moment runs."),
        ("numbers", "It rose 3.5 percent to 1,200 points.", "It ascended to 1,200 points, or 35 percent."),
        ("numbers", "Ten sheep look at it.", "Owe sheep watch this."),
        ("names", "He said that Bush would speak to reporters.", "He told that Shrub will talk with journalists."),
        ("leakage", "A man is speaking.", "A man is talking!"),
        (None, "A man is playing a large flute.", "A man is touching a big flute."),
        (None, "Someone met Kalmaegi there.", "Somebody encountered *Kalmaegi in that place."),
        (None, "It fell 3 percent.", "It descended three for each hundred."),
        (None, "Two men met.", "2 gentlemen encountered themselves."),
        (None, "Syria Peace Dashed as Deadline Passes", "The peace in Syria fails when the term ends"),
    ],
)
def test_what_is_dropped_and_why(reason, text, back):
    options = FilterOptions(max_copy=0.92, forbidden=frozenset([plain("A man is talking.")]))
    assert first_objection(text, back, options) == reason


@given(TEXT)
def test_nothing_is_unknown_in_a_text_of_its_own_words(text):
    marked = " ".join(f"*{word}" for word in text.split())
    assert unknown_words(text, marked) == []
    assert plain(unmark(text, marked)) == plain(text)


def test_marks_go_and_what_was_written_so_stays():
    assert unmark("@user is #3", "@user *is the #3 of *foo") == "@user is the #3 of foo"
    assert unmark("a", "or.*s. and *bar's") == "or.s. and bar's"
    assert unmark("2*3", "2*3") == "2*3"


def test_a_text_may_be_of_any_length():
    """What a filter does is proportional to the text's length, or the band of the edits that it allows."""
    text = "Then Anna saw *two Dogs. " * 30_000
    assert unmark(text, text) == text
    assert names(text) == {"anna", "dogs"} and numbers(text) == {"2": 30_000}
    assert first_objection(text, text.replace("saw", "sees"), ALL) is None
    assert first_objection(text, text.removesuffix("Dogs. ") + "cats.", ALL) == "copy"


def test_numbers_and_names():
    assert numbers("1,000 of 2,5 in two or 2") == {"1000": 1, "2,5": 1, "2": 2}
    assert names("But Jodie Meyers, Stacy Young's sister, said so. Then I left.") == {
        "jodie",
        "meyers",
        "stacy",
        "young",
    }
    assert names("Iraq Said to Release Hezbollah Operative") == set()
