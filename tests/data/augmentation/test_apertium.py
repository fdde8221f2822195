"""Apertium, where it is installed: a long-lived pipeline whose answers depend on their sentence alone."""

import os
import shutil
import signal

import psutil
import pytest
from waiting import until

from minbert.data.augmentation.apertium import DATA, Apertium
from minbert.data.augmentation.recipe import Decoding
from minbert.data.augmentation.round_trip import RoundTrip, recipes
from minbert.data.errors import UserError

pytestmark = pytest.mark.skipif(
    not shutil.which("apertium") or not (DATA / "modes" / "eng-spa.mode").exists(),
    reason="Apertium is not installed: apt-get install apertium apertium-eng-spa",
)

SENTENCES = [
    "A man is playing a large flute.",
    "China and Taiwan hold historic talks",
    "Someone is riding a horse.",
    "The woman is putting on lipstick .",
    "No full stop",
]


@pytest.fixture
def translator():
    opened = Apertium("en").open()
    yield opened
    opened.close()


def test_it_translates(translator):
    there = translator.translate_sentences(SENTENCES, "en", "es")
    assert there[0] == "Un hombre está tocando una flauta grande."
    assert translator.translate_sentences(there[:1], "es", "en") == ["A man is touching a big flute."]


def test_an_answer_depends_on_its_sentence_alone(translator):
    together = translator.translate_sentences(SENTENCES, "en", "es")
    assert [translator.translate_sentences([text], "en", "es")[0] for text in SENTENCES] == together
    assert translator.translate_sentences(SENTENCES[::-1], "en", "es") == together[::-1]


@pytest.mark.parametrize(
    "text", ["a [b] {c} ^d$ / e\\f <g> @h", "*x #1 ~y +z", "x\0y", "line\nbreak", "", "  ", "100 %", "]["]
)
def test_special_characters_do_no_harm(translator, text):
    before, found, after = translator.translate_sentences(["A dog.", text, "A dog."], "en", "es")
    assert before == after == "Un perro."
    assert "\0" not in found and "\n" not in found
    assert {character for character in found if character in "[]{}^$/\\<>@*#"} <= set(text)


def test_words_that_are_left_over_are_marked_on_the_way_back(translator):
    (there,) = translator.translate_sentences(["The man met Kalmaegi"], "en", "es")
    assert "*" not in there
    (back,) = translator.translate_sentences([there], "es", "en")
    assert "*Kalmaegi" in back


def test_programs_that_die_are_started_again(translator):
    expected = translator.translate_sentences(SENTENCES, "en", "es")
    (pipe,) = translator._pipes.values()
    os.killpg(pipe.process.pid, signal.SIGKILL)
    assert translator.translate_sentences(SENTENCES, "en", "es") == expected


def test_a_sentence_that_kills_them_costs_itself_only(translator):
    translator.translate_sentences(["A dog."], "en", "es")
    (pipe,) = translator._pipes.values()
    ask = pipe._ask

    def dying(sentences):
        """As if one of the programs died of the word `deadly`."""
        place = next((index for index, text in enumerate(sentences) if "deadly" in text), None)
        if place is None:
            return ask(sentences)
        answers = ask(sentences[:place]) if place else []
        pipe.close()
        return answers

    pipe._ask = dying
    assert pipe(["A dog.", "deadly", "A dog.", "deadly", "A dog."]) == ["Un perro.", "", "Un perro.", "", "Un perro."]


def test_nothing_of_it_is_left_running(translator):
    translator.translate_sentences(["A dog."], "en", "es")
    (pipe,) = translator._pipes.values()
    group = pipe.process.pid
    translator.close()
    alive = {psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING}

    def left() -> list[psutil.Process]:
        members = [each for each in psutil.process_iter(["status"]) if _group(each) == group]
        return [each for each in members if each.info["status"] in alive]  # what is dead waits for init

    until(lambda: not left(), "the end of all of it", seen=left)


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_through_easynmt():
    pytest.importorskip("easynmt", reason="EasyNMT is not installed")
    model = Apertium("en")
    (recipe,) = recipes(model, "en", ["es"], Decoding(), 1)
    trip = RoundTrip(model)
    found = trip([*SENTENCES, ""], recipe)
    trip.close()
    assert list(found) == [*SENTENCES, ""]
    assert found[SENTENCES[0]] == ("Un hombre está tocando una flauta grande.", "A man is touching a big flute.")
    assert found[""] == ("", "")


def test_the_revision_is_that_of_rules_and_dictionaries():
    there, back = (Apertium("en").revision(*pair) for pair in (("en", "es"), ("es", "en")))
    assert there == Apertium("en").revision("eng", "spa") != back


def test_a_direction_that_is_not_installed_names_those_that_are():
    with pytest.raises(UserError, match=r"no direction eng-zh here; from eng it has .*spa"):
        recipes(Apertium("en"), "en", ["zh"], Decoding(), 1)
    with pytest.raises(UserError, match="cannot draw"):
        recipes(Apertium("en"), "en", ["es"], Decoding(sample=True), 1)
