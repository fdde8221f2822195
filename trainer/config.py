"""The configuration of a run: typed, nested, printed, saved with the run, the same from a file or a command line.

Sections are nested models; the names of their fields are unique over all sections, so that a field is its own option
on the command line (`--lr`), and in a file stands either under its section or alone. Fields left at None take a value
that depends on others when the run starts; `config.yaml` in the run folder holds what they became.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from minbert.data.batches.plan import Schedule
from minbert.data.errors import UserError, explain, shown
from minbert.data.sources.examples import BadRows
from minbert.data.task import Task, resolve_task


def _usable(path: str | Path) -> str | Path:
    """Raises ValueError for what can be no path."""
    if "\0" in str(path):
        raise ValueError("a path cannot hold a NUL byte")
    try:
        Path(str(path).removeprefix("hub:")).expanduser()
    except RuntimeError as error:  # `~nobody`
        raise ValueError(str(error)) from None
    return path


Folder = Annotated[Path, AfterValidator(_usable)]
Source = Annotated[str, AfterValidator(_usable)]  # of data or weights: a folder, or a name
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator takes


class Section(BaseModel):
    """A group of options. A wrong key or value raises ValueError with one line for each."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(problem) for problem in error.errors())) from None


_TASKS: Any = ("sst", "quora", "sts")  # names, which the validation of the default resolves


class CorpusConfig(Section):
    """What to train on."""

    data: Source = "builtin"
    """`builtin` (a small generated corpus), a folder with the course's files, `hub`, or `hub:DIR` (saved data sets)."""
    task_folder: Folder | None = None
    """A folder with declarations of tasks of one's own, NAME.yaml, which `tasks` may name."""
    losses: tuple[Annotated[str, Field(pattern=r"^\w+=\w+$")], ...] = ()
    """TASK=LOSS: another loss than the task declares, such as squared_emd for ordered classes, pearson or cosent for a
    regression."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, validate_default=True)] = _TASKS
    """Tasks to train, in this order: names, or YAML files with the declaration of one's own (docs/tasks.md)."""
    bad_rows: BadRows = "refuse"
    """What to do with rows that cannot be used: `refuse` to start, or `skip` and count them."""
    max_length: Annotated[int, Field(ge=8, lt=2**31)] = 128
    """Longest sentence, in tokens; the rest is cut off."""
    train_limit: Count | None = None
    """Train on this many examples per task, spread evenly over its file."""
    eval_limit: Count | None = None
    """Score this many examples per task during training."""
    augmented: tuple[Folder, ...] = ()
    """Files with new rows for the tasks' training rows, as `minbert augment` writes them."""
    augment_mode: Literal["draw", "append"] = "draw"
    """How they are used: `draw` takes one in the place of its row, anew each time that comes up; `append` adds all."""
    augment_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of augment_mode=draw: how often a row that has new ones gives its place to one of them."""
    cache: Folder | None = None
    """Folder for tokenised data; the default is $MINBERT_CACHE, or minbert in the user's cache folder."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _resolve_tasks(cls, words: Any, info: ValidationInfo) -> Any:
        if isinstance(words, str) or not isinstance(words, Iterable):
            words = [words]
        try:
            tasks = tuple(resolve_task(word, info.data.get("task_folder")) for word in words)
            return _with_losses(tasks, dict(loss.split("=") for loss in info.data.get("losses", ())))
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        return self.tasks[self.names.index(name)]


def _with_losses(tasks: tuple[Task, ...], losses: Mapping[str, str]) -> tuple[Task, ...]:
    """Tasks, some with another loss than they declare. Raises UserError."""
    names = [task.name for task in tasks]
    if unknown := losses.keys() - set(names):
        raise UserError(f"losses names {min(unknown)}, which is no task of the run; there are {', '.join(names)}")
    return tuple(
        resolve_task(task.model_dump() | {"loss": losses[task.name]}) if task.name in losses else task for task in tasks
    )


class EncoderConfig(Section):
    """The shared encoder."""

    model: Source = "tiny"
    """`tiny` (random weights), `minilm` (an installed package), a local BERT checkpoint's folder, or a hub name."""
    pooling: Literal["cls", "mean"] = "mean"
    """Sentence embedding: the pooler's output for [CLS], or the mean of the hidden states."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Commit, branch or tag of a hub name's weights. The run keeps the commit that it was when the run was prepared."""
    freeze: Literal["none", "embeddings", "encoder"] | Count = "none"
    """What of the encoder stays fixed: a number freezes the embeddings and that many lower layers."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout in the encoder; the default is the checkpoint's own."""


