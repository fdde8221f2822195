"""The tasks, as declarations.

A task says which columns hold its sentences and its label, what a valid label is, and thereby which head, loss and
metric it has. Everything else in the system (readers, heads, schedules, prediction files) is driven by these
declarations; a new task is one more of them in `TASKS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

Kind = Literal["classification", "binary", "regression"]
LOSSES: Mapping[Kind, str] = {
    "classification": "cross entropy",
    "binary": "binary cross entropy with logits",
    "regression": "mean squared error",
}
METRICS: Mapping[Kind, str] = {"classification": "accuracy", "binary": "accuracy", "regression": "pearson"}


@dataclass(frozen=True)
class CourseFiles:
    """Where the task lies in the course's folder, and how the course wants its predictions.

    `known_defects` lists rows of the distributed files that are broken for everybody, by id: labelled splits leave
    them out with a notice whatever the policy for bad rows, unlabelled ones keep them, as the course scores every id.
    """

    train: str
    dev: str
    test: str
    prediction_stem: str  # predictions/{prediction_stem}-{split}-output.csv
    prediction_header: str
    known_defects: Mapping[str, str] = field(default_factory=dict)

    def name(self, split: Split) -> str:
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


@dataclass(frozen=True)
class HubDataset:
    """The same task in a Hugging Face data set: its names for the columns and splits, its scale for the labels."""

    path: str
    config: str | None
    columns: Mapping[str, str]  # the task's column -> the data set's column
    splits: Mapping[Split, str]


@dataclass(frozen=True)
class Task:
    """One task: `sentences` are one or two column names, `label_range` is inclusive."""

    name: str
    title: str
    kind: Kind
    sentences: tuple[str, ...]
    label: str
    label_range: tuple[float, float]
    course: CourseFiles
    hub: HubDataset

    @property
    def is_pair(self) -> bool:
        return len(self.sentences) == 2

    @property
    def loss(self) -> str:
        return LOSSES[self.kind]

    @property
    def metric(self) -> str:
        return METRICS[self.kind]

    @property
    def outputs(self) -> int:
        """Numbers that the head gives per example: a logit per class, or one."""
        return int(self.label_range[1]) + 1 if self.kind == "classification" else 1


SST = Task(
    name="sst",
    title="sentiment (SST-5)",
    kind="classification",
    sentences=("sentence",),
    label="sentiment",
    label_range=(0, 4),
    course=CourseFiles(
        train="ids-sst-train.csv",
        dev="ids-sst-dev.csv",
        test="ids-sst-test-student.csv",
        prediction_stem="sst",
        prediction_header="Predicted_Sentiment",
    ),
    hub=HubDataset(
        path="SetFit/sst5",
        config=None,
        columns={"sentence": "text", "sentiment": "label"},
        splits={"train": "train", "dev": "validation", "test": "test"},
    ),
)

CFIMDB = Task(
    name="cfimdb",
    title="sentiment (CFIMDB)",
    kind="classification",
    sentences=("sentence",),
    label="sentiment",
    label_range=(0, 1),
    course=CourseFiles(
        train="ids-cfimdb-train.csv",
        dev="ids-cfimdb-dev.csv",
        test="ids-cfimdb-test-student.csv",
        prediction_stem="cfimdb",
        prediction_header="Predicted_Sentiment",
    ),
    # The counterfactual set itself is not on the hub; the reviews that it was drawn from are.
    hub=HubDataset(
        path="stanfordnlp/imdb",
        config=None,
        columns={"sentence": "text", "sentiment": "label"},
        splits={"train": "train", "dev": "test", "test": "test"},
    ),
)

QUORA = Task(
    name="quora",
    title="paraphrase (Quora)",
    kind="binary",
    sentences=("sentence1", "sentence2"),
    label="is_duplicate",
    label_range=(0, 1),
    course=CourseFiles(
        train="quora-train.csv",
        dev="quora-dev.csv",
        test="quora-test-student.csv",
        prediction_stem="para",
        prediction_header="Predicted_Is_Paraphrase",
        known_defects={"9054345d02cd6c5642a4904dc": "no second question"},
    ),
    hub=HubDataset(
        path="nyu-mll/glue",
        config="qqp",
        columns={"sentence1": "question1", "sentence2": "question2", "is_duplicate": "label"},
        splits={"train": "train", "dev": "validation", "test": "test"},
    ),
)

STS = Task(
    name="sts",
    title="similarity (STS)",
    kind="regression",
    sentences=("sentence1", "sentence2"),
    label="similarity",
    label_range=(0, 5),
    course=CourseFiles(
        train="sts-train.csv",
        dev="sts-dev.csv",
        test="sts-test-student.csv",
        prediction_stem="sts",
        prediction_header="Predicted_Similiary",  # the course spells it so
    ),
    hub=HubDataset(
        path="nyu-mll/glue",
        config="stsb",
        columns={"sentence1": "sentence1", "sentence2": "sentence2", "similarity": "label"},
        splits={"train": "train", "dev": "validation", "test": "test"},
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in (SST, QUORA, STS, CFIMDB)}
