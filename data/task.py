"""A task, as a declaration: the columns of its sentences and its label, what a valid label is, where its rows lie.

Head, loss and metric follow from it, and everything else in the system (readers, heads, schedules, prediction files) is
driven by it. Declarations are YAML files: those that come with the program lie in `data/tasks/`, a user's is named by
its path. A run resolves them once and keeps what they said.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from minbert.data.errors import UserError, explain, shown
from minbert.data.reading import read_yaml

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

Kind = Literal["classification", "binary", "regression", "multilabel", "masked_lm"]
Loss = Literal[
    "cross_entropy", "squared_emd", "binary_cross_entropy", "squared_error", "absolute_error", "pearson", "cosent"
]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]
Values = Literal["index", "name", "float"]

# What goes with each kind; the first is the default.
LOSSES: Mapping[Kind, tuple[Loss, ...]] = {
    "classification": ("cross_entropy", "squared_emd"),
    "binary": ("binary_cross_entropy",),
    "regression": ("squared_error", "absolute_error", "pearson", "cosent"),
    "multilabel": ("binary_cross_entropy",),
    "masked_lm": ("cross_entropy",),
}
METRICS: Mapping[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "binary": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "multilabel": ("f1", "accuracy"),
    "masked_lm": ("perplexity",),
}
VALUES: Mapping[Kind, tuple[Values, ...]] = {
    "classification": ("name", "index"),
    "binary": ("index", "name", "float"),
    "regression": ("float",),
    "multilabel": ("name",),
    "masked_lm": ("float",),
}
CORRELATIONS = ("pearson", "spearman", "matthews")  # from -1 to 1

DECLARATIONS = Path(__file__).parent / "tasks"
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Files(Section):
    """A user's own files, one for each split: csv, tsv, jsonl or parquet by their suffix; `test` may be missing."""

    train: Path
    dev: Path
    test: Path | None = None

    def name(self, split: Split) -> Path | None:
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


class CourseFiles(Section):
    """Where the task lies in the course's folder.

    `known_defects` lists rows of the distributed files that are broken for everybody, by id: labelled splits leave
    them out with a notice whatever the policy for bad rows, unlabelled ones keep them, as the course scores every id.
    """

    train: str
    dev: str
    test: str
    known_defects: dict[str, str] = {}

    def name(self, split: Split) -> str:
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


class HubDataset(Section):
    """The same task in a Hugging Face data set: `columns` maps the task's to the data set's, `splits` likewise."""

    path: str
    config: str | None = None
    columns: dict[str, str] = {}
    splits: dict[Split, str] = {"train": "train", "dev": "validation", "test": "test"}

    def column(self, own: str) -> str:
        return self.columns.get(own, own)


class Predictions(Section):
    """How predictions are written: predictions/{stem}-{split}-output.csv, its second column's header, and classes by
    `name`, `index`, or as a `float`."""

    stem: str | None = None
    header: str = "Prediction"
    values: Values | None = None


class Texts(Section):
    """The texts of a masked language model: the training texts of other tasks, each distinct one once, and text files
    with one sentence or document a line. What scores it are the files `dev`, or else a share `held_out` of all texts
    that is not trained on; equal texts are on the same side.

    A text is cut off where it is too long; `packed` lays all of them end to end instead, and cuts that.
    """

    tasks: tuple["Task", ...] = ()
    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = ("train",)  # of those tasks
    files: tuple[Path, ...] = ()
    dev: tuple[Path, ...] = ()
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    packed: bool = False

    @field_validator("tasks", mode="before")
    @classmethod
    def _resolve_tasks(cls, words: Any) -> Any:
        try:
            return tuple(resolve_task(word) for word in ([words] if isinstance(words, str) else words))
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> "Texts":
        if not self.tasks and not self.files:
            raise ValueError("texts: name `tasks` or `files` that have them")
        if corpora := [task.name for task in self.tasks if task.kind == "masked_lm"]:
            raise ValueError(f"texts.tasks: {corpora[0]} has no texts of its own")
        return self


