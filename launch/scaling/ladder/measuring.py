"""One point: a model's size, its tokens and FLOPs, its held-out losses and abilities."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.config import RunConfig
from engine.export import export_checkpoint
from engine.scaling.heldout import held_out_loss
from engine.scaling.probes.masked import MaskedModel
from engine.scaling.probes.measure import measure
from engine.scaling.probes.request import Request
from engine.scaling.trained import trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launch.scaling.ladder.collect import Measured


def measure_point(
    each: Measured, config: RunConfig, sets: Mapping[str, str], request: Request, sequences: int
) -> dict[str, Any]:
    """The columns of a point, and the abilities that they are of.

    Raises:
        UserError: data or weights are gone, or don't go together.
    """
    columns = trained(config, each.step).columns()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _folder(each) as folder:
        model = MaskedModel(folder, device)
        length = config.data.sequence_length
        losses = {name: held_out_loss(model, Path(store), length, sequences) for name, store in sets.items()}
        scores = measure(folder, request, device)
    mean = sum(loss.loss for loss in losses.values()) / len(losses)
    error = math.sqrt(sum(loss.error**2 for loss in losses.values())) / len(losses)
    columns |= {"loss": mean, "loss_error": error}
    for name, loss in losses.items():
        columns |= {f"loss_{name}": loss.loss, f"loss_error_{name}": loss.error}
    return {"columns": {**columns, **scores.columns}, "abilities": [asdict(ability) for ability in scores.abilities]}


@contextmanager
def _folder(each: Measured) -> Iterator[Path]:
    if each.checkpoint is None:
        yield each.run / "export"
        return
    with tempfile.TemporaryDirectory(prefix="zerobert-") as room:
        export_checkpoint(each.checkpoint, Path(room) / "model")
        yield Path(room) / "model"
