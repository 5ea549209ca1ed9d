"""The mean of the weights of several models of one kind: a run's last checkpoints, or several runs.

Of runs that start from the same weights it is a "uniform soup" (Wortsman et al. 2022): it is good where all end in one
basin of the loss, which takes the same data, and heads that begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from engine.export import config_of
from engine.model.adapters.folder import is_adapter
from engine.model.folder import (
    CONFIG_FILE,
    TUNED,
    WEIGHTS_FILE,
    export_huggingface,
    read_config,
    read_origin,
    tokenizer_files,
)
from engine.model.roundtrip import RoundTrip
from engine.train.checkpoint.folder import STATE_FILE, complete_checkpoints, read_state, refuse_damaged
from engine.zero.archive import Archive, full_weights

#: keys of a config.json that tell nothing of the model
UNTOLD = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")
#: the tokenizer's file whose options an export completes, and a checkpoint not
COMPLETED = "tokenizer_config.json"


@dataclass(frozen=True)
class Member:
    """One of the models, but for its weights."""

    path: Path
    """an export or a checkpoint"""
    config: Any
    tokenizer: Mapping[str, bytes]
    facts: Mapping[str, Any]
    """of its data and model; see `engine.tasks.identity`"""
    tuned: bool
    """whether thresholds were chosen for its weights"""

    @property
    def is_checkpoint(self) -> bool:
        return (self.path / STATE_FILE).is_file()

    @property
    def run(self) -> Path:
        """The folder of its run, if it is in one."""
        return self.path.parent.parent if self.is_checkpoint else self.path.parent

    def weights(self) -> dict[str, Tensor]:
        """Whole, by transformers' names.

        Raises:
            UserError: the file is missing or damaged.
        """
        if self.is_checkpoint:
            return full_weights(self.path)
        try:
            found: dict[str, Tensor] = load_file(self.path / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"folders: {self.path / WEIGHTS_FILE} cannot be read ({error}); leave it out") from error
        return found


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest checkpoints of a run, oldest first.

    Raises:
        UserError: there are fewer.
    """
    found = complete_checkpoints(run / "checkpoints")
    if len(found) < count:
        raise UserError(
            f"last: {count} is not allowed; {run} has {len(found)} checkpoints (train.keep says how many stay, "
            "train.save_interval how often they are made)"
        )
    return found[-count:]


def open_member(path: Path) -> Member:
    """A model by the folder of an export, a checkpoint, or a run, of which its export is meant.

    Raises:
        UserError: it is none, is damaged, or holds adapters.
    """
    if not (path / STATE_FILE).is_file() and (path / "export").is_dir():
        path = path / "export"
    try:
        if (path / STATE_FILE).is_file():
            return _open_checkpoint(path)
        if is_adapter(path):
            raise UserError(_adapters(path))
        config, origin = read_config(path / CONFIG_FILE), read_origin(path) or {}
    except (OSError, ValueError, TypeError) as error:
        remedy = "give exports, checkpoints (step-NNNNNN) or runs that have an export"
        raise UserError(f"folders: {str(path)!r} is no model of ours ({error}); {remedy}") from error
    return Member(path, config, tokenizer_files(path), origin.get("facts") or {}, bool(origin.get(TUNED)))


def _open_checkpoint(path: Path) -> Member:
    refuse_damaged(path)
    state = read_state(path)
    if Archive(path).index.base or state.config.get("adapter", {}).get("method", "none") != "none":
        raise UserError(_adapters(path))
    return Member(path, config_of(path, state), tokenizer_files(path), state.facts or {}, tuned=False)


def _adapters(path: Path) -> str:
    remedy = "give whole models, as zerobert export RUN --output FOLDER writes them, with --merge of adapters"
    return f"folders: {path} holds only the part of a model that was trained; {remedy}"


def check_alike(members: Sequence[Member]) -> None:
    """Refuse models of other dimensions, classes or tokenizers than the first.

    Raises:
        UserError: names the folder and what differs.
    """
    first, *others = members
    for other in others:
        for what, theirs, own in _differences(first, other):
            raise UserError(
                f"folders: {what} of {other.path} ({own}) is not that of {first.path} ({theirs}); "
                "average models of one kind"
            )


def _differences(first: Member, other: Member) -> list[tuple[str, str, str]]:
    """What differs, and how it is told of either."""
    left, right = ({k: v for k, v in one.config.to_dict().items() if k not in UNTOLD} for one in (first, other))
    found = [(k, _short(left.get(k)), _short(right.get(k))) for k in sorted(left.keys() | right.keys())]
    found = [(key, theirs, own) for key, theirs, own in found if left.get(key) != right.get(key)]
    for name in sorted((first.tokenizer.keys() | other.tokenizer.keys()) - {COMPLETED}):
        contents = [one.tokenizer.get(name, b"") for one in (first, other)]
        if contents[0] != contents[1]:
            found.append((name, f"{len(contents[0])} bytes", f"{len(contents[1])} bytes"))
    return found


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."


def mean_weights(members: Sequence[Member]) -> dict[str, Tensor]:
    """The mean of each weight, summed in fp64 and rounded to the type of the first; one model in memory at a time."""
    total: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for member in members:
        for name, tensor in member.weights().items():
            types.setdefault(name, tensor.dtype)
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {name: (tensor / len(members)).to(types[name]) for name, tensor in total.items()}


def average(members: Sequence[Member], output: Path, *, check: bool = True) -> RoundTrip | None:
    """Write the mean of models that are alike as an export; what it was compared with, if it was to be.

    Thresholds that were tuned for single ones are left out.

    Raises:
        UserError: see `check_alike` and `engine.model.folder.export_huggingface`.
    """
    check_alike(members)
    first = members[0]
    facts = {k: v for k, v in first.facts.items() if all(other.facts.get(k) == v for other in members)}
    origin = {"step": None, "best": None, "facts": facts, "averaged": [str(member.path) for member in members]}
    return export_huggingface(mean_weights(members), first.config, first.tokenizer, output, origin, check=check)