class HeadsConfig(Section):
    """The tasks' heads, and what they see of an example."""

    pair_encoding: Literal["siamese", "joint", "joint_sides"] = "siamese"
    """How the encoder sees a pair: `siamese` (sentence by sentence), `joint` (both in one sequence, with one embedding
    for the pair), or `joint_sides` (one sequence, of which each sentence's part is pooled for itself)."""
    features: Literal["baseline", "siamese"] = "siamese"
    """What a pair head sees of sentence embeddings u and v: `baseline` (u, v) or `siamese` (u, v, |u - v|)."""
    hidden_layers: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Hidden layers of each head."""
    hidden_size: Count | None = None
    """Their width; the default is the encoder's."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before every linear layer of a head."""

    def joins(self, task: Task) -> bool:
        """Whether the task's examples are joint pairs."""
        return task.is_pair and self.pair_encoding != "siamese"

    def has_sides(self, task: Task) -> bool:
        """Whether they are, and each sentence has an embedding of its own."""
        return task.is_pair and self.pair_encoding == "joint_sides"

    def embeddings(self, task: Task) -> int:
        """How many embeddings the task's head sees side by side."""
        if not task.is_pair or self.pair_encoding == "joint":
            return 1
        return 3 if self.features == "siamese" else 2


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; the default is 1e-3 for random and 5e-5 for pretrained weights."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the heads; the default is `lr`, and 1e-3 over a frozen encoder."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer of the encoder has this times the learning rate of the one above it (.95, say); the top one has `lr`,
    and the heads `head_lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, on matrices only."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    head_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, at the beginning, that train the heads alone over an encoder that stays as it is."""
    unfreeze: Literal["at_once", "gradual"] = "at_once"
    """How the encoder joins after that: all of it, or one layer after another from the top."""
    unfreeze_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps after which a gradual unfreezing has reached the embeddings."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Score, keep as the best model and export an exponential moving average of the weights with this decay (.999,
    say) in place of the weights, with which training goes on."""

    @property
    def peaks(self) -> tuple[float, float]:
        """`lr` and `head_lr` of a run that is prepared, which has filled them in."""
        assert self.lr is not None and self.head_lr is not None
        return self.lr, self.head_lr


# Options of ObjectiveConfig that are one number for all tasks or one for each, and what a task must have for it.
BY_TASK = {
    "label_smoothing": "cross entropy over labels",
    "rdrop_weight": "outputs to compare",
    "smart_weight": "outputs that could stay the same",
}


def _takes(option: str, task: Task) -> bool:
    """Whether an option of BY_TASK is for a task."""
    smoothed = task.loss in ("cross_entropy", "binary_cross_entropy")
    return task.kind != "masked_lm" and (smoothed or option != "label_smoothing")


class ObjectiveConfig(Section):
    """What is added to the tasks' losses, or changed in them (docs/techniques.md)."""

    label_smoothing: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Share of each label that goes to all classes alike: one number for all tasks, or one for each in the order of
    `tasks`."""
    rdrop_weight: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weight of the divergence between two passes with different dropout (R-Drop): one number for all tasks, or one for
    each in the order of `tasks`."""
    teachers: tuple[Folder, ...] = ()
    """Folders of trained runs whose outputs on the training rows are learned beside the labels (distillation)."""
    distill_share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (1.0, 0.0)
    """The teachers' share of a task's loss at the first step and at the last, linear in between."""
    distill_temperature: Annotated[float, Field(gt=0)] = 1.0
    """What logits are divided by before the teachers' and the model's are compared."""
    smart_weight: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weight of adversarial smoothness: one number for all tasks, or one for each in the order of `tasks`."""
    smart_noise: Annotated[float, Field(gt=0)] = 1e-5
    """Variance of the noise on the embeddings from which the perturbation is looked for."""
    smart_steps: Count = 1
    """Ascent steps of that search."""
    smart_step_size: Annotated[float, Field(gt=0)] = 1e-3
    """Length of an ascent step."""
    smart_norm: Literal["infinity", "2", "none"] = "infinity"
    """Norm, token by token, in which a step has that length; `none` takes the gradient as it is."""
    smart_radius: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a token's perturbation (the paper's epsilon)."""
    proximal_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from a teacher, a moving average of the weights (the Bregman proximal point method)."""
    teacher_decays: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.99, 0.999)
    """The teacher's decay at first, and later."""
    teacher_change: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the planned steps after which the later one holds."""

    @field_validator(*BY_TASK, mode="before")
    @classmethod
    def _one_for_all(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int | float) else given


class BatchConfig(Section):
    """What makes up a step."""

    batch_size: Count = 32
    """Examples per task and optimizer step, over all processes."""
    batch_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share out the examples of a step by the size of the tasks' data to this power: 0 alike, 1 in proportion."""
    accumulation: Count = 1
    """Parts in which a step's batch goes through the model, to save memory; the result is the same."""
    task_schedule: Schedule = "all"
    """Tasks of a step: all of them, or one in turn, or one drawn by the size of its data."""
    aggregator: str = "sum"
    """How the tasks become one update: a name, name:option=value, or package.module:function. Losses only: sum,
    uncertainty, dwa, famo, random. Gradient surgery: pcgrad, gradvac, mgda, cagrad, imtl_g, aligned_mtl, upgrad,
    dualproj, nash_mtl, fairgrad, config, graddrop."""
    task_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """A fixed factor for each task's loss, in the order of `tasks`."""
    surgery_scope: Literal["encoder", "layer"] = "encoder"
    """Whether gradient surgery weighs the tasks once for the encoder or for each of its layers."""
    measure_every: Count | None = None
    """Steps between measurements of the tasks' gradient conflicts; surgery has them at every logged step anyway."""
    max_skipped: Count = 10
    """Stop after this many steps in a row that were skipped because a gradient was not finite."""


class BudgetConfig(Section):
    """How long to train, when to score and when to save."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over as many examples as there are, all tasks together; the default is 5 for random and 3 for pretrained
    weights."""
    steps: Count | None = None
    """Optimizer steps; overrides `epochs`."""
    extend_to: Annotated[float, Field(gt=0)] | None = None
    """Go on past `epochs` to at most this many while the last evaluation is the best; needs lr_schedule=constant."""
    eval_every: Count | None = None
    """Steps between evaluations; the default is an epoch."""
    evaluations: Count | None = None
    """Evaluate this many times, evenly over the budget, in place of every `eval_every` steps."""
    patience: Count | None = None
    """Stop after this many evaluations without a new best score."""
    save_every: Count | None = None
    """Steps between checkpoints; the default is at every evaluation."""
    keep: Count = 2
    """Newest checkpoints to keep."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: bool = False
    """Also keep the checkpoint of the best score."""
    save_in_step: bool = False
    """Write checkpoints while the step waits, not in the background: that takes no second copy in memory."""
    failed_saves: Count = 3
    """Stop when this many checkpoints in a row could not be written."""

    @property
    def passes(self) -> float:
        """`epochs` of a run that is prepared, which has filled them in."""
        assert self.epochs is not None
        return self.epochs


class ParallelConfig(Section):
    """Processes, sharding and precision."""

    processes: Count = 1
    """Processes on this machine, one per accelerator or per share of the cores."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; without it, plain PyTorch (data parallel when there are several processes)."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights, sums and optimizer are always fp32. `tf32` is fp32 on a GPU
    that rounds the factors of matrix products to ten bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same to the bit each time, which are slower. On a CPU all do."""
    timeout: Annotated[float, Field(gt=0)] = 30
    """Minutes that a process waits for the others before the run fails and says who was missing."""


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
    """Experiment trackers known to Accelerate: tensorboard, wandb, mlflow, ..."""
    corpus: CorpusConfig = CorpusConfig()
    encoder: EncoderConfig = EncoderConfig()
    heads: HeadsConfig = HeadsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    budget: BudgetConfig = BudgetConfig()
    parallel: ParallelConfig = ParallelConfig()

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
                if not _takes(option, task) and self.by_task(option)[task.name]:
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
            given = tuple(given[0] if _takes(option, task) else 0.0 for task in tasks)
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

    @property
    def leaves_out_parts(self) -> bool:
        """Whether some backward passes do not reach every part that is trained: those of one task only, or above what
        is not trained yet."""
        alone = self._weights_from() != "losses" or self.batch.measure_every is not None
        return alone or self.batch.task_schedule != "all" or self.unfreezes


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
    key = ".".join(part for part in place if part in OPTIONS or part in SECTIONS)
    if problem["type"] == "extra_forbidden":
        return _unknown(place[-1])
    # What a section says names its options itself.
    says_where = problem["type"] != "value_error" or not (place and place[-1] in OPTIONS)
    return explain(problem, key) if says_where else f"{key}: {explain(problem, key)}"


def _unknown(name: Any, section: str | None = None) -> str:
    place = f" under {section}" if section else ""
    if name in OPTIONS:
        other = f", or under {OPTIONS[name]}" if OPTIONS[name] else ""
        return f"{name} is no option{place}: it stands alone{other}"
    near = difflib.get_close_matches(str(name)[:80], [*OPTIONS, *SECTIONS], n=1)
    return f"unknown key {shown(name)}{place}" + (f"; did you mean {near[0]!r}?" if near else "")
