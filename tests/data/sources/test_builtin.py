"""The generated corpus: the same everywhere, its splits apart, its labels learnable by words but not by words alone."""

import os
import subprocess
import sys

import numpy as np
import pytest
from known_tasks import CFIMDB, TASKS

from minbert.data.errors import DataError
from minbert.data.sources.builtin import SIZES, builtin_examples
from minbert.data.sources.examples import fingerprint, limit
from minbert.data.sources.loading import load_examples
from minbert.data.task import SPLITS

# A change here changes every figure measured on the corpus.
FINGERPRINTS = {"sst": "9f6c6f16255f7d2e", "quora": "ca9082e50e27245b", "sts": "80ca1c4c4b92a77a"}


@pytest.mark.parametrize("name", SIZES)
def test_rows_are_well_formed_and_splits_disjoint(name):
    task, seen = TASKS[name], set()
    for split in SPLITS:
        examples = load_examples("builtin", task, split)
        rows = [tuple(sorted(sentences)) for sentences in zip(*examples.sentences, strict=True)]
        assert len(rows) == len(set(rows)) == len(set(examples.ids)) == SIZES[name][split]
        assert all(len(row) == len(task.sentences) and all(text == text.strip() != "" for text in row) for row in rows)
        assert seen.isdisjoint(rows)
        seen.update(rows)
        if split == "test":
            assert examples.labels is None
        else:
            low, high = task.label_range
            assert examples.labels.dtype == np.float32
            assert low <= examples.labels.min() < examples.labels.max() <= high
            if task.kind != "regression":
                assert np.array_equal(examples.labels, np.round(examples.labels))


@pytest.mark.parametrize("name", SIZES)
def test_corpus_is_pinned_and_depends_on_the_seed(name):
    train = builtin_examples(TASKS[name], "train")
    assert fingerprint(train)[:16] == FINGERPRINTS[name]
    assert train.sentences != builtin_examples(TASKS[name], "train", seed=1).sentences


def test_corpus_is_the_same_in_another_process():
    program = (
        "from minbert.data.sources.builtin import *; from minbert.data.sources.examples import *\n"
        "from minbert.data.task import *\n"
        "print(*(fingerprint(builtin_examples(resolve_task(name), 'dev', 3)) for name in SIZES))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == [fingerprint(builtin_examples(TASKS[name], "dev", 3)) for name in SIZES]


def test_labels_are_balanced_even_in_a_small_sample():
    for rows in (2000, 200):
        counts = np.bincount(limit(builtin_examples(TASKS["sst"], "train"), rows).labels.astype(int), minlength=5)
        assert counts.max() < 0.3 * rows
        assert counts.min() > 0.1 * rows
        assert 0.3 < limit(builtin_examples(TASKS["quora"], "train"), rows).labels.mean() < 0.46
        assert limit(builtin_examples(TASKS["sts"], "train"), rows).labels.std() > 1.3


def words(text: str) -> set[str]:
    return set(text.lower().strip("?.").split())


def features(examples, vocabulary: dict[str, int]) -> np.ndarray:
    """Bag of words of a sentence; for a pair the words that differ, those that are shared, and their proportion."""
    matrix = np.zeros((len(examples), 2 * len(vocabulary) + 2), np.float32)
    matrix[:, -1] = 1
    for row, sentences in enumerate(zip(*examples.sentences, strict=True)):
        bags = [words(text) for text in sentences]
        shared = set.intersection(*bags)
        for word in set.union(*bags) & vocabulary.keys():
            matrix[row, vocabulary[word] + len(vocabulary) * (word in shared)] = 1
        matrix[row, -2] = len(shared) / len(set.union(*bags))
    return matrix


@pytest.mark.parametrize(("name", "low", "high"), [("sst", 0.5, 0.85), ("quora", 0.65, 0.9), ("sts", 0.7, 0.95)])
def test_a_linear_model_of_words_beats_chance_and_is_not_perfect(name, low, high):
    task = TASKS[name]
    train, dev = builtin_examples(task, "train"), builtin_examples(task, "dev")
    known = sorted(set().union(*(words(text) for column in train.sentences for text in column)))
    vocabulary = {word: i for i, word in enumerate(known)}
    x, x_dev = features(train, vocabulary), features(dev, vocabulary)
    targets = np.eye(5)[train.labels.astype(int)] if name == "sst" else train.labels[:, None]
    weights = np.linalg.solve(x.T @ x + 3 * np.eye(x.shape[1]), x.T @ targets)
    predictions = x_dev @ weights
    if name == "sst":
        score = (predictions.argmax(1) == dev.labels).mean()
    elif name == "quora":
        score = ((predictions[:, 0] > 0.5) == dev.labels).mean()
    else:
        score = np.corrcoef(predictions[:, 0], dev.labels)[0, 1]
    assert low < score < high


def test_other_tasks_are_refused():
    with pytest.raises(DataError, match="sst, quora, sts, not cfimdb"):
        load_examples("builtin", CFIMDB, "train")
