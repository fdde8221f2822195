"""A small corpus for the three tasks, generated from a seed: no files, no network, the same on every machine.

The sentences come from a compact grammar and are harder than they look: sentiment turns on negation, degree and
contrast; questions that differ share words, and paraphrases share few; similarity is graded by which parts of an event
differ and how much. It serves first steps, tests and measurements of the program, and stands for no benchmark.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from minbert.data.errors import DataError
from minbert.data.sources.examples import Examples
from minbert.data.task import SPLITS, Split, Task

SIZES: dict[str, dict[Split, int]] = {
    "sst": {"train": 2000, "dev": 400, "test": 400},
    "quora": {"train": 4000, "dev": 500, "test": 500},
    "sts": {"train": 2000, "dev": 400, "test": 400},
}

T = TypeVar("T")
Labelled = tuple[tuple[str, ...], float]  # the sentences of a row, and its label


def builtin_examples(task: Task, split: Split, seed: int = 0) -> Examples:
    """One split of the corpus of `seed`, of `SIZES` rows, without labels in the test split.

    No row occurs in two splits, nor twice, nor does a pair with its sentences exchanged. Raises DataError for a task
    that the corpus does not have.
    """
    name = task.builtin
    if name is None:
        raise DataError(f"the builtin corpus has the tasks {', '.join(SIZES)}, not {task.name}")
    start = 0
    for each in SPLITS[: SPLITS.index(split)]:
        start += SIZES[name][each]
    # Labels were drawn in turn; in this order an evenly spread sub-sample would see some of them only.
    rng = random.Random(f"minbert/{seed}/{name}/{split}")
    rows = sorted(_corpus(name, seed)[start : start + SIZES[name][split]], key=lambda _: rng.random())
    return Examples(
        task,
        split,
        "builtin",
        [f"{name}-{split}-{row:05d}" for row in range(len(rows))],
        tuple(list(column) for column in zip(*(sentences for sentences, _ in rows), strict=True)),
        None if split == "test" else np.array([label for _, label in rows], dtype=np.float32),
    )


@lru_cache(maxsize=8)
def _corpus(name: str, seed: int) -> list[Labelled]:
    """Distinct (sentences, label) for all splits end to end, the labels of each stretch balanced."""
    rng = random.Random(f"minbert/{seed}/{name}")  # a string seeds through SHA-512, not through hash()
    draw = {"sst": _review, "quora": _questions, "sts": _events}[name]
    seen: set[tuple[str, ...]] = set()
    rows: list[Labelled] = []
    while len(rows) < sum(SIZES[name].values()):
        sentences, label = draw(rng, len(rows))
        key = tuple(sorted(sentences))
        if key not in seen:
            seen.add(key)
            rows.append((sentences, label))
    return rows


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Python promises the same sequence from random() alone, not from choice() and its kin.
    return options[int(rng.random() * len(options))]


def _other(rng: random.Random, options: Sequence[T], current: T) -> T:
    return _pick(rng, [option for option in options if option is not current])


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _concepts(text: str) -> list[list[str]]:
    """Concepts apart by ";", the wordings of each by "/"."""
    return [[wording.strip() for wording in concept.split("/")] for concept in text.split(";")]


# Sentiment: clauses of grade -2..2, combined by "and" and contrast -------------------------------------------------

_ADJECTIVES = {
    2: _words("superb, dazzling, brilliant, masterful, stunning, exhilarating, unforgettable, flawless, magnificent"),
    1: _words("enjoyable, charming, decent, likeable, pleasant, solid, amusing, engaging, watchable, warm, clever"),
    0: _words("conventional, familiar, unremarkable, routine, average, standard, ordinary, typical, old-fashioned"),
    -1: _words("dull, uneven, clumsy, flimsy, bland, tedious, predictable, sluggish, muddled, thin, stale"),
    -2: _words("atrocious, unbearable, dreadful, abysmal, excruciating, horrendous, worthless, appalling"),
}
_NEGATED = {2: -1, 1: -1, -1: 1, -2: 0}  # "not brilliant" blames, "not dreadful" hardly praises
_ASPECTS = _words(
    "the script, the acting, the direction, the dialogue, the pacing, the plot, the cast, the camera work, the humor, "
    "the ending, the soundtrack, the first half, the leading man, the leading lady, the story, the film, the romance"
)
_GENRES = _words("thriller, comedy, drama, western, documentary, love story, satire, sequel, remake, horror film")
_VERBS = [("is", "is not"), ("feels", "does not feel"), ("seems", "does not seem"), ("looks", "never looks")]
_INTENSIFIERS = _words("really, truly, remarkably, wonderfully, exceptionally, thoroughly")
_DAMPERS = _words("somewhat, mildly, slightly, rather")
_CONTRASTS = ("although {a} , {b} .", "{b} , even though {a} .", "{a} , but {b} .", "for all that {a} , {b} .")
_OPENINGS = _words("by the final reel, in the end, as always, from the first scene on, this time around, once again")


def _review(rng: random.Random, row: int) -> Labelled:
    wanted = row % 5 - 2
    while True:
        first, second = _pick(rng, _ASPECTS), _pick(rng, _ASPECTS)
        text, grade = _clause(rng, None if rng.random() < 0.2 else first)
        other, other_grade = _clause(rng, second)
        form = rng.random()
        if form < 0.35:
            text = f"{_pick(rng, _OPENINGS)} , {text} ." if form < 0.15 else f"{text} ."
        elif first is second:
            continue
        elif form < 0.65 and abs(grade - other_grade) == 1:  # alike: the stronger clause decides
            text, grade = f"{text} and {other} .", max(grade, other_grade, key=abs)
        elif form >= 0.65 and grade * other_grade <= 0 and grade != other_grade:  # the main clause decides
            text, grade = _pick(rng, _CONTRASTS).format(a=text, b=other), other_grade
        else:
            continue
        if grade == wanted:
            break
    if rng.random() < 0.06:  # annotators differ by a grade now and then
        grade = max(-2, min(2, grade + _pick(rng, (-1, 1))))
    return (text,), float(grade + 2)


def _clause(rng: random.Random, subject: str | None) -> tuple[str, int]:
    """A clause about an aspect of the film, or the film as a whole, and its grade -2..2."""
    grade = _pick(rng, (-2, -1, 0, 1, 2))
    adjective, degree = _pick(rng, _ADJECTIVES[grade]), rng.random()
    negated = grade != 0 and degree < 0.25
    if negated:
        grade = _NEGATED[grade]
    elif abs(grade) == 1 and degree < 0.5:
        adjective, grade = f"{_pick(rng, _INTENSIFIERS)} {adjective}", 2 * grade
    elif abs(grade) == 2 and degree < 0.5:
        adjective, grade = f"{_pick(rng, _DAMPERS)} {adjective}", grade // 2
    if subject is None:
        article = "an" if adjective[0] in "aeiou" else "a"
        return f"it is {'not ' if negated else ''}{article} {adjective} {_pick(rng, _GENRES)}", grade
    return f"{subject} {_pick(rng, _VERBS)[negated]} {adjective}", grade


# Paraphrase: a question is (intent, topic, circumstance), each of which has several wordings -----------------------

_INTENTS = _concepts(
    "How can I learn {x}{c}?/What is the best way to study {x}{c}?/How does a beginner get started with {x}{c}?;"
    "How much does {x} cost{c}?/What is the price of {x}{c}?/Is {x} expensive{c}?;"
    "How long does it take to get good at {x}{c}?/How many months of practice does {x} need{c}?;"
    "Why do people love {x}{c}?/What makes {x} so popular{c}?/What is the appeal of {x}{c}?;"
    "What are the dangers of {x}{c}?/How risky is {x}{c}?/Can {x} be harmful{c}?;"
    "What are the benefits of {x}{c}?/Is {x} good for you{c}?/How does one profit from {x}{c}?;"
    "What equipment does {x} require{c}?/Which tools do I need for {x}{c}?/What should I buy for {x}{c}?;"
    "Which books about {x} are worth reading{c}?/What should I read to understand {x}{c}?;"
    "Can I earn a living from {x}{c}?/How do I make money with {x}{c}?/Is {x} a realistic career{c}?;"
    "Who invented {x}{c}?/What is the history of {x}{c}?/Where does {x} come from{c}?;"
    "What are common mistakes in {x}{c}?/What do people get wrong about {x}{c}?;"
    "How do I stay motivated for {x}{c}?/How can I keep going with {x}{c}?/I get bored of {x}{c}, what helps?"
)
_TOPICS = [
    _concepts("running/jogging; weight lifting/strength training; biking/cycling; hiking/trekking; swimming; boxing"),
    _concepts("programming/coding; machine learning/statistical learning; web design/making websites; data analysis"),
    _concepts("cooking/preparing food; baking/making bread; brewing/making beer; gardening/growing plants; fishing"),
    _concepts("photography/taking photos; drawing/sketching; pottery/ceramics; film making/shooting movies; sewing"),
    _concepts(
        "investing/buying stocks; bookkeeping/accounting; marketing/advertising; public speaking/giving speeches"
    ),
    _concepts("French; Spanish; Mandarin/Chinese; sign language; chess; poker; the guitar; the piano; meditation/yoga"),
]
_CIRCUMSTANCES = _concepts(
    "in India; at home/without leaving the house; as a student/while at college; in the United States/in the US;"
    "at work; in Canada; after the age of 40/in my forties; on a small budget/with little money;"
    "in winter/in the cold season; without a teacher/on my own; in the United Kingdom/in the UK;"
    "before an exam; as a woman; with two small children"
)


def _questions(rng: random.Random, row: int) -> Labelled:
    positive = row * 38 % 100 < 38
    intent, cluster = _pick(rng, _INTENTS), _pick(rng, _TOPICS)
    topic, wording = _pick(rng, cluster), _pick(rng, intent)
    circumstance = _pick(rng, _CIRCUMSTANCES) if rng.random() < 0.6 else [""]
    first = second = _ask(rng, wording, topic, circumstance)
    while second == first:
        kind = rng.random()
        if positive:
            second = _ask(rng, _pick(rng, intent), topic, circumstance)
        elif kind < 0.35:  # another topic, often in the very same words
            again = wording if rng.random() < 0.3 else _pick(rng, intent)
            second = _ask(rng, again, _other(rng, cluster, topic), circumstance)
        elif kind < 0.65:  # another question about the same
            second = _ask(rng, _pick(rng, _other(rng, _INTENTS, intent)), topic, circumstance)
        elif kind < 0.75:  # another circumstance
            second = _ask(rng, _pick(rng, intent), topic, _other(rng, _CIRCUMSTANCES, circumstance))
        else:
            elsewhere = _pick(rng, _other(rng, _TOPICS, cluster))
            second = _ask(rng, _pick(rng, _other(rng, _INTENTS, intent)), elsewhere, circumstance)
    label = positive != (rng.random() < 0.03)  # Quora's own labels are noisy as well
    return (first, second), float(label)


def _ask(rng: random.Random, wording: str, topic: list[str], circumstance: list[str]) -> str:
    place = _pick(rng, circumstance)
    return wording.format(x=_pick(rng, topic), c=f" {place}" if place else "")


# Similarity: an event is who does what to what, where and when; a second one differs in some of it -----------------

_SUBJECTS = [
    _concepts("a man/a guy; a woman/a lady; a boy/a young boy; a girl/a young girl; an old man/an elderly man"),
    _concepts("a group of people/several people; two children/two kids; a couple; some students; three friends"),
    _concepts("a soldier/a trooper; a police officer/a policeman; a doctor/a physician; a teacher; a farmer; a nurse"),
]
_SCENES = [  # verbs, and the objects that go with each of them
    [_concepts(part) for part in scene.split("|")]
    for scene in (
        "eating/having; cooking/preparing; slicing/cutting up; serving"
        "| a pizza; some soup; some bread; an apple; potatoes; an onion; a fish; shrimps/prawns; some meat/beef",
        "playing/performing on; tuning/adjusting; holding"
        "| a guitar; a violin/a fiddle; a flute; a piano/a keyboard; a trumpet; drums/the drums",
        "driving/steering; repairing/fixing; washing/cleaning; parking"
        "| a car/an automobile; a truck/a lorry; a motorcycle/a motorbike; a bus; a tractor; a van",
        "reading/looking at; writing/composing; burning/setting fire to; hiding"
        "| a letter/a note; a book/a novel; a newspaper/a paper; a report/an account; a poem; a map",
        "carrying/hauling; painting; buying/purchasing; building/constructing; selling"
        "| a table; a chair/a seat; a box/a crate; a boat/a ship; a fence; a bench; a ladder; a wooden door",
    )
]
_PLACES = _concepts(
    "in the park; in the kitchen; on the street/on the road; at the beach/on the shore; in a garden/in a yard;"
    "at school; near the river; in front of the house; in the forest/in the woods; on a stage; at the market"
)
_TIMES = _concepts(
    "in the morning/before noon; at night/after dark; on Sunday; on Monday; today; in summer; every day/daily"
)
_COSTS = (1.3, 1.4, 1.3, 0.7, 0.3)  # of a difference in subject, verb, object, place, time


def _events(rng: random.Random, row: int) -> Labelled:
    group, scene = _pick(rng, _SUBJECTS), _pick(rng, _SCENES)
    slots = [group, *scene, _PLACES, _TIMES]
    event = [_pick(rng, slot) for slot in slots]
    other, similarity = list(event), 5.0
    draws = [rng.random() for _ in slots]
    changed = sorted(range(5), key=draws.__getitem__)[: row % 6]
    # A related subject (of the same group), verb or object (of the same scene) costs half.
    related = {part for part in (0, 1, 2) if rng.random() < 0.5}
    if {1, 2} <= set(changed) and not {1, 2} <= related:
        related -= {1, 2}
        slots[1:3] = _other(rng, _SCENES, scene)
    else:
        related |= {1, 2}
    if 0 not in related:
        slots[0] = _other(rng, _SUBJECTS, group)
    for part in changed:
        other[part] = _other(rng, slots[part], event[part])
        similarity -= _COSTS[part] * (0.5 if part in related else 1.0)
    first = second = _tell(rng, event)
    for _ in range(8):  # where no word has a synonym, the same event may come out in the same words
        second = _tell(rng, other)
        if second != first:
            break
    noise = _pick(rng, (-0.4, -0.2, -0.2, 0.0, 0.0, 0.0, 0.2, 0.2, 0.4))
    return (first, second), max(0, min(25, round((similarity + noise) * 5))) / 5


def _tell(rng: random.Random, event: list[list[str]]) -> str:
    subject, verb, object_, place, time = (_pick(rng, wordings) for wordings in event)
    be = "are" if subject.split()[0] in ("two", "three", "some", "several") else "is"
    form = rng.random()
    if form < 0.25:  # time and place are left out at random: less is said, nothing else
        text = f"{subject} {be} {verb} {object_} {place}"
    elif form < 0.4:
        text = f"{place} {subject} {be} {verb} {object_} {time}"
    else:
        text = f"{subject} {be} {verb} {object_} {place} {time}"
    return text[0].upper() + text[1:] + "."
