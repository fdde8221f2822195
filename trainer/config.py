"""The configuration of a run: typed, nested, printed, saved with the run, the same from a file or a command line.

The options (`trainer/options.py`) are nested in sections; each is an option of its own on the command line (`--lr`),
and in a file stands either under its section or alone. `config.yaml` in the run folder holds what those left at None
became.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from minbert.data.errors import UserError, explain, shown
from minbert.data.task import Task
from minbert.trainer.options import (
    BY_TASK,
    BatchConfig,
    BudgetConfig,
    CorpusConfig,
    Count,
    EncoderConfig,
    Folder,
    HeadsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    Seed,
    takes,
)


class RunConfig(Section):
    """Train minBERT on several tasks at once."""

    run: Folder | None = None
    """Run folder; one that exists is resumed. The default is a new one under runs/."""
    recipe: tuple[str, ...] = ()
    """Named settings to start from, the later laid over the earlier: `paper-full minilm`; `list` shows all."""
    seed: Seed = 0
    """Seed of the weights, the dropout and the order of the data."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    progress: Literal["auto", "lines", "json"] = "auto"
    """How the run shows itself: a panel on a terminal and lines elsewhere; always lines; or JSON, with each line of
    metrics.jsonl."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers known to Accelerate: tensorboard, wandb, mlflow, trackio, ..."""
    corpus: CorpusConfig = CorpusConfig()
    encoder: EncoderConfig = EncoderConfig()
    heads: HeadsConfig = HeadsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    budget: BudgetConfig = BudgetConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(problem) for problem in error.errors())) from None

    @property
    def folder(self) -> Path:
        """`run`, once one is chosen."""
        assert self.run is not None
        return self.run

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.budget.extend_to is not None:
            if self.optimizer.lr_schedule != "constant":
                raise ValueError(
                    f"extend_to needs lr_schedule=constant, not {self.optimizer.lr_schedule}: "
                    "a learning rate that has fallen to zero cannot train on"
                )
            epochs = self.budget.epochs
            if self.budget.steps is not None or epochs is None or self.budget.extend_to < epochs:
                raise ValueError("extend_to is a number of epochs, needs `epochs` of at most as many, and no `steps`")
        if self.budget.eval_every is not None and self.budget.evaluations is not None:
            raise ValueError("eval_every and evaluations both say when to evaluate; give one of them")
        if self.batch.accumulation > self.batch.batch_size:
            raise ValueError(
                f"accumulation={self.batch.accumulation} parts of a batch_size={self.batch.batch_size} would be empty; "
                f"give at most {self.batch.batch_size}"
            )
        if self.encoder.freeze == "encoder" and self.unfreezes:
            raise ValueError("freeze=encoder trains the heads alone to the end: leave out head_warmup and unfreeze")
        if self.optimizer.unfreeze == "gradual" and self.optimizer.head_warmup > self.optimizer.unfreeze_share:
            raise ValueError(
                f"head_warmup={self.optimizer.head_warmup:g} ends after the unfreezing would, which "
                f"unfreeze_share={self.optimizer.unfreeze_share:g} of the steps are for"
            )
        if self.heads.pair_encoding == "joint_sides" and self.encoder.pooling != "mean":
            raise ValueError(
                f"pair_encoding=joint_sides needs pooling=mean, not {self.encoder.pooling}: a pair has one [CLS], and "
                "two sentences to be told apart"
            )
        try:
            source = self._weights_from()
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.batch.aggregator != "sum" and self.batch.task_schedule != "all":
            raise ValueError(
                f"aggregator={self.batch.aggregator} weighs the tasks of a step against each other, "
                f"so it needs task_schedule=all, not {self.batch.task_schedule}, which trains one task a step. "
                "To see more of the tasks with more data, give batch_power: .5 is square_root, 1 proportional"
            )
        if self.batch.batch_power and self.batch.task_schedule not in ("all", "round_robin"):
            raise ValueError(
                f"task_schedule={self.batch.task_schedule} draws tasks by their size, and batch_power shares out "
                "batches by it: leave out one of them"
            )
        if self.batch.surgery_scope == "layer" and source != "gramian":
            raise ValueError(
                f"surgery_scope=layer needs gradient surgery, which {self.batch.aggregator} is not; "
                "add aggregator=pcgrad, say"
            )
        if self.batch.task_weights is not None and len(self.batch.task_weights) != len(self.corpus.tasks):
            raise ValueError(f"task_weights needs one number for each of {', '.join(self.corpus.names)}")
        for option, needed in BY_TASK.items():
            if len(getattr(self.objective, option)) not in (0, 1, len(self.corpus.tasks)):
                raise ValueError(f"{option} needs one number, or one for each of {', '.join(self.corpus.names)}")
            for task in self.corpus.tasks:
                if not takes(option, task) and self.by_task(option)[task.name]:
                    raise ValueError(f"{option} of {task.name} must be 0: it has no {needed}")
        if any(self.objective.rdrop_weight) and self.encoder.encoder_dropout == self.heads.head_dropout == 0:
            raise ValueError("rdrop_weight compares two passes that differ by dropout: without it they are the same")
        for task in self.corpus.tasks:
            self._require_whole_batch(task)
        if not any(task.weight for task in self.corpus.tasks):
            raise ValueError("tasks: at least one needs a weight, or nothing tells which model is the best")
        if len(set(self.corpus.names)) < len(self.corpus.tasks):
            raise ValueError(f"tasks names a task twice: {', '.join(self.corpus.names)}; name each once")
        return self

    def _require_whole_batch(self, task: Task) -> None:
        """Raises ValueError if a loss that compares examples or embeddings would miss some of them."""
        if task.couples_batch and self.batch.accumulation > 1:
            raise ValueError(
                f"the loss {task.loss} of {task.name} compares all examples of a batch, and accumulation="
                f"{self.batch.accumulation} would compare those of a part: use more processes, or a smaller batch_size"
            )
        if task.is_cosine and self.heads.joins(task):
            raise ValueError(
                f"the loss {task.loss} of {task.name} compares the embeddings of two sentences that are encoded each "
                f"for itself, which pair_encoding={self.heads.pair_encoding} does not do"
            )
        if task.is_cosine and (self.encoder.freeze == "encoder" or self.optimizer.head_warmup):
            raise ValueError(
                f"the loss {task.loss} of {task.name} has no head to train: leave out freeze=encoder and head_warmup"
            )

    def by_task(self, option: str) -> dict[str, float]:
        """What an option of BY_TASK is for each task; one number for all is for those that can have it."""
        given, tasks = getattr(self.objective, option) or (0.0,), self.corpus.tasks
        if len(given) == 1:
            given = tuple(given[0] if takes(option, task) else 0.0 for task in tasks)
        return dict(zip(self.corpus.names, given, strict=True))

    def _weights_from(self) -> str:
        """What the aggregator takes its weights from, its `source`. Raises UserError if there is no such aggregator."""
        if self.batch.aggregator == "sum":
            return "losses"  # the default does without the import of PyTorch, which takes a second
        from minbert.trainer.surgery.methods import parse_method

        return parse_method(self.batch.aggregator)[1].source  # imports nothing that the text names

    @property
    def unfreezes(self) -> bool:
        """Whether parts of the encoder join later."""
        return self.optimizer.head_warmup > 0 or self.optimizer.unfreeze == "gradual"


