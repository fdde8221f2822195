"""minBERT: the encoder of Devlin et al. 2019 ("BERT"), written from its parts, on unpadded sentences.

Every part but attention works token by token, so a batch of S sentences is one matrix of N real tokens, never an
(S, L) rectangle with padding in it. Attention alone must know where a sentence begins and ends; `SentenceLayout`
tells it, once per batch for all layers. `Bert.forward_padded` takes and gives the usual rectangles.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minbert.data.batch import Sentences
from minbert.trainer.model.linear import Linear

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


class SentenceLayout:
    """Where the sentences lie in a matrix of N tokens, and how attention should visit them.

    On a CPU the sentences are ordered by length and those of equal length share one call without a mask: no padding
    at all, and small calls are cheap there. On a GPU few large calls win: queries, keys and values alone are padded to
    the longest sentence, with a mask (`grouped=False`).
    """

    def __init__(self, lengths: list[int], device: torch.device, grouped: bool | None = None):
        if not lengths:
            raise ValueError("a batch needs at least one sentence")
        self.lengths = torch.tensor(lengths)
        self.grouped = device.type == "cpu" if grouped is None else grouped
        ends = self.lengths.cumsum(0)
        starts = ends - self.lengths
        self.starts = starts.to(device)  # (S,) the token that opens each sentence: its [CLS]
        sentence = torch.repeat_interleave(torch.arange(len(lengths)), self.lengths)
        position = torch.arange(int(ends[-1])) - starts[sentence]
        self.sentence = sentence.to(device)  # (N,) the sentence of each token
        self.position = position.to(device)  # (N,) its place therein
        self.order = self.restore = None
        if self.grouped:
            by_length = torch.argsort(self.lengths, stable=True)
            rank = torch.empty_like(by_length)
            rank[by_length] = torch.arange(len(lengths))
            self.order = torch.argsort(rank[sentence], stable=True).to(device)  # tokens, shortest sentence first
            self.restore = torch.argsort(self.order)
            self.groups = [(length, len(list(run))) for length, run in groupby(sorted(lengths))]
        else:
            longest = max(lengths)
            self.cells = (sentence * longest + position).to(device)  # (N,) each token's cell in the (S, L) rectangle
            self.mask = (torch.arange(longest)[None, :] < self.lengths[:, None])[:, None, None, :].to(device)

    def attend(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        """softmax(q k^T / sqrt(d)) v within each sentence and head: (N, 3 H) -> (N, H)."""
        if self.grouped:
            # split, not slices: the backward of a slice fills a whole matrix with zeros for each group.
            parts = qkv.split([length * count for length, count in self.groups])
            shapes = [(count, length) for length, count in self.groups]
            return torch.cat(
                [_attention(part.view(*shape, -1), heads, dropout, None) for part, shape in zip(parts, shapes)]
            )
        count, longest = len(self.lengths), self.mask.shape[-1]
        padded = qkv.new_zeros(count * longest, qkv.shape[1]).index_copy(0, self.cells, qkv)
        return _attention(padded.view(count, longest, -1), heads, dropout, self.mask)[self.cells]


def _attention(qkv: Tensor, heads: int, dropout: float, mask: Tensor | None) -> Tensor:
    """(S, L, 3 H) -> (S L, H), every head attending over the L tokens that `mask` leaves."""
    sentences, length, width = qkv.shape
    q, k, v = qkv.view(sentences, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).reshape(sentences * length, width // 3)


class Embeddings(nn.Module):
    """The sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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

    def forward(self, hidden: Tensor, layout: SentenceLayout) -> Tensor:
        context = layout.attend(self.qkv(hidden), self.heads, self.attention_dropout if self.training else 0.0)
        return self.output(context)


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
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, layout: SentenceLayout) -> Tensor:
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

    def forward(self, sentences: Sentences, layout: SentenceLayout) -> Tensor:
        """Hidden states of the last layer, (N, H), token for token in the order of `sentences`."""
        return self.encode(self.embed(sentences, layout), layout)

    def embed(self, sentences: Sentences, layout: SentenceLayout) -> Tensor:
        """Embeddings (N, H), in the order in which the layers work."""
        input_ids, positions, types = sentences.input_ids, layout.position, sentences.token_type_ids
        if layout.order is not None:
            input_ids, positions, types = input_ids[layout.order], positions[layout.order], types[layout.order]
        with self._graph(0):
            return self.embeddings(input_ids, positions, types)

    def encode(self, hidden: Tensor, layout: SentenceLayout) -> Tensor:
        """From what `embed` gives to the last layer's hidden states (N, H), in the order of the sentences."""
        for number, layer in enumerate(self.layers, 1):
            with self._graph(number, hidden):
                hidden = layer(hidden, layout)
        return hidden if layout.restore is None else hidden.index_select(0, layout.restore)

    def _graph(self, part: int, *inputs: Tensor) -> torch.set_grad_enabled:
        """Context of a part: what is fixed, and whose inputs want no gradient either, leaves none to keep for it."""
        wanted = part >= self.fixed or any(tensor.requires_grad for tensor in inputs)
        return torch.set_grad_enabled(wanted and torch.is_grad_enabled())

    def forward_padded(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(S, L) token ids and mask -> hidden states (S, L, H), zero at padding, and pooled output (S, H)."""
        sentences = Sentences.from_padded(input_ids, attention_mask, token_type_ids)
        layout = SentenceLayout(sentences.lengths, input_ids.device)
        flat = self(sentences, layout)
        padded = flat.new_zeros(*input_ids.shape, flat.shape[-1])
        padded[attention_mask.bool()] = flat
        return padded, self.pooler(flat[layout.starts])


def mean_pool(hidden: Tensor, layout: SentenceLayout) -> Tensor:
    """The mean of each sentence's hidden states: (N, H) -> (S, H)."""
    summed = hidden.new_zeros(len(layout.lengths), hidden.shape[-1]).index_add(0, layout.sentence, hidden)
    return summed / layout.lengths.to(hidden.device, hidden.dtype)[:, None]
