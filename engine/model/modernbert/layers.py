"""The parts of a ModernBERT encoder (Warner et al. 2024) on packed tokens, under transformers' parameter names.

Each sub-layer's output is added to the residual stream where the next norm reads it, in one pass. So what passes from
layer to layer is the last sub-layer's output and the stream without it.

Shape legend: T tokens of the packed batch, H hidden size, I intermediate size, A heads, D = H / A, S tokens in the
longest sequence, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import ModernBertConfig

from engine.kernels import dispatch
from engine.kernels.embedding import TiedGradient
from engine.kernels.layers import added_norm, fused_attention, normalised_sum, rotary_attention
from engine.kernels.linear import geglu, linear
from engine.kernels.terms import EVERYWHERE
from engine.kernels.terms import Window as Reach
from engine.model.activations import activation
from engine.model.layers import BertWordEmbeddings
from engine.model.modernbert.rotary import Rotation
from engine.model.modernbert.window import Window
from engine.model.packing import Packing, pick, with_spare_rows


class ModernBertLinear(nn.Linear):
    """A linear layer on packed tokens; see `engine.kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] to [T, outputs]."""
        return linear(x, self.weight, self.bias)


class ModernBertNorm(nn.LayerNorm):
    """Layer normalisation, without a bias unless the configuration says so."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, states: Tensor, output_dropout: float = 0.0) -> Tensor:  # type: ignore[override]
        """[T, H] to [T, H]."""
        dropout = output_dropout if self.training else 0.0
        return normalised_sum(states, None, self.weight, self.bias, self.eps, output_dropout=dropout)


class ModernBertResidualNorm(ModernBertNorm):
    """The norm of a residual stream to which a sub-layer's output is still to be added."""

    def forward(self, states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two [T, H] to their sum and its norm."""
        return added_norm(states, residual, self.weight, self.bias, self.eps)


class ModernBertEmbeddings(nn.Module):
    """Word embeddings, normalised; positions come in with attention."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = BertWordEmbeddings(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = ModernBertNorm(config)
        self.dropout_probability = config.embedding_dropout

    def forward(self, input_ids: Tensor, tied: TiedGradient | None = None) -> Tensor:
        """[T] to [T, H]."""
        normalised: Tensor = self.norm(self.tok_embeddings(input_ids, tied), self.dropout_probability)
        return normalised


@dataclass(frozen=True)
class Surroundings:
    """What a batch's layers of one kind of attention share."""

    packing: Packing
    rotation: Rotation
    window: Window | None
    """None for attention to the whole sequence"""

    def attend(self, projected: Tensor, heads: int, dropout: float, read: Tensor | None) -> Tensor:
        """[T, 3 H], a query, a key and a value each, to [T, H], or to the tokens `read` alone, with spare rows."""
        window = EVERYWHERE if self.window is None else (self.window.reach, self.window.reach)
        turning = dispatch.rotary_attention(projected, heads, window)
        if turning is not None:
            places = (self.rotation.cos, self.rotation.sin, self.packing.sequences, heads)
            context = rotary_attention(turning, projected, *places, read=read, dropout=dropout, window=window)
            return context if read is None else with_spare_rows(context)
        context = self._attend_turned(projected, heads, dropout, window)
        return context if read is None else pick(context, read)

    def _attend_turned(self, projected: Tensor, heads: int, dropout: float, window: Reach) -> Tensor:
        """The same of all tokens, in single steps."""
        rows = len(projected)
        query, key, value = projected.unflatten(-1, (3, heads, -1)).unbind(1)
        query, key = self.rotation.turn(query), self.rotation.turn(key)
        kernels = dispatch.attention(query.flatten(1), heads, window)
        if kernels is not None:
            query, key, value = (states.flatten(1).contiguous() for states in (query, key, value))
            sequences = self.packing.sequences
            return fused_attention(kernels, query, key, value, sequences, heads, dropout=dropout, window=window)
        if self.window is not None:
            return self.window.attend(query, key, value, dropout).flatten(1)
        query, key, value = (self.packing.to_grid(states).transpose(1, 2) for states in (query, key, value))
        mask = self.packing.key_mask
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.packing.from_grid(context.transpose(1, 2).flatten(2), rows)


class ModernBertAttention(nn.Module):
    """Attention over a token's own sequence, or over a window of it, with rotary positions."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.Wqkv = ModernBertLinear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = ModernBertLinear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.dropout_probability = config.attention_dropout
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(self, hidden: Tensor, surroundings: Surroundings, read: Tensor | None = None) -> Tensor:
        """[T, H] to [T, H], or of the tokens `read` alone, with spare rows."""
        dropout = self.dropout_probability if self.training else 0.0
        states: Tensor = self.out_drop(self.Wo(surroundings.attend(self.Wqkv(hidden), self.heads, dropout, read)))
        return states


class ModernBertMLP(nn.Module):
    """The feed-forward network (Shazeer 2020, GeGLU): of Wi's output one half, activated, gates the other."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.Wi = ModernBertLinear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = ModernBertLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = activation(config.hidden_activation)
        self.drop = nn.Dropout(config.mlp_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        gated = self.Wi(hidden)
        if type(self.act) is nn.GELU and self.act.approximate == "none":
            gated = geglu(gated)
        else:
            first, second = gated.chunk(2, -1)
            gated = self.act(first) * second
        output: Tensor = self.Wo(self.drop(gated))
        return output


class ModernBertLayer(nn.Module):
    """One Transformer layer, normalised before each sub-layer; the first takes normalised embeddings as they are."""

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        self.attn_norm = ModernBertResidualNorm(config) if index else nn.Identity()
        self.attn = ModernBertAttention(config)
        self.attention_type: str = config.layer_types[index]
        self.mlp_norm = ModernBertResidualNorm(config)
        self.mlp = ModernBertMLP(config)

    def forward(
        self, states: Tensor, residual: Tensor | None, surroundings: Surroundings, read: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What is still to be added to the residual stream, and the stream: two [T, H] to two of them.

        With `read`, [R] tokens in ascending order, to [R or more, H]: what follows attention sees these alone. Without
        `residual` the stream is `states`.
        """
        residual, normalised = (states, states) if residual is None else self.attn_norm(states, residual)
        attended = self.attn(normalised, surroundings, read)
        stream = residual if read is None else pick(residual, read)
        stream, normalised = self.mlp_norm(attended, stream)
        return self.mlp(normalised), stream
