"""Attention of packed sequences on GPUs: the variable-length flash attention (Dao 2023) inside torch.

The operators are private ones of torch. From 2.6 to 2.13 their arguments keep their order, as do their results; what
differs is called by position or passed on unread: the state of the random numbers is a pair of uint64 on the GPU from
2.7 on, seed and offset apart before, and 2.6 keeps the log-sum-exps by sequence. torch.use_deterministic_algorithms
makes the backward pass deterministic, at the price of memory; without it blocks add to the queries' gradient in any
order. The sources read: ATen/native/transformers/cuda/attention_backward.cu and flash_attn/flash_api.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.terms import EVERYWHERE

#: compute capability of the oldest GPUs (Ampere)
OLDEST = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
#: a head's width is a multiple of the first, and the second at most
WIDTHS = (8, 256)


def lacks_flash(device: torch.device) -> str | None:
    """Why a GPU has no flash attention; None if it has."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"flash attention needs compute capability {_dotted(OLDEST)}, and this GPU has {_dotted(capability)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def attends(dtype: torch.dtype, hidden: int, heads: int) -> bool:
    """Whether flash attention takes states of that type and width."""
    multiple, largest = WIDTHS
    return dtype in DTYPES and hidden % (heads * multiple) == 0 and hidden <= heads * largest


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    heads: int,
    dropout: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.varlen_attention`, in fp16 or bf16; dropout has steps of 1 / 256."""
    assert (left, right) == EVERYWHERE or query.shape[0] == key.shape[0], "with a window every token asks"
    split = [tensor.unflatten(1, (heads, tensor.shape[1] // heads)) for tensor in (query, key, value)]
    context, log_sum, random, unused, _ = torch.ops.aten._flash_attention_forward(
        *split,
        query_bounds,
        key_bounds,
        longest_query,
        longest_key,
        dropout,
        False,
        False,
        window_size_left=left,
        window_size_right=right,
    )
    return context.flatten(1), log_sum, random, unused


def varlen_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    log_sum: Tensor,
    random: Tensor,
    unused: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    heads: int,
    dropout: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.varlen_attention_backward`, in fp16 or bf16."""
    tensors = (grad, query, key, value, context)
    split = [tensor.unflatten(1, (heads, tensor.shape[1] // heads)) for tensor in tensors]
    gradients = torch.ops.aten._flash_attention_backward(
        *split,
        log_sum,
        query_bounds,
        key_bounds,
        longest_query,
        longest_key,
        dropout,
        False,
        random,
        unused,
        window_size_left=left,
        window_size_right=right,
    )
    of_query, of_key, of_value = (tensor.flatten(1) for tensor in gradients)
    return of_query, of_key, of_value
