"""Sequences of any lengths through a model, in packed batches of similar lengths.

Shapes: N sequences, B of a batch, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.data.loading.lengths import longest_first
from engine.errors import RunError
from engine.predict.predictor import Encoded, Predictor

#: tokens of a batch: on a CPU what its caches hold, on a GPU what fills it
TOKENS = {"cpu": 2048, "cuda": 32768}


@torch.no_grad()
def compute(predictor: Predictor, model: nn.Module, encoded: Encoded, device: torch.device, tokens: int | None) -> Any:
    """The logits of each sequence, fp32, in their order: a list of [classes], or [its tokens, classes].

    Args:
        model: in evaluation mode on `device`.
        tokens: most of a batch, unless a single sequence has more; None: as the device likes.

    Raises:
        RunError: a batch doesn't fit into the GPU.
    """
    limit = tokens or TOKENS.get(device.type, TOKENS["cuda"])
    lengths = np.array([len(ids) for ids in encoded.tokens], dtype=np.int64)
    results: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(lengths)
    for chosen in batches(lengths, limit):
        try:
            logits = predictor.logits(model, packed(encoded, chosen, device)).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            held = int(lengths[chosen].sum())
            raise RunError(f"batch_tokens: {held:,} tokens don't fit into the GPU; give fewer") from error
        parts = np.split(logits, np.cumsum(lengths[chosen])[:-1]) if predictor.on_tokens else list(logits)
        for index, part in zip(chosen.tolist(), parts, strict=True):
            results[index] = part
    return results


def compute_parts(
    predictor: Predictor, model: nn.Module, parts: Sequence[Encoded], device: torch.device, tokens: int | None
) -> list[Any]:
    """What `compute` gives of each of several chunks that were encoded apart; their sequences share batches."""
    together = Encoded(
        [ids for part in parts for ids in part.tokens], [length for part in parts for length in part.first_lengths]
    )
    logits = iter(compute(predictor, model, together, device, tokens))
    return [list(islice(logits, len(part.tokens))) for part in parts]


def batches(lengths: NDArray[np.int64], limit: int) -> Iterator[NDArray[np.int64]]:
    """Indices of the sequences of each batch, longest sequences first, at most `limit` tokens or one sequence."""
    order = longest_first(lengths)
    start, held = 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        if held and held + length > limit:
            yield order[start:place]
            start, held = place, 0
        held += length
    if held:
        yield order[start:]


def packed(encoded: Encoded, chosen: Sequence[int] | NDArray[np.int64], device: torch.device) -> dict[str, Any]:
    """Some sequences as the models' packed arguments: input_ids, token_type_ids, position_ids [T], lengths [B]."""
    parts = [encoded.tokens[index] for index in chosen]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    firsts = np.array([encoded.first_lengths[index] for index in chosen], dtype=np.int64)
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    arrays = {
        "input_ids": np.concatenate(parts),
        "token_type_ids": positions >= np.repeat(firsts, lengths),
        "position_ids": positions,
        "lengths": lengths,
    }
    tensors = {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in arrays.items()}
    return tensors | {"max_length": int(lengths.max())}
