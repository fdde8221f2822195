"""A model of two tasks so small that whatever is done with it is quick, and a batch for it."""

from collections.abc import Sequence

import numpy as np
import torch
from known_tasks import QUORA, SST

from minbert.data.batches.batch import Batch, Portion, make_batch
from minbert.data.sequences.ragged import Ragged, ends
from minbert.data.sequences.split import TokenisedSplit
from minbert.data.task import Task
from minbert.trainer.model.bert import BertConfig
from minbert.trainer.model.multitask import MultitaskModel
from minbert.trainer.options import EncoderConfig, HeadsConfig

SHAPE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def build(dropout: float = 0.0, tasks: Sequence[Task] = (SST, QUORA)) -> MultitaskModel:
    torch.manual_seed(0)
    shape = BertConfig(**SHAPE, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = MultitaskModel(tasks, shape, EncoderConfig(), HeadsConfig(head_dropout=dropout))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


def build_batch() -> Batch:
    generator = np.random.default_rng(1)

    def split(lengths: list[int], columns: int, labels: list[float]) -> TokenisedSplit:
        tokens = Ragged(generator.integers(5, 50, sum(lengths)), ends([np.array(lengths)]))
        rows = np.arange(len(labels))
        parts = tuple(tokens.take(rows + side * len(rows)) for side in range(columns))
        return TokenisedSplit([str(row) for row in rows], parts, np.array(labels, np.float32))

    splits = {"sst": split([4, 7, 3], 1, [0.0, 4.0, 2.0]), "quora": split([5, 6, 8, 2], 2, [1.0, 0.0])}
    return make_batch(splits, {name: Portion.whole(np.arange(len(part))) for name, part in splits.items()})