class Words(Section):
    """What a masked language model must guess: a `share` of each text's tokens, by whole words or piece by piece."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    whole: bool = True


class Task(Section):
    """One task. `sentences` are one or two column names; `classes` name the labels 0, 1, ...; `range` is inclusive.

    In a file a label is a class's number or name; of several labels (`multilabel`), names joined by commas, or a list.
    Classes that are `ordered` stand from the lowest to the highest. A `symmetric` pair means the same in either order.
    `weight` is the task's in the mean over tasks that is the overall
    score; 0 is for one that only helps the others. A masked language model (`masked_lm`) has `texts` in the place of
    columns and labels.
    """

    name: Name
    title: str = ""
    kind: Kind
    sentences: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    symmetric: bool = False
    label: str
    id: str = "id"
    classes: tuple[str, ...] = ()
    ordered: bool = False
    range: tuple[float, float] | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    masking: Words | None = None
    texts: Texts | None = None
    files: Files | None = None
    builtin: Literal["sst", "quora", "sts"] | None = None
    course: CourseFiles | None = None
    hub: HubDataset | None = None
    predictions: Predictions = Predictions()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """What follows from the kind and the name, where it is left out."""
        if not isinstance(raw, dict) or raw.get("kind") not in LOSSES:
            return raw
        kind, name = raw["kind"], raw.get("name")
        filled = {key: value for key, value in raw.items() if value is not None}
        filled = {"title": name, "loss": LOSSES[kind][0], "metric": METRICS[kind][0]} | filled
        columns = filled.get("sentences")
        filled.setdefault("symmetric", isinstance(columns, list | tuple) and len(columns) == 2)
        if kind == "binary":
            filled.setdefault("classes", ("no", "yes"))
        if kind == "masked_lm":
            filled = {"sentences": ("text",), "label": "masked", "masking": {}} | filled
        written = filled.get("predictions", {})
        if isinstance(written, dict):
            filled["predictions"] = {"stem": name, "values": VALUES[kind][0]} | written
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if self.name == "overall":
            raise ValueError("name: 'overall' is the name of the mean over all tasks")
        self._consistent_texts()
        if self.kind == "regression":
            if self.range is None or not self.range[0] < self.range[1]:
                raise ValueError("range: a regression needs its lowest and highest label, such as [0, 5]")
        elif self.range is not None:
            raise ValueError(f"range: only a regression has one, and this is a {self.kind} task")
        least = {"classification": 2, "binary": 2, "multilabel": 1}.get(self.kind, 0)
        if least and (len(self.classes) < least or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"classes: a {self.kind} task needs the names of at least {least}, all different")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"classes: a binary task has two, first that of label 0, not {len(self.classes)}")
        if not least and self.classes:
            raise ValueError(f"classes: a {self.kind} task has none")
        if self.kind == "multilabel" and any("," in name for name in self.classes):
            raise ValueError("classes: a name with a comma cannot be told from two labels")
        if self.ordered and self.kind != "classification":
            raise ValueError(f"ordered: only the classes of a classification have an order, not a {self.kind} task")
        if len({*self.sentences, self.label}) < len(self.sentences) + 1:
            raise ValueError(
                f"sentences and label must be different columns, not {', '.join((*self.sentences, self.label))}"
            )
        if self.symmetric and not self.is_pair:
            raise ValueError("symmetric: only a pair of sentences has an order")
        for key, value, allowed in (
            ("loss", self.loss, LOSSES[self.kind]),
            ("metric", self.metric, METRICS[self.kind]),
            ("predictions.values", self.predictions.values, VALUES[self.kind]),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: a {self.kind} task takes {' or '.join(allowed)}, not {value}")
        if self.loss == "squared_emd" and not self.ordered:
            raise ValueError("loss: squared_emd is for classes in an order; say `ordered: true` if they are")
        if self.loss == "cosent" and not self.is_pair:
            raise ValueError("loss: cosent compares the embeddings of a pair, and the task has one sentence")
        for split in SPLITS:
            path = self.files and self.files.name(split)
            if path and path.suffix.lower() not in FORMATS:
                raise ValueError(f"files.{split}: {path} must end in {', '.join(FORMATS)}")
        return self

    def _consistent_texts(self) -> None:
        if self.kind != "masked_lm":
            if given := [key for key in ("texts", "masking") if getattr(self, key) is not None]:
                raise ValueError(f"{given[0]}: only a masked_lm task has them, and this is a {self.kind} task")
            return
        if self.texts is None:
            raise ValueError("texts: a masked_lm task needs them: `tasks`, `files`, or both")
        places = [key for key in ("files", "builtin", "course", "hub") if getattr(self, key) is not None]
        if places or self.is_pair:
            raise ValueError(f"{places[0] if places else 'sentences'}: a masked_lm task has `texts` instead")

    @property
    def is_pair(self) -> bool:
        return len(self.sentences) == 2

    def has(self, split: Split) -> bool:
        """Whether there are rows of the split: a declaration that names its files may name none for `test`."""
        return self.files is None or self.files.name(split) is not None

    @property
    def couples_batch(self) -> bool:
        """Whether its loss compares the examples of a batch with each other."""
        return self.loss in ("pearson", "cosent")

    @property
    def is_cosine(self) -> bool:
        """Whether its number is the cosine of the embeddings of a pair, in the place of a head's output."""
        return self.loss == "cosent"

    @property
    def label_range(self) -> tuple[float, float]:
        """Lowest and highest label; of classes, their numbers."""
        return self.range if self.range is not None else (0.0, float(len(self.classes) - 1))

    @property
    def outputs(self) -> int:
        """Numbers that the model gives per example: a logit per class, or one; of a masked language model, the negative
        log likelihood of the hidden tokens, summed, and how many they are."""
        if self.kind == "masked_lm":
            return 2
        return len(self.classes) if self.kind in ("classification", "multilabel") else 1

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the shape and meaning of its head."""
        return {"kind": self.kind, "sentences": len(self.sentences), "loss": self.loss} | (
            {"range": list(self.label_range)} if self.range else {"classes": list(self.classes)}
        )

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


Texts.model_rebuild()


def named(task: Task, label: Any) -> str:
    """The name of a class's number, or of several labels given as 0 or 1 for each."""
    if task.kind == "multilabel":
        return ",".join(name for name, there in zip(task.classes, label, strict=True) if there)
    return task.classes[int(label)]


