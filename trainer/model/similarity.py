"""How alike sentences are to a pretrained encoder: the cosine of their mean hidden states."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from minbert.data.errors import UserError
from minbert.data.sequences.tokens import load_tokenizer
from minbert.trainer.model.bert import Bert
from minbert.trainer.model.weights import find_checkpoint, load_weights, read_config

TOKENS_PER_BATCH = 8192  # padding included
LONGEST = 128  # tokens of a sentence that count


def require_encoder(model: str) -> None:
    """Raises UserError if `Similarity` could not have its encoder: a look at its small files."""
    if model == "tiny":
        raise UserError(
            "tiny has no pretrained weights to compare sentences by; give `minilm`, the folder of a BERT checkpoint, "
            "or a hub name"
        )
    folder = find_checkpoint(model)
    load_tokenizer(folder)
    read_config(folder)


class Similarity:
    """The encoder that `model` names, in the words of `--model`. Raises UserError if it cannot be had."""

    def __init__(self, model: str, device: torch.device):
        folder = find_checkpoint(model)
        self.tokenizer, self.device = load_tokenizer(folder), device
        self.bert = Bert(read_config(folder))
        load_weights(self.bert, folder)
        self.bert.to(device).eval()

    def __call__(
        self, first: Sequence[str], second: Sequence[str], progress: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """Cosines of `first[i]` and `second[i]`. `progress` gets how many sentences were just encoded."""
        texts = list(dict.fromkeys([*first, *second]))
        rows = {text: row for row, text in enumerate(texts)}
        embedded = self._embed(texts, progress)
        left, right = ([rows[text] for text in side] for side in (first, second))
        return cosine_similarity(embedded[left], embedded[right]).tolist()

    @torch.no_grad()
    def _embed(self, texts: list[str], progress: Callable[[int], None]) -> Tensor:
        """(n, H), the longest sentences first at work."""
        tokens = self.tokenizer.encode(texts, min(LONGEST, self.bert.config.max_position_embeddings))
        embedded = torch.empty(len(texts), self.bert.config.hidden_size)
        order = np.argsort(-tokens.lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = int(tokens.lengths[order[start]])
            rows = order[start : start + max(1, TOKENS_PER_BATCH // longest)]
            ids = np.zeros((len(rows), longest), np.int64)
            mask = np.arange(longest) < tokens.lengths[rows][:, None]
            ids[mask] = np.concatenate([tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows])
            given = torch.from_numpy(mask).to(self.device)
            hidden, _ = self.bert.forward_padded(torch.from_numpy(ids).to(self.device), given.long())
            embedded[torch.from_numpy(rows)] = (hidden.sum(1) / given.sum(1, keepdim=True)).cpu()
            progress(len(rows))
            start += len(rows)
        return embedded
