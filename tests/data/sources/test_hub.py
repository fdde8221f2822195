"""Data sets of the Hugging Face library: saved to disk for the real reader, the hub itself replaced by its failures."""

import sys

import numpy as np
import pytest
from known_tasks import QUORA, SST, STS

from minbert.data.errors import DataError, UserError
from minbert.data.sources.examples import BadRow
from minbert.data.sources.loading import load_examples

datasets = pytest.importorskip("datasets", reason="the optional library `datasets` is not installed")

GLUE = {"question1": ["a", "b", "c"], "question2": ["d", " e ", "f"], "idx": [10, 11, 12]}


def save(directory, task, **splits):
    dataset = datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()})
    dataset.save_to_disk(str(directory / task.name))
    return f"hub:{directory}"


def test_the_hub_names_are_understood(tmp_path):
    source = save(
        tmp_path,
        QUORA,
        train=GLUE | {"label": [0, 1, 1]},
        validation=GLUE | {"label": [1, 0, 0]},
        test=GLUE | {"label": [-1, -1, -1]},
    )
    train = load_examples(source, QUORA, "train")
    assert train.ids == ["10", "11", "12"]
    assert train.sentences == (["a", "b", "c"], ["d", "e", "f"])
    assert train.labels.dtype == np.float32
    assert train.labels.tolist() == [0, 1, 1]
    assert load_examples(source, QUORA, "dev").labels.tolist() == [1, 0, 0]
    assert load_examples(source, QUORA, "test").labels is None


def test_our_own_names_are_understood(tmp_path):
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    labelled = columns | {"similarity": [0.25, 5.0], "id": ["X1", "X2"]}
    source = save(tmp_path, STS, train=labelled, dev=labelled, test=columns)
    assert load_examples(source, STS, "dev").ids == ["x1", "x2"]
    assert load_examples(source, STS, "dev").labels.tolist() == [0.25, 5.0]
    test = load_examples(source, STS, "test")
    assert test.ids == ["0", "1"]
    assert test.labels is None


def test_a_labelled_test_split_keeps_its_labels_and_array_formats_do_not_matter(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [4, 0]}).with_format("numpy")
    datasets.DatasetDict(test=dataset).save_to_disk(str(tmp_path / "sst"))
    examples = load_examples(f"hub:{tmp_path}", SST, "test")
    assert examples.labels.tolist() == [4, 0]
    assert examples.sentences == (["good", "bad"],)


def test_bad_rows(tmp_path):
    columns = {"text": ["good", None, "bad", "fine"], "label": [-1, 2, 7, 3]}
    source = save(tmp_path, SST, train=columns)
    reasons = ["label -1 is outside 0..4", "sentence is empty", "label 7 is outside 0..4"]
    with pytest.raises(DataError, match=r"3 of 4 rows of sst train are bad\n  train:0: label -1 is outside 0\.\.4"):
        load_examples(source, SST, "train")
    examples = load_examples(source, SST, "train", "skip")
    assert examples.ids == ["3"]
    assert examples.skipped == [BadRow(f"train:{row}", reason) for row, reason in enumerate(reasons)]


def test_what_is_missing_is_named(tmp_path):
    source = save(tmp_path, SST, train={"text": ["good"], "stars": [4]})
    with pytest.raises(DataError, match=r"no column 'sentiment' \(or 'label'\); its columns are text, stars"):
        load_examples(source, SST, "train")
    with pytest.raises(DataError, match="no split 'validation'; its splits are train"):
        load_examples(source, SST, "dev")
    with pytest.raises(DataError, match=r"sts does not exist; .*save_to_disk.*'builtin'"):
        load_examples(source, STS, "train")
    (tmp_path / "sts").mkdir()
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        load_examples(source, STS, "train")
    datasets.Dataset.from_dict({"text": ["good"], "label": [1]}).save_to_disk(str(tmp_path / "quora"))
    with pytest.raises(DataError, match="not a DatasetDict"):
        load_examples(source, QUORA, "train")


def test_the_hub_is_asked_for_the_declared_data_set(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_dict(GLUE | {"label": [0, 1, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples("hub", QUORA, "dev")
    assert asked == [("nyu-mll/glue", "qqp", "validation")]
    assert examples.source == "nyu-mll/glue (qqp)"


def test_an_unreachable_hub_is_explained_in_one_line(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'SetFit/sst5' on the Hub\nmore detail")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        load_examples("hub", SST, "dev")
    message = str(error.value)
    assert message.startswith("SetFit/sst5, split validation, could not be had from the hub: ConnectionError: Couldn't")
    assert "hub:DIR" in message
    assert "\n" not in message
    assert error.value.__suppress_context__


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'minbert\[hub\]'"):
        load_examples("hub", SST, "train")
