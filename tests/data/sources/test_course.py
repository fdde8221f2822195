"""Reading the course's files: the real ones whole, and every way in which a file or a row can be wrong."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_tasks import QUORA, SST, STS, TASKS

from minbert.data.errors import DataError
from minbert.data.sources.course import read_course
from minbert.data.sources.examples import BadRow, Examples, fingerprint, limit
from minbert.data.sources.loading import load_examples
from minbert.data.task import SPLITS

COUNTS = {
    "sst": (8544, 541, 2210),
    "cfimdb": (1707, 125, 488),
    "quora": (61989, 10087, 10088),
    "sts": (6040, 445, 1725),
}
DEFECT = next(iter(QUORA.course.known_defects))


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def sst(folder: Path, *rows: str) -> Path:
    return write(folder, SST.course.train, "\tid\tsentence\tsentiment", *rows)


# The real files


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_are_read_whole(course_data, name):
    task = TASKS[name]
    for split, count in zip(SPLITS, COUNTS[name], strict=True):
        examples = load_examples(str(course_data), task, split)
        assert len(examples) == len(set(examples.ids)) == count
        assert [len(column) for column in examples.sentences] == [count] * len(task.sentences)
        if split == "test":
            assert examples.labels is None
        else:
            assert examples.labels.dtype == np.float32
            assert task.label_range[0] <= examples.labels.min() < examples.labels.max() <= task.label_range[1]


def test_the_defect_of_quora_dev_is_left_out_where_labelled_and_kept_where_predicted(course_data, caplog):
    assert load_examples(str(course_data), QUORA, "dev").skipped == [BadRow("quora-dev.csv:7120", "no second question")]
    assert "quora-dev.csv:7120" in caplog.text
    test = load_examples(str(course_data), QUORA, "test")
    assert test.skipped == []
    assert test.sentences[1][test.ids.index(DEFECT)] == ""


# What is read


filled = st.text().filter(str.strip)


@given(st.lists(st.tuples(filled, filled), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_any_text_survives_csv_quoting(tmp_path_factory, pairs, ending):
    folder = tmp_path_factory.mktemp("quoting")
    # With "\n" as the ending, Python's writer would leave "\r" unquoted, which no reader takes for text.
    quoting = csv.QUOTE_ALL if ending == "\n" else csv.QUOTE_MINIMAL
    with (folder / STS.course.train).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator=ending, quoting=quoting)
        writer.writerow(["", "id", "sentence1", "sentence2", "similarity"])
        for row, pair in enumerate(pairs):
            writer.writerow([row, f"id{row}", *pair, row / 2])
    examples = read_course(folder, STS, "train")
    assert list(zip(*examples.sentences, strict=True)) == [(first.strip(), second.strip()) for first, second in pairs]
    assert examples.labels.tolist() == [row / 2 for row in range(len(pairs))]


def test_ids_and_sentences_are_normalised_and_blank_lines_passed_over(tmp_path):
    sst(tmp_path, "0\t ABC \t  good \t3.0", "", '1\tdef\t"two\tparts, ""quoted"""\t 4 ', "")
    examples = read_course(tmp_path, SST, "train")
    assert examples.ids == ["abc", "def"]
    assert examples.sentences == (["good", 'two\tparts, "quoted"'],)
    assert examples.labels.tolist() == [3, 4]


def test_spreadsheet_exports_are_read(tmp_path):
    text = '\ufeff\tid\tsentence\tsentiment\r\n0\ta\t"one\r\ntwo"\t1\r\n1\tb\tthree\t2\r\n'
    (tmp_path / SST.course.train).write_text(text, encoding="utf-8", newline="")
    examples = read_course(tmp_path, SST, "train")
    assert examples.sentences == (["one\r\ntwo", "three"],)
    assert examples.labels.tolist() == [1, 2]


def test_a_test_file_may_have_labels(tmp_path):
    header = "\tid\tsentence\tsentiment"
    write(tmp_path, SST.course.test, header, "0\ta\tgood\t3")
    assert read_course(tmp_path, SST, "test").labels.tolist() == [3]
    write(tmp_path, SST.course.test, header, "0\ta\tgood\t", "1\tb\tbad\t")
    assert read_course(tmp_path, SST, "test").labels is None
    write(tmp_path, SST.course.test, header, "0\ta\tgood\t3", "1\tb\tbad\t")
    with pytest.raises(DataError, match=r"ids-sst-test-student\.csv:3: label is missing"):
        read_course(tmp_path, SST, "test")


