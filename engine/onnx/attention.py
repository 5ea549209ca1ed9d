"""Attention of transformers' models as one operator of onnxruntime.

onnxruntime's optimizer of transformer models finds attention in the graphs of torch's older exporter, and in those of
today's it finds none. So the operator is put there by the export itself: transformers lets a model's
attention be replaced by name, and torch's exporter takes operators of other domains as they are.

Shapes: B sequences, L their padded length, D width of a head; heads may differ from layer to layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: the name by which transformers knows it
NAME = "zerobert_onnx"
#: what is added to the logit of a key that isn't attended to: its share is exactly 0, and in fp16 two are finite
MASKED = -10_000.0


def register() -> str:
    """Make the attention known to transformers; its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, fused_attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    return NAME


def padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """[B, L] int32, 1 where there is a token; windows are `fused_attention`'s own affair."""
    return None if attention_mask is None else attention_mask.to(torch.int32)


def fused_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """com.microsoft.MultiHeadAttention; outside of an export it computes zeros.

    Args:
        query, key, value: [B, heads, L, D].
        attention_mask: as `padding_mask` makes it.
        sliding_window: a token attends to those that are fewer places away; None: to all.

    Returns:
        [B, L, heads, D], and no probabilities.
    """
    batch, heads, length, width = query.shape
    flat = [each.transpose(1, 2).reshape(batch, length, heads * width) for each in (query, key, value)]
    bias = None if sliding_window is None else window_bias(length, sliding_window, query)
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [*flat, None, attention_mask, bias],
        {"num_heads": heads, "scale": scaling, "mask_filter_value": MASKED},
        dtype=query.dtype,
        shape=flat[0].shape,
        version=1,
    )
    return attended.reshape(batch, length, heads, width), None


def window_bias(length: int, window: int, like: Tensor) -> Tensor:
    """[1, 1, L, L], what is added to the logits of tokens that attend to those fewer than `window` places away."""
    places = torch.arange(length, device=like.device)
    far = (places[:, None] - places).abs() >= window
    return torch.where(far, MASKED, 0.0).to(like.dtype)[None, None]