# Options that say where and how a run is trained, not what it is.
INCIDENTAL = frozenset({"run", "seed", "cache", "trackers", "progress", "log_every", "recipe"})

# Options by which a resumed run may differ from what its folder says.
MAY_CHANGE = frozenset(
    [
        "epochs",
        "steps",
        "extend_to",
        "eval_every",
        "evaluations",
        "patience",
        "save_every",
        "keep",
        "keep_every",
        "keep_best",
        "save_in_step",
        "failed_saves",
        "processes",
        "zero_stage",
        "device",
        "deterministic",
        "timeout",
        "accumulation",
        "recipe",
        "log_every",
        "progress",
        "trackers",
        "cache",
        "task_folder",
        "eval_limit",
        "max_skipped",
    ]
)

SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)
}
# Every option by its own name, with the section that it belongs to (None for the run itself).
OPTIONS: dict[str, str | None] = {name: None for name in RunConfig.model_fields if name not in SECTIONS} | {
    option: name for name, section in SECTIONS.items() for option in section.model_fields
}


def flatten(config: RunConfig) -> dict[str, Any]:
    """The value of every option, by its own name."""
    return {
        name: getattr(config if section is None else getattr(config, section), name)
        for name, section in OPTIONS.items()
    }


def parse_config(raw: Mapping[str, Any], where: str) -> RunConfig:
    """A configuration from nested or flat keys. Raises UserError naming every wrong key or value in `where`."""
    nested: dict[str, Any] = {}
    for key, value in flat_options(raw, where).items():
        section = OPTIONS.get(key)
        (nested if section is None else nested.setdefault(section, {}))[key] = value
    try:
        return RunConfig(**nested)
    except ValueError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None


def flat_options(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options that stand alone or under the name of their section -> by their own names alone. Raises UserError."""
    flat: dict[str, Any] = {}
    problems: list[str] = []

    def take(key: str, value: Any) -> None:
        if key in flat:
            problems.append(f"{key} is given twice, alone and under {OPTIONS.get(key)}")
        flat[key] = value

    for key, value in raw.items():
        if key not in SECTIONS:
            take(key, value)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                if OPTIONS.get(name) == key:
                    take(name, inner)
                else:
                    problems.append(_unknown(name, key))
        elif value is not None:
            problems.append(
                f"{key} is a group of options ({', '.join(SECTIONS[key].model_fields)}), not {shown(value)}"
            )
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    return flat


def _explain(problem: ErrorDetails) -> str:
    """One line on a wrong key (with the nearest valid one) or a wrong value (with what is allowed)."""
    place = [str(part) for part in problem["loc"]]
    key = next((part for part in reversed(place) if part in OPTIONS), "")
    if problem["type"] == "extra_forbidden":
        return _unknown(place[-1])
    said = explain(problem, key)
    return f"{key}: {said}" if key and problem["type"] == "value_error" else said  # which does not say where


def _unknown(name: Any, section: str | None = None) -> str:
    place = f" under {section}" if section else ""
    if name in OPTIONS:
        other = f", or under {OPTIONS[name]}" if OPTIONS[name] else ""
        return f"{name} is no option{place}: it stands alone{other}"
    near = difflib.get_close_matches(str(name)[:80], [*OPTIONS, *SECTIONS], n=1)
    return f"unknown key {shown(name)}{place}" + (f"; did you mean {near[0]!r}?" if near else "")
