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
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        columns = [list(column) for column in zip(*pairs)]
        batch = self.tokenizer(
            *columns, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.encoder.device)
        output = self.encoder(**batch)
        if self.pooling == "cls":
            return output.pooler_output
        mask = batch["attention_mask"][..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, task: str, texts: Texts) -> Tensor:
        """(n, outputs) of a task's head: logits of its classes or labels, or one number."""
        about = self.tasks[task]
        if about["sentences"] == 1:
            return self.heads[task](self.embed(texts))
        if about["pairs"] == "joint":
            readings = [texts, [(b, a) for a, b in texts]] if about["symmetric"] else [texts]
            return torch.stack([self.heads[task](self.embed(reading)) for reading in readings]).mean(0)
        u, v = (self.embed(column) for column in zip(*texts))
        if about["head"] == "cosine":
            return torch.nn.functional.cosine_similarity(u, v)[:, None]
        sides = [u, v, (u - v).abs()] if about["features"] == "siamese" else [u, v]
        return self.heads[task](torch.cat(sides, -1))

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
