"""Stochastic depth (Huang et al. 2016): in training a sequence skips a layer as a whole, by chance.

As they have it, the chance rises linearly with depth. Fan et al. 2020 (LayerDrop) train Transformers so. Nothing is
rescaled: a layer that normalises its sum gives states of the same size whether its inputs were skipped or not.

Packed sequences are skipped one by one, so a layer is computed for all of them, and no time is saved.

Shape legend: B sequences, T tokens in all of them, R tokens that the last layer is read of, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engine.config import require
from engine.config.optimizer import LAYER
from engine.model.packing import Packing, pick


@dataclass(frozen=True)
class Skip:
    """A forward hook of an encoder layer.

    The layer takes one or more states, [T, H] or None for none, then what the batch shares, a `Packing` or something
    that has one, and the tokens that are read, [R] or None. It gives as many states, [T, H] or [R, H], and the next
    layer reads no more of them than their sum.
    """

    chance: float
    """that a sequence skips the layer"""

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], made: Tensor | tuple[Tensor, ...]) -> Any:
        """What the layer made, or for the sequences that skip it what it was given; None leaves it as it is.

        The draw is from torch's generator of the device, so that a checkpoint and a recomputation repeat it.
        """
        if not layer.training:
            return None
        *entered, shared, read = given
        outputs = made if isinstance(made, tuple) else (made,)
        packing = shared if isinstance(shared, Packing) else cast(Packing, shared.packing)
        stays = torch.rand(packing.batch, device=outputs[0].device) >= self.chance
        kept = _of_rows(stays, packing, read, len(outputs[0]))
        chosen = tuple(
            torch.where(kept, output, torch.zeros_like(output) if states is None else _read(states, read))
            for output, states in zip(outputs, entered, strict=True)
        )
        return chosen if isinstance(made, tuple) else chosen[0]


def _read(states: Tensor, read: Tensor | None) -> Tensor:
    return states if read is None else pick(states, read)


def _of_rows(stays: Tensor, packing: Packing, read: Tensor | None, rows: int) -> Tensor:
    """What is drawn of sequences [B] for each row of a layer's output, [rows, 1]; true for rows of no sequence."""
    tokens = torch.repeat_interleave(stays, packing.sequences.lengths, output_size=packing.tokens)
    own = tokens if read is None else tokens.index_select(0, read)
    return F.pad(own, (0, rows - len(own)), value=True)[:, None]


def drop_layers(model: nn.Module, chance: float) -> None:
    """Let each of a model's L encoder layers l, counted from 1, be skipped with chance `chance` * l / L; in place.

    Raises:
        UserError: the architecture calls its layers otherwise.
    """
    found = {
        int(numbered[1]): module
        for name, module in model.named_modules()
        if (numbered := LAYER.search(f"{name}.")) and numbered.end() == len(name) + 1
    }
    require(bool(found) or not chance, "regularise.layer_drop", chance, "the model has no layers that can be skipped")
    for index, layer in found.items() if chance else ():
        layer.register_forward_hook(Skip(chance * (index + 1) / len(found)))
