"""minBERT: the encoder of Devlin et al. 2019 ("BERT"), written from its parts, on unpadded sequences.

Every part but attention works token by token, so a batch of S sequences is one matrix of N real tokens, never an
(S, L) rectangle with padding in it. Attention alone must know where a sequence begins and ends; the batch's layout
(`minbert.data.batches.layout`) tells it. `Bert.forward_padded` takes and gives the usual rectangles.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minbert.data.batches.layout import Layout, Sentences
from minbert.trainer.model.attention import attend
from minbert.trainer.model.tokenwise import Embedding, LayerNorm, Linear, linear

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder, in the field names of a BERT `config.json`."""

    vocab_size: _Size
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    max_position_embeddings: _Size = 512
    type_vocab_size: _Size = 2
    layer_norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-12
    hidden_dropout_prob: _Share = 0.1
    attention_probs_dropout_prob: _Share = 0.1
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    pad_token_id: Annotated[int, Field(ge=0)] = 0


class WordEmbedding(Embedding):
    """Embeddings of token ids (N,); or, of states (M, H), their products with the embeddings of all tokens, and a bias
    (V,): (M, V). Both uses are calls of this module, as sharding gathers a weight for a call of its own module."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(input) if bias is None else linear(input, self.weight, bias)


class Embeddings(nn.Module):
    """The sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = WordEmbedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor) -> Tensor:
        summed = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)
        return self.dropout(self.norm(summed))


class SelfAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values are one matrix product."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        return self.output(attend(self.qkv(hidden), layout, self.heads, dropout))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden)))


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, the residual and a layer norm (add & norm)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, layout)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class Pooler(nn.Module):
    """tanh(W h + b) of the [CLS] token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls))


class Bert(nn.Module):
    """The encoder: token ids in, one hidden state per token out."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Pooler(config)
        self.fixed = 0  # so many parts, from the embeddings up, are not to be trained at present
        self.apply(self._initialise)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What may be frozen, or learn at a rate, by itself: `embeddings`, `layer 0`, ..., `pooler`."""
        layers = {f"layer {number}": layer for number, layer in enumerate(self.layers)}
        return {"embeddings": self.embeddings} | layers | {"pooler": self.pooler}

    def _initialise(self, module: nn.Module) -> None:
        """BERT's initialisation: normal weights of standard deviation `initializer_range`, zero biases."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def forward(self, sentences: Sentences) -> Tensor:
        """Hidden states of the last layer, (N, H), row by row as `sentences` are laid out."""
        return self.encode(self.embed(sentences), sentences.layout)

    def embed(self, sentences: Sentences) -> Tensor:
        """Embeddings (N, H)."""
        with self._graph(0):
            return self.embeddings(sentences.input_ids, sentences.layout.position, sentences.token_type_ids)

    def encode(self, hidden: Tensor, layout: Layout) -> Tensor:
        """From what `embed` gives to the last layer's hidden states (N, H)."""
        for number, layer in enumerate(self.layers, 1):
            with self._graph(number, hidden):
                hidden = layer(hidden, layout)
        return hidden

    def _graph(self, part: int, *inputs: Tensor) -> torch.set_grad_enabled:
        """Context of a part: what is fixed, and whose inputs want no gradient either, leaves none to keep for it."""
        wanted = part >= self.fixed or any(tensor.requires_grad for tensor in inputs)
        return torch.set_grad_enabled(wanted and torch.is_grad_enabled())

    def forward_padded(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(S, L) token ids and mask -> hidden states (S, L, H), zero at padding, and pooled output (S, H)."""
        sentences = Sentences.from_padded(input_ids, attention_mask, token_type_ids)
        layout, flat = sentences.layout, self(sentences)
        padded = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        padded[layout.sequence, layout.position] = flat
        return padded, self.pooler(flat[layout.starts])


def mean_pool(hidden: Tensor, layout: Layout) -> Tensor:
    """The mean of each sequence's hidden states, by its number: (N, H) -> (S, H)."""
    return _sums(hidden, layout.sequence, len(layout)) / layout.lengths.to(hidden.dtype)[:, None]


def pool_sides(hidden: Tensor, layout: Layout, types: Tensor) -> Tensor:
    """The same for the tokens of type 0 and those of type 1 apart: (N, H) and (N,) -> (2, S, H). Zeros where a sequence
    has none of a type."""
    place = types * len(layout) + layout.sequence
    count = _sums(hidden.new_ones(len(place), 1), place, 2 * len(layout))
    return (_sums(hidden, place, 2 * len(layout)) / count.clamp(min=1)).unflatten(0, (2, -1))


def _sums(rows: Tensor, place: Tensor, count: int) -> Tensor:
    """The sums of the rows (N, H) that have the same of `count` places (N,): (count, H)."""
    return rows.new_zeros(count, rows.shape[-1]).index_add(0, place, rows)
