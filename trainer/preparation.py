"""What must be there before the processes start: the run folder, its encoder and tokenizer, tokenised data.

It happens once, in the process that starts the others, so that mistakes in options and data show before anything runs.
"""

import logging
from datetime import datetime
from itertools import chain
from pathlib import Path

from minbert.data.batch import TokenisedSplit
from minbert.data.errors import UserError
from minbert.data.examples import Examples, limit
from minbert.data.plan import BatchPlan
from minbert.data.sources import available_tasks, load_examples
from minbert.data.tasks import TASKS, Split
from minbert.data.tokens import (
    Tokenizer,
    build_vocabulary,
    default_cache_dir,
    load_tokenizer,
    tokenise,
    write_vocabulary,
)
from minbert.trainer.bert import BertConfig
from minbert.trainer.checkpoint import checkpoints
from minbert.trainer.config import MAY_CHANGE, RunConfig, flatten
from minbert.trainer.run_folder import RunFolder
from minbert.trainer.weights import TINY, find_checkpoint, read_config, write_shape

log = logging.getLogger(__name__)

VOCABULARY_SIZE = 8192  # of a model with random weights; its words come from the training data


def new_run_path(config: RunConfig) -> Path:
    """A fresh folder under runs/, named by time and model."""
    base = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{Path(config.encoder.model).name}"
    candidates = chain([base], (base.with_name(f"{base.name}-{n}") for n in range(2, 1000)))
    return next(path for path in candidates if not path.exists())


def prepare(config: RunConfig) -> RunFolder:
    """Create or reopen the run folder for `config` (`run` set) and fill in what the processes will need.

    Raises UserError if the folder holds a run with other settings, or the data or the model cannot be had.
    """
    run = RunFolder(config.run)
    config = resolve(config)
    if run.config_file.exists() and checkpoints(run.checkpoints):
        _refuse_other_settings(run, config)
    tokenizer = _prepare_encoder(run, config)
    for name in config.corpus.tasks:
        for split in ("train", "dev"):
            load_split(config, name, split, tokenizer)
    run.write_config(config)
    run.write_environment()
    return run


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the learning rates and the cache folder where they were left open."""
    lr = config.optimizer.lr or (1e-3 if config.encoder.model == "tiny" else 5e-5)
    head_lr = config.optimizer.head_lr or (1e-3 if config.encoder.freeze == "encoder" else lr)
    cache = config.corpus.cache or default_cache_dir()
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"lr": lr, "head_lr": head_lr}),
            "corpus": config.corpus.model_copy(update={"cache": cache}),
        }
    )


def load_examples_of(config: RunConfig, task: str, split: Split) -> Examples:
    """A split's examples as the configuration wants them."""
    corpus = config.corpus
    examples = load_examples(corpus.data, TASKS[task], split, corpus.bad_rows)
    most = {"train": corpus.train_limit, "dev": corpus.eval_limit}.get(split)
    return examples if most is None else limit(examples, most)


def load_split(config: RunConfig, task: str, split: Split, tokenizer: Tokenizer) -> TokenisedSplit:
    return tokenise(load_examples_of(config, task, split), tokenizer, config.corpus.max_length, config.corpus.cache)


def build_plan(config: RunConfig, splits: dict[str, TokenisedSplit]) -> BatchPlan:
    """The batch plan over the training splits; `annealed` anneals over the configured budget."""
    sizes = {name: len(split) for name, split in splits.items()}
    plan = BatchPlan(sizes, config.batch.batch_size, config.batch.task_schedule, config.seed)
    steps = config.budget.steps or round(config.budget.epochs * plan.steps_per_epoch)
    return BatchPlan(sizes, config.batch.batch_size, config.batch.task_schedule, config.seed, steps)


def _refuse_other_settings(run: RunFolder, config: RunConfig) -> None:
    saved, wanted = flatten(run.read_config()), flatten(config)
    fixed = set(wanted) - MAY_CHANGE - {"run"}
    if config.batch.task_schedule == "annealed":
        fixed |= {"epochs", "steps"}  # the order of the data depends on them
    different = [
        f"  {name}: {saved[name]} in the folder, {wanted[name]} asked for"
        for name in wanted
        if name in fixed and saved[name] != wanted[name]
    ]
    if different:
        raise UserError(
            f"{run.path} holds a run with other settings:\n" + "\n".join(different) + "\n"
            "Leave these options out to resume it, or give another --run to start a new one."
        )


def _prepare_encoder(run: RunFolder, config: RunConfig) -> Tokenizer:
    """Write the encoder's config.json and tokenizer into the run folder, if they are not there yet."""
    missing = set(config.corpus.tasks) - set(available_tasks(config.corpus.data))
    if missing and config.corpus.data == "builtin":
        raise UserError(f"the built-in corpus has no task {', '.join(sorted(missing))}; use --data or other --tasks")
    if not (run.encoder / "config.json").exists():
        if config.encoder.model == "tiny":
            texts = (
                text
                for task in config.corpus.tasks
                for column in load_examples_of(config, task, "train").sentences
                for text in column
            )
            vocabulary = build_vocabulary(texts, VOCABULARY_SIZE)
            run.encoder.mkdir(parents=True, exist_ok=True)
            write_vocabulary(run.encoder, vocabulary)
            write_shape(run.encoder, BertConfig(vocab_size=len(vocabulary), **TINY))
        else:
            source = find_checkpoint(config.encoder.model)
            load_tokenizer(source)
            write_shape(run.encoder, read_config(source), tokenizer_from=source)
    longest = read_config(run.encoder).max_position_embeddings
    if config.corpus.max_length > longest:
        raise UserError(f"max_length={config.corpus.max_length}, but the encoder has {longest} positions")
    return load_tokenizer(run.encoder)
