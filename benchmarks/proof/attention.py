"""Attention of packed sequences, and a whole layer: ours against plain torch on the padded grid.

Full sequences need no mask; uneven ones, as packed batches have, fill the grid as far as the title says. What ours is
here, `engine.kernels.dispatch.attention` decides.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig

from benchmarks.proof.operators import OURS, PLAIN, under
from benchmarks.proof.stage import Report, Setting
from benchmarks.proof.timing import Work, table
from engine.model.layers import BertLayer
from engine.model.packing import Packing


def lengths_of(batch: int, length: int, full: bool) -> list[int]:
    """Of a batch, evenly between a third of the longest and the longest where it isn't full."""
    if full:
        return [length] * batch
    return [max(1, round(length * (1 + 2 * index / (batch - 1)) / 3)) for index in range(batch)]


def layer(hidden: int, heads: int, device: torch.device) -> BertLayer:
    torch.manual_seed(1)
    config = BertConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)
    return BertLayer(config).to(device, torch.bfloat16).train()


def trained(module: torch.nn.Module, states: torch.Tensor, *others: Any) -> Work:
    """Forward and backward, gradients dropped."""
    slope = torch.ones_like(states)

    def run() -> None:
        module(states, *others).backward(slope)
        states.grad = None
        module.zero_grad(set_to_none=True)

    return run


def cudnn(allowed: bool, work: Work) -> Work:
    """The same work with torch's own attention allowed to take cuDNN's or not."""

    def run() -> None:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        work()

    return run


def rows(device: torch.device, hidden: int, heads: int, batch: int, length: int, full: bool) -> list[dict[str, Any]]:
    lengths = lengths_of(batch, length, full)
    tokens = sum(lengths)
    packing = Packing.from_lengths(torch.tensor(lengths, device=device), tokens, length)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16).requires_grad_()
    whole = layer(hidden, heads, device)
    attention = trained(whole.attention.self, states, packing, states, None)
    shape = f"{batch} x {length} ({100 * tokens / batch / length:.0f} % filled), width {hidden}, bf16, with dropout"
    found = []
    for title, work in (
        ("attention with its projections", attention),
        ("a whole layer", trained(whole, states, packing)),
    ):
        runs = {OURS: cudnn(False, under("auto", work)), PLAIN: cudnn(False, under("reference", work))}
        if device.type == "cuda":
            runs["plain torch, cuDNN allowed"] = cudnn(True, under("reference", work))
        found.append(table(f"{title}, {shape}, forward and backward", runs, device, repeats=10))
    return found


def run(setting: Setting, report: Report) -> None:
    device = torch.device(setting.device)
    shapes = [(64, 2, 4, 16)] if setting.toy else [(768, 12, 128, 128), (768, 12, 32, 512), (1024, 16, 32, 512)]
    for hidden, heads, batch, length in shapes:
        for full in (False, True):
            for row in rows(device, hidden, heads, batch, length, full):
                report.put(row)