# Bad rows

BAD = {
    "0\tx\tgood\t": "label is missing",
    "0\tx\tgood\tfive": f"label 'five' is not a number and no class ({', '.join(SST.classes)})",
    "0\tx\tgood\tnan": "label nan is not finite",
    "0\tx\tgood\t5": "label 5 is outside 0..4",
    "0\tx\tgood\t-1": "label -1 is outside 0..4",
    "0\tx\tgood\t2.5": "label 2.5 is not a whole number",
    "0\tx\t  \t2": "sentence is empty",
    "0\t \tgood\t2": "id is empty",
    "0\tFIRST\tgood\t2": "id first was given before, at ids-sst-train.csv:2",
    "0\tx\tgood": "3 fields where the header has 4",
    "0\tx\tgood\t2\t": "5 fields where the header has 4",
    '0\tx\t"good\t2\n1\ty"': "3 fields where the header has 4 (a quote spans lines 5 to 6)",
}


@pytest.mark.parametrize(("row", "reason"), BAD.items())
def test_bad_row_is_refused_or_skipped_with_its_place_and_reason(tmp_path, row, reason):
    path = sst(tmp_path, "0\tfirst\tgood\t3", '1\tsecond\t"on two\nlines"\t3', row, "9\tlast\tbad\t1")
    with pytest.raises(DataError) as refused:
        read_course(tmp_path, SST, "train")
    assert str(refused.value) == (
        f"{path}: 1 of 4 rows of sst train are bad\n  ids-sst-train.csv:5: {reason}\n"
        "Mend them, or leave them out with --bad-rows skip."
    )
    examples = read_course(tmp_path, SST, "train", "skip")
    assert examples.skipped == [BadRow("ids-sst-train.csv:5", reason)]
    assert examples.ids == ["first", "second", "last"]
    assert examples.labels.tolist() == [3, 3, 1]


def test_labels_follow_the_task(tmp_path):
    header = "\tid\tsentence1\tsentence2\t"
    write(tmp_path, STS.course.dev, header + "similarity", "0\ta\tone\ttwo\t3.333", "1\tb\tone\ttwo\t5.1")
    examples = read_course(tmp_path, STS, "dev", "skip")
    assert examples.labels.tolist() == [np.float32(3.333)]
    assert examples.skipped == [BadRow("sts-dev.csv:3", "label 5.1 is outside 0..5")]
    write(
        tmp_path,
        QUORA.course.dev,
        header + "is_duplicate",
        "0\ta\tone\t\t1.0",
        "1\tb\tone\ttwo\t0.5",
        "2\tc\td\te\t1.0",
    )
    examples = read_course(tmp_path, QUORA, "dev", "skip")
    assert [str(row) for row in examples.skipped] == [
        "quora-dev.csv:2: sentence2 is empty",
        "quora-dev.csv:3: label 0.5 is not a whole number",
    ]


def test_ten_of_many_bad_rows_are_listed(tmp_path):
    sst(tmp_path, "0\tgood\tgood\t3", *(f"{row}\tid{row}\tbad\t" for row in range(25)))
    with pytest.raises(DataError, match="25 of 26 rows") as refused:
        read_course(tmp_path, SST, "train")
    assert "ids-sst-train.csv:12: label is missing\n  and 15 more\n" in str(refused.value)
    assert "ids-sst-train.csv:13" not in str(refused.value)


@pytest.mark.parametrize("rows", [[], ["0\ta\tgood\t"]])
def test_a_split_without_a_usable_row_is_refused_whatever_the_policy(tmp_path, rows):
    sst(tmp_path, *rows)
    with pytest.raises(DataError, match="sst train has no usable row"):
        read_course(tmp_path, SST, "train", "skip")


def test_a_mended_defect_is_used(tmp_path):
    header = "\tid\tsentence1\tsentence2\tis_duplicate"
    write(tmp_path, QUORA.course.dev, header, f"0\t{DEFECT}\tone\ttwo\t0.0")
    assert read_course(tmp_path, QUORA, "dev").ids == [DEFECT]


# Bad files


