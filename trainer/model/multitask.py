"""The multitask model: one encoder, one head per task, one forward pass for whatever tasks a step trains.

Heads are the paper's: a sentence head classifies the pooled embedding; a pair head sees the embeddings u and v of its
two sentences, encoded separately, or the one embedding of a pair that is encoded jointly. Where the loss compares
embeddings themselves, the head is their cosine. What a step minimises is an
objective's to say (`trainer/objectives/`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from minbert.data.batches.batch import Batch
from minbert.data.batches.layout import Sentences
from minbert.data.task import Task
from minbert.trainer.model.bert import Bert, BertConfig, mean_pool, pool_sides
from minbert.trainer.model.masked_lm import MaskedLMHead
from minbert.trainer.model.task_gradients import rows_of
from minbert.trainer.model.tokenwise import Linear
from minbert.trainer.options import EncoderConfig, HeadsConfig


class Head(nn.Module):
    """Dropout, then `hidden_layers` times (linear, ReLU, dropout), then a linear layer to the task's outputs."""

    def __init__(self, task: Task, width: int, config: HeadsConfig):
        super().__init__()
        self.siamese = config.features == "siamese"
        inputs = width * config.embeddings(task)
        hidden = config.hidden_size or width
        layers: list[nn.Module] = [nn.Dropout(config.head_dropout)]
        for _ in range(config.hidden_layers):
            layers += [Linear(inputs, hidden), nn.ReLU(), nn.Dropout(config.head_dropout)]
            inputs = hidden
        self.layers = nn.Sequential(*layers, Linear(inputs, task.outputs))

    def forward(self, sides: Tensor) -> Tensor:
        """(sides, B, H) embeddings, one of a sentence or of a pair as one sequence, two of a pair -> (B, outputs)."""
        if len(sides) == 1:
            return self.layers(sides[0])
        u, v = sides
        return self.layers(torch.cat([u, v, (u - v).abs()] if self.siamese else [u, v], dim=-1))


class CosineHead(nn.Module):
    """The cosine of two sentences' embeddings; nothing in it is trained."""

    def forward(self, sides: Tensor) -> Tensor:
        """(2, B, H) embeddings -> (B, 1)."""
        u, v = sides
        return nn.functional.cosine_similarity(u, v)[:, None]


def build_head(task: Task, shape: BertConfig, config: HeadsConfig) -> nn.Module:
    if task.is_cosine:
        return CosineHead()
    return MaskedLMHead(shape) if task.kind == "masked_lm" else Head(task, shape.hidden_size, config)


def head_part(task: str) -> str:
    return f"heads.{task}"


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
        self.heads = nn.ModuleDict({task.name: build_head(task, bert_config, heads) for task in tasks})
        self.pooling = encoder.pooling
        self.sided = {task.name for task in tasks if heads.has_sides(task)}
        # Weights stay fp32 and autocast lowers the arithmetic, so that every back end, sharded or not, keeps the
        # gradients, their sums over processes and the optimizer in fp32.
        self.low_precision = precision == "bf16"
        self._freeze(encoder.freeze)

    def _freeze(self, freeze: str | int) -> None:
        lowest = {"none": 0, "embeddings": 1, "encoder": None}  # this many parts, from the embeddings up
        names = list(self.bert.parts)[: lowest[freeze] if isinstance(freeze, str) else freeze + 1]
        if self.pooling == "mean" or all(task.kind == "masked_lm" for task in self.tasks.values()):
            names.append("pooler")  # unused then: no gradient
        for name in names:
            self.bert.parts[name].requires_grad_(False)

    @property
    def decoders(self) -> dict[str, MaskedLMHead]:
        """The heads of masked language models."""
        return {name: head for name, head in self.heads.items() if isinstance(head, MaskedLMHead)}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Everything that may be frozen, or learn at a rate, by itself: the encoder's parts, which the tasks share, and
        each task's head, `heads.TASK`."""
        return self.bert.parts | {head_part(task): head for task, head in self.heads.items()}

    @property
    def part_of(self) -> dict[str, str]:
        """The part that each parameter belongs to, by names."""
        parts = {id(p): name for name, module in self.parts.items() for p in module.parameters()}
        return {name: parts[id(parameter)] for name, parameter in self.named_parameters()}

    def forward(
        self,
        batch: Batch,
        objective: "Objective | None" = None,
        step: int = 0,
        targets: "Targets | None" = None,
    ) -> dict[str, Tensor]:
        """Raw outputs (B, outputs) in fp32 for each task of the batch; with an objective, its losses (B,) instead.

        Objectives are evaluated in here, so that a wrapper (DDP, DeepSpeed) sees one forward pass whatever they do.
        """
        forward = Forward(self, batch, step, targets=targets)
        return forward.outputs if objective is None else objective(forward)


