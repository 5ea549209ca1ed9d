"""The parts of a BERT encoder (Devlin et al. 2019) on packed tokens, under transformers' parameter names.

Shape legend: T tokens of the packed batch, R those whose states are read, H hidden size, B sequences, S tokens in the
longest, A heads, D = H / A, V keys and values of a prefix.

Under ZeRO-3 a module's weights are there only while that module's own `forward` runs, so no module reads the
parameters of another one, and what modules exchange are plain tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from engine.kernels import dispatch
from engine.kernels.embedding import TiedGradient
from engine.kernels.layers import fused_attention, normalised_sum
from engine.kernels.linear import linear, linear_gelu
from engine.model.activations import activation
from engine.model.packing import Packing, pick


class BertLinear(nn.Linear):
    """A linear layer on packed tokens; see `engine.kernels.linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[T, inputs] to [T, outputs]; with `gelu` to the exact GELU of that."""
        return (linear_gelu if gelu else linear)(x, self.weight, self.bias)


class BertLayerNorm(nn.LayerNorm):
    """Layer normalisation of a residual sum, with the dropout before the sum or after the normalisation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(  # type: ignore[override]
        self, states: Tensor, residual: Tensor | None = None, dropout: float = 0.0, output_dropout: float = 0.0
    ) -> Tensor:
        """[T, H] to [T, H]; see `engine.kernels.layers.normalised_sum`. Nothing is dropped in evaluation mode."""
        if not self.training:
            dropout = output_dropout = 0.0
        options = {"dropout": dropout, "output_dropout": output_dropout}
        return normalised_sum(states, residual, self.weight, self.bias, self.eps, **options)


class BertWordEmbeddings(nn.Embedding):
    """An embedding that may share its weight with a decoder."""

    def forward(self, input_ids: Tensor, tied: TiedGradient | None = None) -> Tensor:  # type: ignore[override]
        """[T] to [T, H]; with `tied` its gradient joins that of the decoder."""
        if tied is None:
            return super().forward(input_ids)
        return tied.embedding(input_ids, self.weight, self.padding_idx)


class BertEmbeddings(nn.Module):
    """Sum of word, segment and position embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = BertWordEmbeddings(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config)
        self.dropout_probability = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, tied: TiedGradient | None = None
    ) -> Tensor:
        """Three [T] index tensors to [T, H]."""
        words = self.word_embeddings(input_ids, tied)
        hidden = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        normalised: Tensor = self.LayerNorm(hidden, output_dropout=self.dropout_probability)
        return normalised


class BertSelfAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) of each token over its own sequence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = BertLinear(config.hidden_size, config.hidden_size)
        self.key = BertLinear(config.hidden_size, config.hidden_size)
        self.value = BertLinear(config.hidden_size, config.hidden_size)
        self.dropout_probability = config.attention_probs_dropout_prob
        #: gives keys and values, [V, H] each, that every sequence has in front of its own, as `Packing.prefix` tells
        self.prefix: nn.Module | None = None

    def forward(self, hidden: Tensor, packing: Packing, asking: Tensor, read: Tensor | None) -> Tensor:
        """[T, H] to [T, H], or to [Q, H]: `asking` [Q, H] has the states of the tokens `read`, and rows behind them."""
        dropout = self.dropout_probability if self.training else 0.0
        kernels = dispatch.attention(hidden, self.heads)
        query = self.query(hidden if kernels is None else asking)
        key, value = self.key(hidden), self.value(hidden)
        before = (None, None) if self.prefix is None else self.prefix()
        if kernels is not None:
            key, value = (
                own if first is None else packing.behind(own, first)
                for own, first in zip((key, value), before, strict=True)
            )
            return fused_attention(kernels, query, key, value, packing.asking(read), self.heads, dropout=dropout)
        context = nn.functional.scaled_dot_product_attention(
            self._split(query, packing),
            self._split(key, packing, before[0]),
            self._split(value, packing, before[1]),
            attn_mask=packing.key_mask,
            dropout_p=dropout,
        )
        states = packing.from_grid(context.transpose(1, 2).flatten(2), len(hidden))
        return states if read is None else pick(states, read)

    def _split(self, projected: Tensor, packing: Packing, before: Tensor | None = None) -> Tensor:
        """[T, H] to [B, A, S, D], or with `before` [V, H] to [B, A, V + S, D]."""
        grid = packing.to_grid(projected)
        if before is not None:
            grid = torch.cat((before.expand(packing.batch, -1, -1), grid), 1)
        return grid.view(*grid.shape[:2], self.heads, -1).transpose(1, 2)


class BertResidualOutput(nn.Module):
    """The end of a sub-layer: project to the hidden size, drop out, add the sub-layer's input, normalise."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = BertLinear(input_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config)
        self.dropout_probability = config.hidden_dropout_prob

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """[T, input_size] and [T, H] to [T, H]."""
        output: Tensor = self.LayerNorm(self.dense(states), residual, dropout=self.dropout_probability)
        return output


class BertAttention(nn.Module):
    """The self-attention sub-layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidualOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """[T, H] to [T, H]; with `read` see `BertLayer.forward`."""
        asking = hidden if read is None else pick(hidden, read)
        output: Tensor = self.output(self.self(hidden, packing, asking, read), asking)
        return output


class BertActivatedDense(nn.Module):
    """A linear layer and the configured activation."""

    def __init__(self, config: BertConfig, output_size: int) -> None:
        super().__init__()
        self.dense = BertLinear(config.hidden_size, output_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] to [T, output_size]."""
        if dispatch.gelu_in_linear(self.dense, self.activation, BertLinear):
            activated: Tensor = self.dense(hidden, gelu=True)
            return activated
        output: Tensor = self.activation(self.dense(hidden))
        return output


class BertLayer(nn.Module):
    """One Transformer layer, normalised after each sub-layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertActivatedDense(config, config.intermediate_size)
        self.output = BertResidualOutput(config, config.intermediate_size)

    def forward(self, hidden: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """[T, H] to [T, H].

        With `read`, [R] tokens in ascending order, to [R or more, H]: only these ask, though all are asked (where
        attention is torch's all ask), and what follows attention sees them alone.
        """
        attended = self.attention(hidden, packing, read)
        output: Tensor = self.output(self.intermediate(attended), attended)
        return output


class BertPooler(nn.Module):
    """A sequence's vector: its first token's state through a linear layer and tanh."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """[B, H] to [B, H]."""
        return torch.tanh(self.dense(first))
