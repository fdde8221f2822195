"""Whether a run can fit into this machine at all: a lower bound of the memory that it needs, against what there is.

It is meant for sizes that are out of proportion, a zero too many: they are refused before anything is built, which
would take minutes and then the machine. What passes may still be too large.
"""

import torch

from minbert.data.errors import UserError
from minbert.data.machine import PROCESS, available, size
from minbert.trainer.config import RunConfig
from minbert.trainer.model.bert import BertConfig

LAYER = 5000  # of the Python objects that are a hidden layer
LEAST_TOKENS = 4  # of a sentence


def require_memory(config: RunConfig, shape: BertConfig, processes: int) -> None:
    """Raises UserError if `processes`, so many of the run's as are on this machine, need more memory than it has."""
    needed: dict[str, float] = {"the processes themselves": processes * PROCESS}
    if config.parallel.device == "cpu" or not torch.cuda.is_available():
        parameters, trained = _parameters(config, shape)
        share = processes / max(processes, config.parallel.processes)  # of what the processes share out
        stage = config.parallel.zero_stage or 0
        needed["weights"] = 4 * parameters * (share if stage == 3 else processes)
        copies = (config.optimizer.average_decay is not None) + bool(config.objective.proximal_weight)
        needed["gradients and optimizer"] = (12 + 4 * copies) * trained * (share if stage else processes)
        needed["a batch"] = _batch(config, shape) * share
        needed["layers"] = LAYER * config.heads.hidden_layers * len(config.corpus.tasks) * processes
    total, there = sum(needed.values()), available()
    if total > there:
        parts = ", ".join(f"{size(count)} for {name}" for name, count in needed.items() if count >= total / 20)
        raise UserError(
            f"this run needs at least {size(total)} of memory ({parts}), and this machine has {size(there)}.\n"
            "Ask for fewer processes, a smaller model or a smaller batch_size (or more accumulation)."
        )


def _parameters(config: RunConfig, shape: BertConfig) -> tuple[int, int]:
    """Parameters of the model, and those of them that are trained, at least."""
    width, inner = shape.hidden_size, shape.intermediate_size
    rows = shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size
    layers = shape.num_hidden_layers * (4 * width * width + 2 * width * inner)
    hidden, heads = config.heads.hidden_size or width, 0
    for task in config.corpus.tasks:
        if task.kind == "masked_lm":
            heads += width * width + shape.vocab_size
            continue
        if task.is_cosine:
            continue
        inputs = width * config.heads.embeddings(task)
        if config.heads.hidden_layers:
            heads += inputs * hidden + (config.heads.hidden_layers - 1) * (hidden + 1) * hidden
        heads += task.outputs * (hidden if config.heads.hidden_layers else inputs)
    frozen = config.encoder.freeze != "none"
    return rows * width + layers + heads, heads + (0 if frozen else rows * width + layers)


def _batch(config: RunConfig, shape: BertConfig) -> int:
    """The indices of a batch, and what the encoder keeps of a part of it for the backward pass."""
    batch = config.batch
    tasks = config.corpus.tasks if batch.task_schedule == "all" else ()
    sentences = sum(len(task.sentences) for task in tasks) or 1
    shared = sum(config.heads.joins(task) for task in tasks)  # a [CLS] for both sentences of a joint pair
    tokens = batch.batch_size * (sentences * LEAST_TOKENS - shared) // batch.accumulation
    kept = 6 * shape.hidden_size + shape.intermediate_size
    layers = 1 if config.encoder.freeze != "none" else shape.num_hidden_layers
    return 8 * batch.batch_size * max(1, len(tasks)) + 4 * tokens * kept * layers