def resolve_task(word: Any, folder: Path | None = None) -> Task:
    """The task that `word` names: one of the program's or of `folder` by its name, or a YAML file by its path; or what
    an earlier resolution left. Raises UserError for anything else."""
    if isinstance(word, Task):
        return word
    if isinstance(word, Mapping):
        return _parse(dict(word), f"task {word.get('name', '')}".strip())
    if not isinstance(word, str):
        raise UserError(f"a task is given by its name or its file, not by {shown(word)}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"the task folder {folder} does not exist, or is a file; name a folder with NAME.yaml files")
    if _is_file(word):
        return load_task(Path(word).expanduser())
    known = {path.stem: path for place in (DECLARATIONS, folder) if place for path in sorted(place.glob("*.yaml"))}
    if word not in known:
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"there is no task {shown(word)}{hint} There are {', '.join(sorted(known))}, and FILE.yaml")
    return load_task(known[word])


def _is_file(word: Any) -> bool:
    """Whether a task is called by its declaration's path, not by its name."""
    return isinstance(word, str) and (word.endswith((".yaml", ".yml")) or "/" in word)


def load_task(path: Path) -> Task:
    """The declaration in a YAML file, paths in it relative to its folder. Raises UserError naming file and keys."""
    return _load_own(path.name) if path.parent == DECLARATIONS else _load(path)


@lru_cache
def _load_own(name: str) -> Task:
    return _load(DECLARATIONS / name)


def _load(path: Path) -> Task:
    raw = read_yaml(path)
    base = path.absolute().parent

    def absolute(value: Any) -> Any:
        """A path relative to the declaration's folder; of several, each."""
        if isinstance(value, list):
            return [absolute(each) for each in value]
        return str(base / Path(value).expanduser()) if isinstance(value, str) else value

    if isinstance(raw.get("files"), dict):
        raw["files"] = {split: absolute(file) for split, file in raw["files"].items()}
    if isinstance(texts := raw.get("texts"), dict):
        texts |= {key: absolute(texts[key]) for key in ("files", "dev") if key in texts}
        if isinstance(texts.get("tasks"), list):
            texts["tasks"] = [absolute(word) if _is_file(word) else word for word in texts["tasks"]]
    return _parse(raw, str(path))


def _parse(raw: dict[str, Any], where: str) -> Task:
    try:
        return Task.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_explain(problem)}" for problem in error.errors())) from None


def _explain(problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"unknown key {place!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
    if problem["type"] == "string_pattern_mismatch":
        return f"{place}: lower-case letters, digits and _, a letter first, not {shown(problem['input'])}"
    return explain(problem, place)


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    kinds: dict[str, type[Section]] = {
        "files": Files,
        "course": CourseFiles,
        "hub": HubDataset,
        "predictions": Predictions,
        "texts": Texts,
        "masking": Words,
    }
    return list(kinds.get(str(place[0]), Task).model_fields if place else Task.model_fields)
