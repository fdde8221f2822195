"""The encoder of this folder with the heads that it was trained with, for transformers.

Needs torch, transformers and safetensors, and nothing else of the program that trained it. From the folder:

    from multitask_encoder import MultitaskEncoder

    model = MultitaskEncoder.from_pretrained(".")       # or the name of a repository on the hub
    model.predict("sst", ["a warm , funny film"])       # what heads.json says of the tasks is in model.tasks
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Texts = Sequence[str] | Sequence[Sequence[str]]  # sentences, or pairs of them


class MultitaskEncoder(nn.Module):
    """A BERT encoder, and a head for each task of `heads.json`."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, described: dict[str, Any]):
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.pooling, self.max_length = described["pooling"], described["max_length"]
        self.tasks: dict[str, dict[str, Any]] = described["tasks"]
        self.heads = nn.ModuleDict(
            {name: _Head(task["layers"]) for name, task in self.tasks.items() if task["head"] == "layers"}
        )

    @classmethod
    def from_pretrained(cls, name: str, revision: str | None = None) -> "MultitaskEncoder":
        """The model in a folder, or in a repository on the hub, in evaluation mode."""
        from transformers import AutoModel, AutoTokenizer

        if Path(name).is_dir():
            folder = Path(name)
        else:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, revision=revision))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        described = json.loads((folder / "heads.json").read_text())
        model = cls(AutoModel.from_pretrained(folder), tokenizer, described)
        model.heads.load_state_dict(load_file(folder / "heads.safetensors"))
        return model.eval()

    def embed(self, texts: Texts) -> Tensor:
        """(n, H) embeddings of n sentences, or of n pairs of sentences that are read as one sequence."""
        batch, output = self._read(texts)
        if self.pooling == "cls":
            return output.pooler_output
        return _mean(output.last_hidden_state, batch["attention_mask"])

    def embed_sides(self, pairs: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """(n, H) embeddings of the first and of the second sentences of pairs that are read as one sequence."""
        batch, output = self._read(pairs)
        mask, types = batch["attention_mask"], batch["token_type_ids"]
        return _mean(output.last_hidden_state, mask * (1 - types)), _mean(output.last_hidden_state, mask * types)

    def forward(self, task: str, texts: Texts) -> Tensor:
        """(n, outputs) of a task's head: logits of its classes or labels, or one number."""
        about = self.tasks[task]
        if about["head"] == "cosine":
            u, v = (self.embed(column) for column in zip(*texts))
            return torch.nn.functional.cosine_similarity(u, v)[:, None]
        head = self.heads[task]
        if about["sentences"] == 1:
            return head(self.embed(texts))
        if about["pairs"] == "siamese":
            return head(self._features(about, *(self.embed(column) for column in zip(*texts))))
        readings = [texts, [(b, a) for a, b in texts]] if about["symmetric"] else [texts]
        if about["pairs"] == "joint":
            seen = [self.embed(reading) for reading in readings]
        else:
            seen = [self._features(about, *self.embed_sides(reading)) for reading in readings]
        return torch.stack([head(each) for each in seen]).mean(0)

    def _read(self, texts: Texts) -> tuple[Any, Any]:
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        fits: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        columns = [list(column) for column in zip(*pairs)]
        if len(columns) == 1:
            batch = dict(self.tokenizer(*columns, padding=True, return_tensors="pt", **fits))
        else:
            tokens = [self.tokenizer(column, add_special_tokens=False, **fits)["input_ids"] for column in columns]
            joined = [self._join(first, second) for first, second in zip(*tokens)]
            # Zeros where the attention mask has them, too, so that no token is seen there.
            batch = {key: pad_sequence([torch.tensor(row[key]) for row in joined], True) for key in joined[0]}
        batch = {key: value.to(self.encoder.device) for key, value in batch.items()}
        return batch, self.encoder(**batch)

    def _join(self, first: list[int], second: list[int]) -> dict[str, list[int]]:
        """`[CLS] first [SEP] second [SEP]`, cut as in training: the longer sentence first, and where both are, the
        first keeps the odd token. (Of the tokenizers of transformers, some leave it to the second.)"""
        room = self.max_length - 3
        kept = min(len(first), max(-(-room // 2), room - len(second)))
        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        sides = [start, *first[:kept], end], [*second[: room - kept], end]
        ids = [token for side in sides for token in side]
        types = [0] * len(sides[0]) + [1] * len(sides[1])
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}

    def _features(self, about: dict[str, Any], u: Tensor, v: Tensor) -> Tensor:
        return torch.cat([u, v, (u - v).abs()] if about["features"] == "siamese" else [u, v], -1)

    @torch.no_grad()
    def predict(self, task: str, texts: Texts) -> list[Any]:
        """The name of each text's class, or of a binary task; a list of labels' names; or a number in the range."""
        about, outputs = self.tasks[task], self(task, texts)
        kind, classes = about["kind"], about["classes"]
        if kind == "classification":
            return [classes[index] for index in outputs.argmax(-1).tolist()]
        if kind == "binary":
            return [classes[int(value > 0)] for value in outputs[:, 0].tolist()]
        if kind == "multilabel":
            return [[name for name, value in zip(classes, row) if value > 0] for row in outputs.tolist()]
        low, high = about["range"]
        share = outputs[:, 0].clamp(0, 1) if about["head"] == "cosine" else torch.sigmoid(outputs[:, 0])
        return (low + (high - low) * share).tolist()


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of those of the states (n, L, H) that `mask` (n, L) names."""
    chosen = mask[..., None].to(hidden.dtype)
    return (hidden * chosen).sum(1) / chosen.sum(1)


class _Head(nn.Module):
    """Linear layers of the widths `sizes`, with ReLU between them. (Dropout, of training, holds a place.)"""

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(0.0)]
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.0)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)