Objective = Callable[["Forward"], dict[str, Tensor]]
Targets = Mapping[str, Mapping[str, Tensor]]  # who says it -> task -> what, (B, outputs)


class Forward:
    """One pass of the model over the batch of step `step`, in stages that are computed when they are asked for.

    `embeddings` takes the place of the encoder's own, (N, H) in the same order; `sentences` that of the batch's own,
    which are laid out alike. `targets` are what teachers say of the examples, for an objective that wants it.
    """

    def __init__(
        self,
        model: MultitaskModel,
        batch: Batch,
        step: int = 0,
        embeddings: Tensor | None = None,
        sentences: Sentences | None = None,
        targets: Targets | None = None,
    ):
        self.model, self.batch, self.step, self.targets = model, batch, step, targets or {}
        self.sentences = sentences or batch.sentences
        self.device = self.sentences.input_ids.device
        self._given = embeddings

    def again(self, embeddings: Tensor | None = None, sentences: Sentences | None = None) -> "Forward":
        """Another pass over the same batch: with dropout of its own, and with other embeddings or tokens."""
        return Forward(self.model, self.batch, self.step, embeddings, sentences or self.sentences, self.targets)

    def only(self, names: Collection[str]) -> "Forward":
        """The same pass over some of the batch's tasks alone: with the same embeddings, which it shares."""
        if not self.batch.tasks.keys() - set(names):
            return self
        parts = self.embeddings.split(self.sentences.layout.tokens)
        embeddings = torch.cat([part for name, part in zip(self.batch.tasks, parts) if name in names])
        return Forward(self.model, self.batch.only(names), self.step, embeddings, targets=self.targets)

    @cached_property
    def embeddings(self) -> Tensor:
        """What the first layer sees: word, position and type embeddings, normalised, after dropout; (N, H)."""
        if self._given is not None:
            return self._given
        with self._arithmetic(), self._tokens():
            return self.model.bert.embed(self.sentences)

    @cached_property
    def hidden(self) -> Tensor:
        """States of the last layer, (N, H)."""
        with self._arithmetic(), self._tokens():
            return self.model.bert.encode(self.embeddings, self.sentences.layout)

    @cached_property
    def pooled(self) -> dict[str, Tensor]:
        """Embeddings (sides, R B, H) of each task's examples in R readings, one reading after the other."""
        layout, tasks = self.sentences.layout, self.batch.tasks
        hidden, sided = self.hidden, self.model.sided & self.batch.tasks.keys()
        with self._arithmetic(), rows_of({name: part.sequences for name, part in tasks.items()}):
            if self.model.pooling == "mean":
                pooled = mean_pool(hidden, layout)
            else:
                pooled = self.model.bert.pooler(hidden[layout.starts])
            sides = pool_sides(hidden, layout, self.sentences.token_type_ids) if sided else None
        parts = pooled.split([part.sequences for part in tasks.values()])
        found = {name: own.unflatten(0, (part.sides, -1)) for (name, part), own in zip(tasks.items(), parts)}
        if sides is not None:
            found |= {name: sides.narrow(1, tasks[name].first, tasks[name].sequences) for name in sided}
        return found

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """Raw outputs (B, outputs), at least fp32: of several readings their mean.

        It is the raw outputs that are averaged, not probabilities, so that a loss, a confidence and a prediction are
        the same functions of them in training and at prediction. Of logits it is the (normalised) geometric mean of
        the readings' probabilities.
        """
        with self._arithmetic():
            found = {name: self._output(name) for name in self.batch.tasks}
        found = {name: outputs.to(torch.promote_types(outputs.dtype, torch.float32)) for name, outputs in found.items()}
        for name, part in self.batch.tasks.items():
            if part.readings > 1:
                found[name] = found[name].unflatten(0, (part.readings, -1)).mean(0)
        return found

    def _output(self, name: str) -> Tensor:
        head, part = self.model.heads[name], self.batch.tasks[name]
        if part.rows is None:
            pooled = self.pooled[name]
            with rows_of({name: pooled.shape[1]}):
                return head(pooled)
        hidden = self.hidden.index_select(0, part.rows)
        with rows_of({name: len(hidden)}):
            losses = head(hidden, part.labels, self.model.bert.embeddings.word)
        example = self.sentences.layout.sequence[part.rows] - part.first
        pair = torch.stack([losses, torch.ones_like(losses)], 1)
        return pair.new_zeros(len(part), 2).index_add(0, example, pair)

    def _tokens(self) -> AbstractContextManager:
        """Of the matrices that the encoder works on, which rows are whose."""
        layout = self.sentences.layout
        return rows_of(dict(zip(self.batch.tasks, layout.tokens, strict=True)), layout.ends)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.model.low_precision)
