"""The multitask model: one encoder, one head per task, one forward pass for whatever tasks a step trains.

Heads and losses are the paper's: a sentence head classifies the pooled embedding; a pair head sees the embeddings u and
v of its two sentences, encoded separately.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.data.batch import Batch, Sentences
from minbert.data.task import Task
from minbert.trainer.bert import Bert, BertConfig, SentenceLayout, mean_pool
from minbert.trainer.config import EncoderConfig, HeadsConfig


class Head(nn.Module):
    """Dropout, then `hidden_layers` times (linear, ReLU, dropout), then a linear layer to the task's outputs."""

    def __init__(self, task: Task, width: int, config: HeadsConfig):
        super().__init__()
        self.is_pair, self.siamese = task.is_pair, config.features == "siamese"
        inputs = width * ((3 if self.siamese else 2) if task.is_pair else 1)
        hidden = config.hidden_size or width
        layers: list[nn.Module] = [nn.Dropout(config.head_dropout)]
        for _ in range(config.hidden_layers):
            layers += [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(config.head_dropout)]
            inputs = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, task.outputs))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, H) sentence embeddings, or (2 B, H) with the second sentences after the first -> (B, outputs)."""
        if self.is_pair:
            u, v = embeddings.chunk(2)
            embeddings = torch.cat([u, v, (u - v).abs()] if self.siamese else [u, v], dim=-1)
        return self.layers(embeddings)


class MultitaskModel(nn.Module):
    """minBERT with a head for each of `tasks`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        bert_config: BertConfig,
        encoder: EncoderConfig,
        heads: HeadsConfig,
        precision: str = "fp32",
    ):
        super().__init__()
        self.tasks = {task.name: task for task in tasks}
        self.bert = Bert(bert_config)
        self.heads = nn.ModuleDict({task.name: Head(task, bert_config.hidden_size, heads) for task in tasks})
        self.pooling = encoder.pooling
        # Weights stay fp32 and autocast lowers the arithmetic, so that every back end, sharded or not, keeps the
        # gradients, their sums over processes and the optimizer in fp32.
        self.low_precision = precision == "bf16"
        self._freeze(encoder.freeze)

    def _freeze(self, freeze: str | int) -> None:
        frozen: list[nn.Module] = [self.bert.pooler] if self.pooling == "mean" else []  # unused then: no gradient
        if freeze == "encoder":
            frozen = [self.bert]
        elif freeze != "none":
            frozen += [self.bert.embeddings, *self.bert.layers[: 0 if freeze == "embeddings" else freeze]]
        for module in frozen:
            module.requires_grad_(False)

    def forward(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Raw outputs (B, outputs) in fp32 for each task's batch; the encoder sees all sentences at once."""
        sentences = Sentences.concatenate([batch.sentences for batch in batches.values()])
        device = sentences.input_ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.low_precision):
            embeddings = self.embed(sentences, SentenceLayout(sentences.lengths, device))
            counts = [len(batch.sentences.lengths) for batch in batches.values()]
            parts = dict(zip(batches, embeddings.split(counts)))
            return {name: self.heads[name](part).float() for name, part in parts.items()}

    def embed(self, sentences: Sentences, layout: SentenceLayout) -> Tensor:
        """Sentence embeddings (S, H)."""
        hidden = self.bert(sentences, layout)
        return mean_pool(hidden, layout) if self.pooling == "mean" else self.bert.pooler(hidden[layout.starts])


def example_losses(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """(B,) losses of the raw outputs (B, outputs): cross entropy, binary cross entropy (of several labels their mean),
    or the error of the sigmoid, stretched over the labels' range (the paper, section on the three tasks)."""
    if task.kind == "classification":
        return F.cross_entropy(outputs, labels.long(), reduction="none")
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")
    if task.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)
    error = F.mse_loss if task.loss == "squared_error" else F.l1_loss
    return error(_scaled(task, outputs), labels, reduction="none")


def predictions(task: Task, outputs: Tensor) -> Tensor:
    """(B,) predicted class, 0 or 1, or similarity; of several labels (B, classes) 0 or 1."""
    if task.kind == "classification":
        return outputs.argmax(-1).float()
    if task.kind == "binary":
        return (outputs[:, 0] > 0).float()
    if task.kind == "multilabel":
        return (outputs > 0).float()
    return _scaled(task, outputs)


def _scaled(task: Task, outputs: Tensor) -> Tensor:
    low, high = task.label_range
    return low + (high - low) * torch.sigmoid(outputs[:, 0])
