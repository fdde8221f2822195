"""The options of a run, in sections: names, types, defaults, what each alone may be, and what `--help` says of it.

The names are unique over all sections. Options left at None take a value that depends on others when the run starts.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from minbert.data.batches.plan import Schedule
from minbert.data.errors import UserError
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


def _listed(given: Any) -> Any:
    """One value for an option that takes several."""
    return (given,) if isinstance(given, str | Path | int | float) else given


def _numbers(given: Any) -> Any:
    """The same for numbers, which may stand in one text, `5 0 0`, where an option has one word."""
    return given.split() if isinstance(given, str) else _listed(given)


Folder = Annotated[Path, AfterValidator(_usable)]
Source = Annotated[str, AfterValidator(_usable)]  # of data or weights: a folder, or a name
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator takes


class Section(BaseModel):
    """A group of options. A wrong key or value raises ValueError."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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

    _one_is_enough = field_validator("losses", "augmented", mode="before")(_listed)

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


def takes(option: str, task: Task) -> bool:
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

    _one_is_enough = field_validator("teachers", mode="before")(_listed)
    _in_one_word = field_validator(*BY_TASK, mode="before")(_numbers)


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
