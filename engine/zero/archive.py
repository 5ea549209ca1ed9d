"""The files of a run's weights and optimizer states: written in any cut, read in any other.

    index.json               every parameter: its shape and states, and in which file its ranges lie
    rank-NNNNN.safetensors   what rank N wrote, 1-D tensors "PARAMETER@START/weight", "PARAMETER@START/exp_avg", ...;
                             of rank 0 also frozen parameters and buffers, whole, under their names

Nothing in them tells of ZeRO: a range is one of the whole parameter, without padding, and no two overlap. Weights are
the fp32 masters. Files are mapped into memory, so reading a range reads no more than it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.durable import FileFacts, durable_file, write_durably
from engine.errors import UserError, first_line
from engine.optim.average import AVERAGE

INDEX_FILE = "index.json"
WEIGHT = "weight"
#: names of the types that safetensors files hold
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Range(NamedTuple):
    """parameter.view(-1)[start : start + length]"""

    name: str
    start: int
    length: int

    def key(self, state: str) -> str:
        """What the range of a state, or of the weight, is called in a rank's file."""
        return f"{self.name}@{self.start}/{state}"


@dataclass
class Record:
    """What the index tells of a trained parameter."""

    shape: list[int]
    states: dict[str, str] = field(default_factory=dict)
    """names and types of the optimizer states of the parameter's shape"""
    scalars: dict[str, list[Any]] = field(default_factory=dict)
    """of each other state its type, null for a Python number, and its value"""
    pieces: list[list[int]] = field(default_factory=list)
    """start, length and rank of the ranges that together are the parameter, ascending"""


@dataclass
class Index:
    """What the files hold together."""

    parameters: dict[str, Record]
    frozen: dict[str, list[int]]
    """shapes of the other parameters that are not trained"""
    buffers: dict[str, list[int]]
    tied: dict[str, str]
    """a tied parameter's further names, each with the first"""
    counters: dict[str, int]
    loss_scaler: dict[str, float | int | None]
    base: dict[str, list[int]] = field(default_factory=dict)
    """shapes of the parameters whose values are in the folder that the run started from, and in no file here"""


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write a safetensors file durably, one tensor after the other: views need no copy, a device's one at a time."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with durable_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return file.facts()


def write_index(folder: Path, index: Index) -> FileFacts:
    """Write the index durably, once it is sure that the pieces are every parameter once."""
    for name, record in index.parameters.items():
        record.pieces.sort()
        size = prod(record.shape)
        once = sum(length for _, length, _ in record.pieces) == size and _gap(record.pieces, 0, size) is None
        assert once, f"the ranges of {name} are not all of it once"
    return write_durably(folder / INDEX_FILE, json.dumps(asdict(index)).encode())


class Archive:
    """The written files, to be read in ranges.

    Raises:
        UserError: the index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, Any] = {}
        try:
            values = json.loads((folder / INDEX_FILE).read_text())
            records = {name: Record(**record) for name, record in values.pop("parameters").items()}
            self.index = Index(records, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(INDEX_FILE, first_line(error)) from error

    def check(self, kind: str, saved: Mapping[str, Iterable[int]], given: Mapping[str, Iterable[int]]) -> None:
        """Compare names and shapes of the saved parameters or buffers with those of this run.

        Raises:
            UserError: names the first that is missing, unknown or of another shape.
        """
        for name in sorted(saved.keys() | given.keys()):
            shapes = [list(side[name]) if name in side else None for side in (saved, given)]
            if shapes[0] != shapes[1]:
                of_file, of_run = (f"shape {shape}" if shape is not None else "none" for shape in shapes)
                raise UserError(
                    f"checkpoint: of the {kind} {name}, {self.folder / INDEX_FILE} holds {of_file} and this run has "
                    f"{of_run}; resume it with the model that was saved"
                )

    def fill(self, target: Tensor, name: str, start: int, state: str = WEIGHT) -> None:
        """Copy the range of a parameter that begins at `start` into the whole of a 1-D tensor.

        Raises:
            UserError: part of the range is missing, or its file is missing or damaged.
        """
        end, pieces = start + target.numel(), self.index.parameters[name].pieces
        gap = _gap(pieces, start, end)
        if gap is not None:
            raise self._damaged(INDEX_FILE, f"elements {gap[0]} to {gap[1]} of {name} are in no file")
        for begin, length, rank in pieces:
            first, last = max(begin, start), min(begin + length, end)
            if first < last:
                piece = self._tensor(rank, Range(name, begin, length).key(state), [length])
                target[first - start : last - start].copy_(piece[first - begin : last - begin])

    def whole(self, name: str, state: str = WEIGHT) -> Tensor:
        """A whole trained parameter's weight or state; see `fill` for errors."""
        record = self.index.parameters[name]
        full = torch.empty(prod(record.shape), dtype=dtype_named(record.states.get(state, "float32")))
        self.fill(full, name, 0, state)
        return full.view(record.shape)

    def kept(self, name: str) -> Tensor:
        """A frozen parameter or a buffer, mapped from its file.

        Raises:
            UserError: the file is missing or damaged.
        """
        return self._tensor(0, name, (self.index.frozen | self.index.buffers)[name])

    def _tensor(self, rank: int, key: str, shape: list[int]) -> Tensor:
        try:
            if rank not in self._open:
                self._open[rank] = safe_open(self.folder / rank_file(rank), framework="pt")
            tensor: Tensor = self._open[rank].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise self._damaged(rank_file(rank), first_line(error)) from error
        if list(tensor.shape) != shape:
            raise self._damaged(rank_file(rank), f"{key} has shape {list(tensor.shape)}, the index says {shape}")
        return tensor

    def _damaged(self, file: str, reason: str) -> UserError:
        return UserError(f"checkpoint: {self.folder / file} is damaged ({reason}); use another checkpoint")


def full_weights(folder: Path) -> dict[str, Tensor]:
    """The whole model's fp32 weights, averages where they were kept, tied ones under each of their names; without those
    of its base.

    Raises:
        UserError: a file is missing or damaged.
    """
    archive = Archive(folder)
    records = archive.index.parameters
    weights = {name: archive.whole(name, AVERAGE if AVERAGE in records[name].states else WEIGHT) for name in records}
    weights |= {name: archive.kept(name).float() for name in archive.index.frozen}
    return weights | {alias: weights[name] for alias, name in archive.index.tied.items()}


def dtype_named(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gap(pieces: list[list[int]], start: int, end: int) -> tuple[int, int] | None:
    """The first part of [start, end) that none of the ascending pieces covers."""
    for begin, length, _ in pieces:
        if start < begin:
            end = min(begin, end)
            break
        start = max(start, begin + length)
    return (start, end) if start < end else None