def test_missing_column_is_named_with_those_found(tmp_path):
    path = write(tmp_path, SST.course.train, "\tid\tsentence\tlabel", "0\ta\tgood\t3")
    with pytest.raises(DataError) as error:
        read_course(tmp_path, SST, "train")
    assert str(error.value) == f"{path} has no column 'sentiment'; its columns are '', 'id', 'sentence', 'label'."
    write(tmp_path, SST.course.train, ",id,sentence,sentiment", "0,a,good,3")
    with pytest.raises(DataError, match=r"no column 'id', 'sentence', 'sentiment'.*looks comma-separated"):
        read_course(tmp_path, SST, "train")


def test_wrong_encoding_is_located(tmp_path):
    path = sst(tmp_path, "0\ta\tgood\t3")
    intact = path.read_bytes()
    path.write_bytes(intact + "1\tb\tcafé\t3\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"train\.csv:3: byte 0xe9 \(offset {len(intact) + 7}\) is not UTF-8.*WINDOWS"):
        read_course(tmp_path, SST, "train")
    path.write_bytes(intact.decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"train\.csv:1: byte 0xff .* iconv -f UTF-16 "):
        read_course(tmp_path, SST, "train")


@pytest.mark.parametrize("row", ['1\tb\t"never closed\t3', '1\tb\t"never" doubled\t3'])
def test_open_quote_is_located(tmp_path, row):
    sst(tmp_path, "0\ta\tgood\t3", row, "2\tc\tgood\t3")
    with pytest.raises(DataError, match=r"train\.csv:3: .*quote that is not closed"):
        read_course(tmp_path, SST, "train", "skip")


def test_stray_carriage_return_is_located(tmp_path):
    sst(tmp_path, "0\ta\tgood\t3", "1\tb\tgood\rand bad\t3")
    with pytest.raises(DataError, match=r"train\.csv:3: .*A carriage return stands in a field without quotes"):
        read_course(tmp_path, SST, "train", "skip")


def test_missing_files_are_named_with_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"sts-train\.csv does not exist; .*sts-dev\.csv.*'builtin'"):
        load_examples(str(tmp_path), STS, "train")
    for source in (str(tmp_path / "nowhere"), "bultin"):
        with pytest.raises(DataError, match=rf"{source} does not exist.*sts-train\.csv.*'builtin'.*'hub'"):
            load_examples(source, STS, "train")
    with pytest.raises(DataError, match="no data folder"):
        load_examples("", STS, "train")
    write(tmp_path, SST.course.train)
    with pytest.raises(DataError, match="is empty"):
        load_examples(str(tmp_path), SST, "train")


# Sub-samples and fingerprints


def numbered(n: int, labelled: bool = True) -> Examples:
    labels = np.arange(n, dtype=np.float32) if labelled else None
    return Examples(SST, "train", "memory", [str(i) for i in range(n)], ([f"sentence {i}" for i in range(n)],), labels)


@given(st.integers(1, 300), st.integers(1, 400), st.booleans())
def test_limit_spreads_rows_evenly(size, n, labelled):
    sample = limit(numbered(size, labelled), n)
    rows = [int(id_) for id_ in sample.ids]
    assert len(sample) == min(size, n)
    assert rows[0] == 0
    assert sample.sentences[0] == [f"sentence {row}" for row in rows]
    assert sample.labels.tolist() == rows if labelled else sample.labels is None
    gaps = np.diff([*rows, size])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_limit_refuses_nothing():
    with pytest.raises(ValueError, match="0 rows"):
        limit(numbered(3), 0)


texts = st.lists(st.text(max_size=5), min_size=2, max_size=2)


@given(texts, texts, texts, texts)
def test_fingerprint_tells_any_two_splits_apart(ids, sentences, other_ids, other_sentences):
    one = Examples(SST, "dev", "a", ids, (sentences,), np.zeros(2, np.float32))
    other = Examples(SST, "dev", "b", other_ids, (other_sentences,), np.zeros(2, np.float32))
    assert (fingerprint(one) == fingerprint(other)) == ((ids, sentences) == (other_ids, other_sentences))


def test_fingerprint_covers_labels():
    labelled, unlabelled, changed = numbered(3), numbered(3, labelled=False), numbered(3)
    changed.labels[1] = 2
    assert len({fingerprint(examples) for examples in (labelled, unlabelled, changed)}) == 3
