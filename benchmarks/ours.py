"""This project's sides: the training step as `minbert train` builds it, and the scoring of pairs of sentences."""

from turns import Step

from minbert.data.sequences.tokens import load_tokenizer, tokenise
from minbert.trainer.assembly import assemble_engine, assemble_step
from minbert.trainer.config import RunConfig
from minbert.trainer.evaluation.scoring import predict, score
from minbert.trainer.processes import world as distributed
from minbert.trainer.run.data import build_plan, load_examples_of, load_splits
from minbert.trainer.run.folder import RunFolder


def training(run: RunFolder, config: RunConfig) -> Step:
    """A step of training, which counts this process's tokens. What differs between sides is an option of the run."""
    world = distributed.start(config.parallel)
    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    engine = assemble_engine(config, run, world, pretrained=True)
    step = assemble_step(config, engine, plan, splits, world)
    return lambda number: step(number).tokens


def steps(run: RunFolder, config: RunConfig) -> Step:
    """The same, which counts steps, for sides whose tokens differ."""
    step = training(run, config)
    return lambda number: int(step(number) > 0)


def scoring(run: RunFolder, config: RunConfig) -> Step:
    """From the texts of the pair tasks' dev splits to their scores, tokenised anew each time; counts sentences."""
    world, tokenizer = distributed.start(config.parallel), load_tokenizer(run.encoder)
    tasks = [task for task in config.corpus.tasks if task.is_pair]
    examples = {task.name: load_examples_of(config, task.name, "dev") for task in tasks}
    engine = assemble_engine(config, run, world, pretrained=True)
    engine.eval()

    def step(_: int) -> int:
        sentences = 0
        for task in tasks:
            split = tokenise(examples[task.name], tokenizer, config.corpus.max_length)
            predicted = predict(engine, task, split, world)
            score(task, predicted, split.labels)
            sentences += 2 * len(split)
        return sentences

    return step
