"""transformers.BertModel, used as in the course's starter code: one padded batch for each column of sentences, so five
forward passes for the three tasks, the sum of their losses, one backward pass, torch.optim.AdamW.

Batches are padded to their longest sentence; with `grouped`, batches have sentences of like length, as
`group_by_length` of transformers' Trainer makes them: 50 batches are sorted and cut anew. Everything else is the same
as on our side: examples, weights, heads, dropout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel
from turns import Skipped, Step

TOGETHER = 50  # batches that are sorted by length, as in transformers' LengthGroupedSampler
Columns = Sequence[Mapping[str, Tensor]]  # input_ids and attention_mask of each column of sentences


class Multitask(nn.Module):
    """An encoder and a head for each task. A task is a dictionary: its `name`, `kind`, how many `columns` and
    `outputs` it has, and the `label_range` of a regression."""

    def __init__(self, folder: Path, tasks: Sequence[Mapping], dropout: float):
        super().__init__()
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.tasks, width = {task["name"]: task for task in tasks}, self.bert.config.hidden_size
        self.heads = nn.ModuleDict({task["name"]: _head(task, width, dropout) for task in tasks})

    def forward(self, name: str, columns: Columns) -> Tensor:
        """The task's raw outputs, (B, outputs)."""
        sides = [self._embed(**column) for column in columns]
        if len(sides) == 2:
            sides.append((sides[0] - sides[1]).abs())
        return self.heads[name](torch.cat(sides, dim=-1)).float()

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)

    def loss(self, name: str, outputs: Tensor, labels: Tensor) -> Tensor:
        task = self.tasks[name]
        if task["kind"] == "classification":
            return F.cross_entropy(outputs, labels.long())
        if task["kind"] == "binary":
            return F.binary_cross_entropy_with_logits(outputs[:, 0], labels)
        return F.mse_loss(self.predictions(name, outputs), labels)

    def predictions(self, name: str, outputs: Tensor) -> Tensor:
        task = self.tasks[name]
        if task["kind"] == "classification":
            return outputs.argmax(-1)
        if task["kind"] == "binary":
            return outputs[:, 0] > 0
        low, high = task["label_range"]
        return low + (high - low) * outputs[:, 0].sigmoid()


def _head(task: Mapping, width: int, dropout: float) -> nn.Sequential:
    inputs = width * (3 if task["columns"] == 2 else 1)
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, task["outputs"]),
    )


def describe(tasks: Sequence) -> list[dict]:
    """Our declarations of tasks as such dictionaries. Raises Skipped for a kind that the peers here do not have."""
    for task in tasks:
        if task.kind not in ("classification", "binary", "regression"):
            raise Skipped(f"the peer has no tasks of the kind {task.kind}, such as {task.name}")
    return [
        {
            "name": task.name,
            "kind": task.kind,
            "columns": 2 if task.is_pair else 1,
            "outputs": task.outputs,
            "label_range": task.label_range if task.kind == "regression" else None,
        }
        for task in tasks
    ]


def build_model(run, config) -> Multitask:
    """With the weights of our model's encoder and heads before its first step."""
    from minbert.trainer.processes.random_state import seed_everything, stream
    from minbert.trainer.run.saved_model import build_model as build_ours

    model = Multitask(config.encoder.model, describe(config.corpus.tasks), config.heads.head_dropout)
    seed_everything(stream(config.seed, "weights"))
    for name, head in build_ours(config, run).heads.items():
        model.heads[name].load_state_dict(head.layers.state_dict())
    return model


def training(run, config, grouped: bool = False, compiled: bool = False) -> Step:
    from minbert.trainer.processes.world import pick_device
    from minbert.trainer.run.data import build_plan, load_splits

    device = pick_device(config.parallel)
    if compiled and device.type != "cuda":
        raise Skipped("torch.compile of the padded forward loses on a CPU: it is measured on a GPU")
    splits = load_splits(config, run, "train")
    plan = build_plan(config, splits)
    model = build_model(run, config).to(device).train()
    if compiled:
        model.bert = torch.compile(model.bert, dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    rows_of = by_length(plan, splits) if grouped else plan.rows
    low = config.parallel.precision == "bf16"

    def step(number: int) -> int:
        total, tokens = torch.zeros((), device=device), 0
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            for name, split in splits.items():
                rows = rows_of(name, number)
                columns = [padded(column, rows, device) for column in split.columns]
                labels = torch.from_numpy(split.labels[rows]).to(device)
                total = total + model.loss(name, model(name, columns), labels)
                tokens += int(split.lengths[rows].sum())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens

    return step


def padded(column, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """A column's sentences, padded to the longest."""
    sentences = [torch.from_numpy(column.ids[column.offsets[row] : column.offsets[row + 1]]).long() for row in rows]
    ids = nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def by_length(plan, splits):
    """The plan's examples, of each 50 steps in batches of like length, in any order."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}

    def rows(name: str, number: int) -> np.ndarray:
        block, place = divmod(number, TOGETHER)
        if (name, block) not in found:
            drawn = np.concatenate([plan.rows(name, block * TOGETHER + each) for each in range(TOGETHER)])
            ordered = drawn[np.argsort(-splits[name].lengths[drawn], kind="stable")]
            batches = np.split(ordered, TOGETHER)
            np.random.default_rng(block).shuffle(batches)
            found[name, block] = batches
        return found[name, block][place]

    return rows
