"""What a process does of a prediction: it opens the model once, and computes the chunks that it is given."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import current_process, parent_process
from typing import Any

import torch
from torch import nn

from engine import dist
from engine.errors import UserError
from engine.onnx.module import place
from engine.predict.batches import compute
from engine.predict.model import ModelFolder, open_folder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Predictor, predictor_of
from engine.predict.rows import Row
from engine.train.heap import keep_heap

#: oneDNN's option for how many primitives it keeps (1,024 by default), read when it computes for the first time
PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
#: enough for the shapes of one batch, which its layers share. The next batch has another number of tokens, and so other
#: shapes: what is kept of old ones lies scattered in malloc's heap, which grows by tensors that don't fit between
MOST_PRIMITIVES = 8


@dataclass(frozen=True)
class Computed:
    """The new columns of a chunk's rows."""

    columns: list[dict[str, Any]]
    truncated: int
    """rows whose text was cut"""


def compute_chunk(config: PredictConfig, rows: Sequence[Row]) -> Computed:
    """The new columns of these rows.

    Raises:
        UserError: a model that can't be opened, or a row without a text.
    """
    predictor, model, device = _opened(config)
    encoded = predictor.encode(rows)
    logits = compute(predictor, model, encoded, device, config.batch_tokens)
    return Computed(predictor.decode(encoded, logits), encoded.truncated)


@functools.lru_cache(maxsize=1)
def _opened(config: PredictConfig) -> tuple[Predictor, nn.Module, torch.device]:
    """Predictor, model and device of this process; kept for its next chunk."""
    if parent_process() is not None:  # a process of ours alone
        keep_heap()
    dist.set_threads(max(dist.local_size(os.environ), config.processes), None)
    folder = open_folder(config.model, config.base)
    device = device_for(folder, config.device)
    return predictor_of(folder, config), load(folder, config, device), device


def load(folder: ModelFolder, config: PredictConfig, device: torch.device) -> nn.Module:
    """The model, on this thread's device.

    Raises:
        UserError: as `ModelFolder.load`.
    """
    os.environ.setdefault(PRIMITIVES, str(MOST_PRIMITIVES))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each shape, without a bound
    return folder.load(device, config.precision)


def release() -> None:
    """Forget the model that this process has opened: its folder may soon hold another one."""
    _opened.cache_clear()


def device_for(folder: ModelFolder, wanted: str) -> torch.device:
    """The device of this process that can compute a model.

    Raises:
        UserError: a GPU is wanted, and there is none, or none that onnxruntime can use for a graph.
    """
    device = device_of(wanted)
    return place(wanted, device) if folder.is_onnx else device


def device_of(wanted: str) -> torch.device:
    """The device of this process: of several GPUs the one of its number.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    hidden = os.environ.get("DS_ACCELERATOR") == "cpu"  # as in training
    if wanted == "cpu" or (wanted == "auto" and (hidden or not torch.cuda.is_available())):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device: 'cuda' is not allowed; torch finds no GPU here: give cpu, or auto")
    return torch.device("cuda", own_number(os.environ, current_process().name) % torch.cuda.device_count())


def own_number(env: os._Environ[str] | dict[str, str], process: str) -> int:
    """The number of this process among those of its machine: mpirun's, or by the name that a pool gives it.

    >>> own_number({}, "MainProcess"), own_number({}, "SpawnProcess-3"), own_number({"MPI_LOCALRANKID": "2"}, "x")
    (0, 2, 2)
    """
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"):
        if env.get(name, "").isdigit():
            return int(env[name])
    number = process.rpartition("-")[2]
    return int(number) - 1 if number.isdigit() else 0
