"""A run's data as its configuration wants them: examples, tokens, and the plan of its batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from minbert.data.augmentation.augmented import Augmentation, AugmentedSplit, appended, read_augmentation
from minbert.data.batches.plan import BatchPlan
from minbert.data.errors import UserError
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.sequences.texts import load_texts, training_texts
from minbert.data.sequences.tokens import Tokenizer, default_cache_dir, load_tokenizer, tokenise
from minbert.data.sources.examples import Examples, limit, require_whole
from minbert.data.sources.loading import load_examples
from minbert.data.task import Split, Task
from minbert.trainer.config import RunConfig
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.folder import RunFolder

_kept: dict[tuple, Any] | None = None  # inside `reading_once`: tokens, and examples until they are tokenised


@contextmanager
def reading_once() -> Iterator[dict]:
    """Inside, a split is read, checked and fingerprinted once, for all who ask: what is prepared, trained on and scored
    in one process is the same, whatever becomes of the files meanwhile. Yields what is kept, to be emptied at will."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield _kept
    finally:
        _kept = before


def load_examples_of(config: RunConfig, task: str, split: Split) -> Examples:
    """A split's examples, as many as the configuration wants."""
    corpus, key = config.corpus, (config.corpus.model_dump_json(), task, split)
    if _kept is not None and key in _kept:
        return _kept[key]
    examples, most = load_examples(corpus.data, corpus.task(task), split, corpus.bad_rows), _most(config, split)
    examples = examples if most is None else limit(examples, most)
    if split == "train" and corpus.augment_mode == "append":
        examples = appended(examples, _augmentation(config, examples).examples)
    if _kept is not None:
        _kept[key] = examples
    return examples


def count_training_examples(config: RunConfig, task: str) -> int:
    """How many a run would train on, without its tokenizer. Raises UserError where only that can tell."""
    corpus, most = config.corpus, _most(config, "train")
    declared = corpus.task(task)
    if declared.texts is None:
        return len(load_examples_of(config, task, "train"))
    if declared.texts.packed:
        raise UserError(f"how many sequences the packed texts of {task} make depends on the model: give --steps")
    count = sum(1 for _ in training_texts(declared, corpus.data, corpus.bad_rows))
    return count if most is None else min(most, count)


def _most(config: RunConfig, split: Split) -> int | None:
    return {"train": config.corpus.train_limit, "dev": config.corpus.eval_limit}.get(split)


def load_split(config: RunConfig, task: str, split: Split, tokenizer: Tokenizer) -> TokenisedSplit:
    """A split's tokens; of a training split, with the new rows that are drawn in the place of others."""
    if _kept is None:
        return _load_split(config, task, split, tokenizer)
    examples = config.corpus.model_dump_json(), task, split
    key = (*examples, config.heads.pair_encoding, tokenizer.fingerprint)
    if key not in _kept:
        _kept[key] = _load_split(config, task, split, tokenizer)
        _kept.pop(examples, None)  # their texts are not wanted any more
    return _kept[key]


def _load_split(config: RunConfig, task: str, split: Split, tokenizer: Tokenizer) -> TokenisedSplit:
    corpus = config.corpus
    if corpus.task(task).kind == "masked_lm":
        place = corpus.max_length, corpus.cache or default_cache_dir()
        most = _most(config, split)
        return load_texts(corpus.task(task), split, corpus.data, tokenizer, *place, corpus.bad_rows, most)
    examples = load_examples_of(config, task, split)
    tokenised = tokenise_as(config, examples, tokenizer)
    if split == "train" and corpus.augment_mode == "draw" and len(new := _augmentation(config, examples)):
        tokens = tokenise_as(config, new.examples, tokenizer)
        return AugmentedSplit.of(tokenised, tokens, new.sources, corpus.augment_share)
    return tokenised


def _augmentation(config: RunConfig, examples: Examples) -> Augmentation:
    corpus = config.corpus
    return read_augmentation(corpus.augmented, corpus.names, examples, part=corpus.train_limit is not None)


def tokenise_as(config: RunConfig, examples: Examples, tokenizer: Tokenizer) -> TokenisedSplit:
    """Examples as the run's model is to see them."""
    corpus, joint = config.corpus, config.heads.pair_encoding != "siamese"
    return tokenise(examples, tokenizer, corpus.max_length, corpus.cache, joint)


def tokenise_texts(config: RunConfig, task: Task, columns: Sequence[list[str]], tokenizer: Tokenizer) -> TokenisedSplit:
    """Texts of no data set, one list of n for each of the task's sentences, as the run's model is to see them; kept in
    no cache. Raises UserError for a text that is no Unicode."""
    for column in columns:
        for number, text in enumerate(column, 1):
            try:
                require_whole(text, f"text {number}")
            except ValueError as error:
                raise UserError(f"{error}; write it in UTF-8") from None
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"cache": None})})
    ids = [str(row) for row in range(len(columns[0]))]
    return tokenise_as(config, Examples(task, "test", "", ids, tuple(columns), None), tokenizer)


def load_splits(config: RunConfig, run: RunFolder, split: Split) -> dict[str, TokenisedSplit]:
    """The split of every task, with the tokens of the run's own tokenizer."""
    tokenizer = load_tokenizer(run.encoder)
    return {name: load_split(config, name, split, tokenizer) for name in config.corpus.names}


def build_plan(config: RunConfig, splits: Mapping[str, TokenisedSplit]) -> BatchPlan:
    """The batch plan over the training splits; `annealed` anneals over the configured budget."""
    sizes = {name: len(split) for name, split in splits.items()}
    batch = config.batch
    plan = BatchPlan(sizes, batch.batch_size, batch.task_schedule, config.seed, power=batch.batch_power)
    return replace(plan, anneal_steps=Budget(config.budget, plan.steps_per_epoch).planned_steps)
