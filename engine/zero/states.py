"""Save what an engine trains, and load it into an engine of any other ZeRO stage and number of ranks.

`engine.zero.wrappers` says which ranges of the parameters lie in the tensors that this rank's optimizer steps. Each
rank saves its ranges. In a load each first reads the ranges that it has now, alone; then DeepSpeed rounds them into the
model's weights as it does after a step, together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import dist
from engine.durable import FileFacts
from engine.optim.shard import Fragment, Shard
from engine.zero.archive import (
    INDEX_FILE,
    WEIGHT,
    Archive,
    Index,
    Range,
    Record,
    dtype_name,
    dtype_named,
    rank_file,
    write_index,
    write_tensors,
)
from engine.zero.wrappers.base import Wrapper

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
#: what changes of DeepSpeed's two kinds of loss scalers; one has no hysteresis
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class Snapshot:
    """What one rank saves of an engine."""

    rank: int
    tensors: dict[str, Tensor]
    """on the CPU and its own, or views of what training changes"""
    index: Index | None
    """of rank 0"""

    def write(self, folder: Path) -> dict[str, FileFacts]:
        """Write this rank's files durably; no collective.

        Raises:
            OSError: the folder can't be written.
        """
        files = {rank_file(self.rank): write_tensors(folder / rank_file(self.rank), self.tensors)}
        return files if self.index is None else {**files, INDEX_FILE: write_index(folder, self.index)}


def snapshot(wrapper: Wrapper, base: Collection[str] = (), *, copy: bool) -> Snapshot:
    """Weights, optimizer state and counters after an optimizer step; collective.

    Args:
        wrapper: of the engine that trains.
        base: names of frozen parameters that are not saved, because every start of the run has them already.
        copy: copy into host memory what is else a view that the next step changes: this rank's share of weights and
            states, for AdamW and LAMB 12 bytes a parameter divided by the ranks. What is swapped is always copied.

    Raises:
        UserError: the optimizer's tensors can't be mapped to parameters.
    """
    engine, rank = wrapper.engine, torch.distributed.get_rank()
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 0, "gradients of half a step aren't saved"
    found, optimizer = wrapper.shards(), wrapper.client
    own = [(number, piece) for number, shard in enumerate(found) for piece in shard.fragments]
    shares = shared_out(dist.gather_objects([_range(found[number], piece) for number, piece in own]))
    tensors: dict[str, Tensor] = {}
    for number, parts in groupby(shares[rank], key=lambda share: own[share[0]][0]):
        pieces = [(own[position][1], part) for position, part in parts]
        tensors |= _share(found[number], pieces, optimizer, copy=copy)
    frozen, buffers, index = _frozen(wrapper, found, base), _buffers(engine), None
    if rank == 0:
        untrained = frozen | buffers
        tensors |= {name: tensor.to("cpu", copy=True) for name, tensor in untrained.items()} if copy else untrained
        index = _index(wrapper, found, shares)
        index.frozen, index.buffers = ({name: list(t.shape) for name, t in kept.items()} for kept in (frozen, buffers))
        named = engine.module.named_parameters()
        index.base = {name: list(wrapper.shape_of(p)) for name, p in named if name in base}
    return Snapshot(rank, tensors, index)


def _share(
    shard: Shard, pieces: Sequence[tuple[Fragment, Range]], optimizer: torch.optim.Optimizer, *, copy: bool
) -> dict[str, Tensor]:
    """The weights and states of some ranges of a shard: views, or copies in host memory."""
    copy = copy or shard.swap is not None
    tensors = {}
    with shard.reading():
        for name, tensor in {WEIGHT: shard.tensor, **_states(shard, optimizer)}.items():
            for piece, part in pieces:
                begin = piece.start + part.start - piece.parameter_start
                view = tensor.detach().view(-1)[begin : begin + part.length]
                tensors[part.key(name)] = view.to("cpu", copy=True) if copy else view
    return tensors


def shared_out(everyone: Sequence[Sequence[Range]]) -> list[list[tuple[int, Range]]]:
    """What each rank writes: its own ranges, or its equal part of them if other ranks have the very same.

    Args:
        everyone: the ranges that each rank has.

    Returns:
        (index into the rank's ranges, that range or the part of it that the rank writes)
    """
    replicas: dict[tuple[Range, ...], list[int]] = {}
    for rank, ranges in enumerate(everyone):
        replicas.setdefault(tuple(ranges), []).append(rank)
    alike = [replicas[tuple(ranges)] for ranges in everyone]
    return [_part(ranges, alike[rank].index(rank), len(alike[rank])) for rank, ranges in enumerate(everyone)]


def _part(ranges: Sequence[Range], part: int, parts: int) -> list[tuple[int, Range]]:
    """One of `parts` equal parts of the ranges' elements, laid end to end."""
    total = sum(one.length for one in ranges)
    first, last = total * part // parts, total * (part + 1) // parts
    cut, position = [], 0
    for number, one in enumerate(ranges):
        begin, end = max(first - position, 0), min(last - position, one.length)
        if begin < end:
            cut.append((number, Range(one.name, one.start + begin, end - begin)))
        position += one.length
    return cut


def load(wrapper: Wrapper, folder: Path) -> None:
    """Put back the files of a `snapshot`, in whatever layout; collective.

    Raises:
        UserError: on every rank, if on any the files don't fit the model, are damaged or missing.
    """
    engine, own = wrapper.engine, wrapper.shards()
    archive = dist.agreed(lambda: _read(wrapper, own, folder))
    _refresh(wrapper, archive)
    wrapper.round_weights(own)
    for name in COUNTERS:
        setattr(engine, name, archive.index.counters[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # a step is complete
    for name, value in archive.index.loss_scaler.items():
        if hasattr(wrapper.scaler, name):
            setattr(wrapper.scaler, name, value)


@torch.no_grad()
def _read(wrapper: Wrapper, own: list[Shard], folder: Path) -> Archive:
    """Fill the tensors that this rank steps, and their states; no collective, since one rank may fail alone."""
    archive, engine = Archive(folder), wrapper.engine
    index = archive.index
    trained = {info.name: info.shape for shard in own for info in shard.parameters}
    others = {name: wrapper.shape_of(p) for name, p in engine.module.named_parameters() if name not in trained}
    buffers = {name: tuple(buffer.shape) for name, buffer in _persistent_buffers(engine).items()}
    archive.check("parameter", {name: r.shape for name, r in index.parameters.items()}, trained)
    archive.check("frozen parameter", index.frozen | index.base, others)
    archive.check("buffer", index.buffers, buffers)
    for name in (*index.frozen, *index.buffers):
        archive.kept(name)
    for shard in own:
        with shard.replacing():
            for piece in shard.fragments:
                part = _range(shard, piece)
                archive.fill(_view(shard.tensor, piece), part.name, part.start)
            _read_states(archive, shard, wrapper.client)
    return archive


def _read_states(archive: Archive, shard: Shard, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer state of a tensor anew from that of its parameters; padding, and what was not saved, is 0.

    Scalars such as the step are the largest of its parameters': those of a parameter that had no gradient at stage 0
    lag behind or are missing, while under ZeRO it would have been stepped with zeros.
    """
    records = [archive.index.parameters[info.name] for info in shard.parameters]
    state: dict[str, Any] = {}
    for name, dtype in {name: dtype for record in records for name, dtype in record.states.items()}.items():
        state[name] = torch.zeros_like(shard.tensor, dtype=dtype_named(dtype), requires_grad=False)
        for piece in shard.fragments:
            part = _range(shard, piece)
            if name in archive.index.parameters[part.name].states:
                archive.fill(_view(state[name], piece), part.name, part.start, name)
    group = optimizer.param_groups[shard.group]
    device = shard.tensor.device if group.get("fused") or group.get("capturable") else "cpu"  # as torch's own do
    for name in {name: None for record in records for name in record.scalars}:
        dtype, value = max((record.scalars[name] for record in records if name in record.scalars), key=lambda s: s[1])
        # A tensor of its own for each: torch's AdamW counts in place.
        state[name] = value if dtype is None else torch.tensor(value, dtype=dtype_named(dtype), device=device)
    optimizer.state.pop(shard.tensor, None)
    if state:
        optimizer.state[shard.tensor] = state


def _refresh(wrapper: Wrapper, archive: Archive) -> None:
    """Give the model the loaded buffers and frozen parameters; collective."""
    for name, buffer in _persistent_buffers(wrapper.engine).items():
        buffer.copy_(archive.kept(name))
    for name, parameter in wrapper.engine.module.named_parameters():
        if name in archive.index.frozen:
            with wrapper.gathered(parameter, modifier_rank=0):
                parameter.data.copy_(archive.kept(name))


def _range(shard: Shard, piece: Fragment) -> Range:
    return Range(shard.parameters[piece.parameter].name, piece.parameter_start, piece.length)


def _view(tensor: Tensor, piece: Fragment) -> Tensor:
    return tensor.view(-1)[piece.start : piece.start + piece.length]


def _is_cut(name: str, value: Any, shard: Shard) -> bool:
    """Whether a state has an element for each of the parameter's; of a parameter without dimensions the step hasn't."""
    return isinstance(value, Tensor) and value.shape == shard.tensor.shape and name != "step"


def _states(shard: Shard, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state.get(shard.tensor, {})
    return {name: value for name, value in state.items() if _is_cut(name, value, shard)}


def _scalars(shard: Shard, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """The states that are one number, with their types."""
    scalars: dict[str, list[Any]] = {}
    for name, value in optimizer.state.get(shard.tensor, {}).items():
        if isinstance(value, Tensor) and not _is_cut(name, value, shard):
            assert value.numel() == 1, f"the optimizer's state {name} of shape {list(value.shape)} can't be cut"
            scalars[name] = [dtype_name(value.dtype), value.item()]
        elif not isinstance(value, Tensor):
            scalars[name] = [None, value]
    return scalars


def _index(wrapper: Wrapper, own: list[Shard], shares: list[list[tuple[int, Range]]]) -> Index:
    """The index but for what is not trained."""
    engine, optimizer, scaler = wrapper.engine, wrapper.client, wrapper.scaler
    records: dict[str, Record] = {}
    for shard in own:
        states = {name: dtype_name(tensor.dtype) for name, tensor in _states(shard, optimizer).items()}
        scalars = _scalars(shard, optimizer)
        records |= {info.name: Record(list(info.shape), states, scalars) for info in shard.parameters}
    for rank, share in enumerate(shares):
        for _, part in share:
            records[part.name].pieces.append([part.start, part.length, rank])
    first = {id(p): name for name, p in engine.module.named_parameters()}
    named = engine.module.named_parameters(remove_duplicate=False)
    return Index(
        parameters=records,
        frozen={},
        buffers={},
        tied={name: first[id(p)] for name, p in named if name != first[id(p)]},
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        loss_scaler={name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)},
    )


def _frozen(wrapper: Wrapper, own: list[Shard], base: Collection[str]) -> dict[str, Tensor]:
    """On rank 0 the parameters that no optimizer steps, whole, on the CPU, without those of the base; collective
    at stage 3."""
    trained = {info.name for shard in own for info in shard.parameters}
    frozen = {}
    for name, parameter in wrapper.engine.module.named_parameters():
        if name not in trained and name not in base:
            with wrapper.gathered(parameter):
                if torch.distributed.get_rank() == 0:
                    frozen[name] = parameter.detach().cpu().clone()
    return frozen


def _buffers(engine: Any) -> dict[str, Tensor]:
    return {name: buffer.detach() for name, buffer in _persistent_buffers(engine).items()}


def _persistent_buffers(engine: Any) -> dict[str, Tensor]:
    saved = engine.module.state_dict().keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in saved}
