"""The head of a masked language model: BERT's `cls.predictions`, a decoder tied to the word embeddings.

Only the states of hidden tokens come here: of a batch of N tokens M x V scores are held, not N x V. The product with
the embeddings is left to the module that owns them, as sharding gathers a weight for its own module.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.trainer.model.bert import BertConfig, WordEmbedding
from minbert.trainer.model.task_gradients import PerTask
from minbert.trainer.model.tokenwise import LayerNorm, Linear, whole

# transformers' name -> ours. There the scores' bias has a second name, and the weight beside it is the embeddings.
NAMES = {
    "cls.predictions.transform.dense.weight": "dense.weight",
    "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "bias",
}


class MaskedLMHead(nn.Module, PerTask):
    """A linear layer, GELU and layer norm, then a score for each token of the vocabulary: its embedding times the
    state, and a bias (Devlin et al. 2019, section 3.1)."""

    def __init__(self, shape: BertConfig):
        super().__init__()
        self.dense = Linear(shape.hidden_size, shape.hidden_size)
        self.norm = LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size))
        nn.init.normal_(self.dense.weight, std=shape.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, labels: Tensor, word: WordEmbedding) -> Tensor:
        """States (M, H) of hidden tokens, and which tokens (M,) they were -> negative log likelihoods (M,), fp32."""
        scores = word(self.norm(F.gelu(self.dense(hidden))), whole(self.bias))
        return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, reduction="none")


def from_transformers(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's parameters in a checkpoint of `BertForMaskedLM` or `BertForPreTraining`; none where it has no such
    head."""
    raw = {name.replace("LayerNorm.gamma", "LayerNorm.weight"): tensor for name, tensor in raw.items()}
    raw = {name.replace("LayerNorm.beta", "LayerNorm.bias"): tensor for name, tensor in raw.items()}
    return {ours: raw[theirs].float() for theirs, ours in NAMES.items() if theirs in raw}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's parameters by transformers' names."""
    return {theirs: state[ours].detach().cpu().contiguous() for theirs, ours in NAMES.items()}
