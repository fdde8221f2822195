"""A run's data as its configuration wants them: examples, tokens, and the plan of its batches."""

from collections.abc import Mapping
from dataclasses import replace

from minbert.data.examples import Examples, limit
from minbert.data.plan import BatchPlan
from minbert.data.sources import load_examples
from minbert.data.split import TokenisedSplit
from minbert.data.task import Split
from minbert.data.tokens import Tokenizer, load_tokenizer, tokenise
from minbert.trainer.config import RunConfig
from minbert.trainer.run.budget import Budget
from minbert.trainer.run.folder import RunFolder


def load_examples_of(config: RunConfig, task: str, split: Split) -> Examples:
    """A split's examples, as many as the configuration wants."""
    corpus = config.corpus
    examples = load_examples(corpus.data, corpus.task(task), split, corpus.bad_rows)
    most = {"train": corpus.train_limit, "dev": corpus.eval_limit}.get(split)
    return examples if most is None else limit(examples, most)


def load_split(config: RunConfig, task: str, split: Split, tokenizer: Tokenizer) -> TokenisedSplit:
    return tokenise_as(config, load_examples_of(config, task, split), tokenizer)


def tokenise_as(config: RunConfig, examples: Examples, tokenizer: Tokenizer) -> TokenisedSplit:
    """Examples as the run's model is to see them."""
    corpus, joint = config.corpus, config.heads.pair_encoding == "joint"
    return tokenise(examples, tokenizer, corpus.max_length, corpus.cache, joint)


def load_splits(config: RunConfig, run: RunFolder, split: Split) -> dict[str, TokenisedSplit]:
    """The split of every task, with the tokens of the run's own tokenizer."""
    tokenizer = load_tokenizer(run.encoder)
    return {name: load_split(config, name, split, tokenizer) for name in config.corpus.names}


def build_plan(config: RunConfig, splits: Mapping[str, TokenisedSplit]) -> BatchPlan:
    """The batch plan over the training splits; `annealed` anneals over the configured budget."""
    sizes = {name: len(split) for name, split in splits.items()}
    plan = BatchPlan(sizes, config.batch.batch_size, config.batch.task_schedule, config.seed)
    return replace(plan, anneal_steps=Budget(config.budget, plan.steps_per_epoch).planned_steps)
