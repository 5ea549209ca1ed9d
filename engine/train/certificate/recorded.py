"""One optimizer step as ZeRO's ranks took it: their tensors before it, and whole parameters put together after it.

Shape legend: n elements of a parameter, K rows of `exact.field_names`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import dist
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.train.certificate.exact import field_names
from engine.zero.engine import ZeroEngine

#: elements that are checked at a time
CHUNK = 1 << 20
#: (index into `Shard.parameters`, first element of the parameter, elements)
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Where a parameter is."""

    info: ParameterInfo
    shard: int
    """index into `Layout.shards`"""
    number: int
    """index into `Shard.parameters`"""


class Layout:
    """Which rank has what of every parameter; collective to make. Valid as long as `shards` is.

    Attributes:
        places: the trained parameters, largest first. Rank r of R puts together each R-th from the r-th on, so that
            those that are put together at the same time are of about one size.
        pieces: of each rank and shard, its pieces.
        shapes: of the trained parameters, in the model's order.
    """

    def __init__(self, zero: ZeroEngine) -> None:
        self.shards = zero.wrapper.shards()
        found = [
            Place(info, index, number)
            for index, shard in enumerate(self.shards)
            for number, info in enumerate(shard.parameters)
        ]
        self.places = sorted(found, key=lambda place: (-place.info.numel, place.info.name))
        self.rank, self.ranks = torch.distributed.get_rank(), zero.world_size
        own = [[_piece(fragment) for fragment in shard.fragments] for shard in self.shards]
        self.pieces: list[list[list[Piece]]] = dist.gather_objects(own)
        trained = [name for name, p in zero.model.module.named_parameters() if p.requires_grad]
        known = {place.info.name: place.info.shape for place in found}
        self.shapes = {name: known[name] for name in trained if name in known}
        self.missing = sorted(set(trained) - set(known))
        self.is_split = any(shard.process_group is not None for shard in self.shards)

    def gaps(self) -> list[str]:
        """Names of parameters that aren't stepped at all, or not each of their elements once."""
        return self.missing + [place.info.name for place in self.places if not self._is_stepped_once(place)]

    def _is_stepped_once(self, place: Place) -> bool:
        ranks = [self.of(place, rank) for rank in range(self.ranks)]
        if self.shards[place.shard].process_group is not None:
            return covers([piece for pieces in ranks for piece in pieces], place.info.numel)
        return all(covers(pieces, place.info.numel) for pieces in ranks)

    def of(self, place: Place, rank: int) -> list[Piece]:
        """A rank's pieces of a parameter."""
        return [piece for piece in self.pieces[rank][place.shard] if piece[0] == place.number]

    def is_mine(self, index: int) -> bool:
        """Whether this rank puts together `places[index]`."""
        return index % self.ranks == self.rank


def covers(pieces: Sequence[Piece], numel: int) -> bool:
    """Whether the pieces of a parameter hold each of its elements once."""
    end = 0
    for _, start, length in sorted(pieces, key=lambda piece: piece[1]):
        if start != end:
            return False
        end += length
    return end == numel


@dataclass
class _Record:
    """A shard before the step, flat, on the CPU."""

    weight: Tensor
    """where weights decay towards the start, what that makes of them"""
    states: tuple[Tensor | None, ...]
    """of the optimizer; None, which counts as zero, before the first step"""
    gradient: Tensor | None = None
    """as the ranks reduced it: neither unscaled nor clipped"""


class RecordedUpdate:
    """Remembers this rank's tensors, lets the step happen, and then puts whole parameters together.

    Attributes:
        loss_scale: what the loss was multiplied by before the backward pass.
        square: sum of squares of this rank's pieces of the gradient, by shard.
    """

    def __init__(self, zero: ZeroEngine, layout: Layout, states: Sequence[str], rates: Mapping[str, float]) -> None:
        """
        Args:
            states: the names of the optimizer's states, in the order of the rows.
            rates: learning rates of the step, by parameter.
        """
        self.zero, self.layout, self.states, self._rates = zero, layout, tuple(states), rates
        self._optimizer = zero.wrapper.client
        self.loss_scale = zero.loss_scale or 1.0
        self.square: dict[int, Tensor] = {}
        kept = {place.shard for index, place in enumerate(layout.places) if layout.is_mine(index)}
        self._records = {
            index: self._record(shard)
            for index, shard in enumerate(layout.shards)
            if shard.process_group is not None or index in kept
        }

    def _record(self, shard: Shard) -> _Record:
        state = self._optimizer.state.get(shard.tensor, {})
        kept = [state.get(name) for name in self.states]
        pull = self.zero.start_decay
        weight = _keep(shard.tensor) if pull is None else pull.exact(shard, self._rates[shard.parameters[0].name])
        return _Record(weight, tuple(None if one is None else _keep(one) for one in kept))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the gradients of the step that happens inside."""
        wrapper = self.zero.wrapper
        gradients = wrapper.gradients(self.layout.shards)
        if gradients is not None:
            self._keep_gradients(gradients)
            yield
            return
        with _before_call(wrapper.optimizer, "unscale_and_clip_grads", self._keep_present):
            yield

    def _keep_present(self) -> None:
        """ZeRO 1 to 3 have the gradient of a shard only while it is stepped, and never after unscaling it."""
        fused = self.zero.fused
        tensors = [shard.tensor for shard in self.layout.shards]
        self._keep_gradients([tensor.grad if fused is None else fused.gradient_of(tensor) for tensor in tensors])

    @torch.no_grad()
    def _keep_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for index, (shard, gradient) in enumerate(zip(self.layout.shards, gradients, strict=True)):
            if gradient is None or index in self.square:
                continue
            flat = gradient.detach().reshape(-1)
            parts = [flat[range_of(piece)] for piece in shard.fragments]
            squares = [part.double().square().sum() for part in parts]
            self.square[index] = torch.stack(squares).sum() if squares else flat.new_zeros((), dtype=torch.float64)
            if index in self._records:
                self._records[index].gradient = _keep(gradient)

    def gradient_norm(self) -> float:
        """L2 norm of the whole unscaled gradient before clipping; NaN if there is none, since the step was skipped."""
        if not self.square:
            return math.nan
        total = 0.0
        for index, square in self.square.items():
            group = self.layout.shards[index].process_group
            total += float(square if group is None else dist.sum_over_ranks(square, group))
        return math.sqrt(total) / self.loss_scale if total >= 0.0 else math.nan

    @torch.no_grad()
    def whole(self, *, first: bool) -> Iterator[tuple[Place, Tensor]]:
        """The parameters that this rank puts together, [K, n] fp32 each, one in memory at a time; collective.

        A parameter without a gradient at stage 0, where it isn't stepped, is left out.

        Args:
            first: leave out the states before the step, which are zero.
        """
        layout, fields = self.layout, len(field_names(self.states)) - first * len(self.states)
        for start in range(0, len(layout.places), layout.ranks):
            batch = layout.places[start : start + layout.ranks]
            mine = batch[layout.rank] if layout.rank < len(batch) else None
            if layout.is_split:
                blocks = self._exchange(batch, mine, fields)
            elif mine is not None and mine.shard in self.square:
                blocks = {layout.rank: self._block(mine, fields)}
            else:
                continue
            if mine is not None:
                yield mine, self._assemble(mine, blocks)

    def _exchange(self, batch: Sequence[Place], mine: Place | None, fields: int) -> dict[int, Tensor]:
        """Give each rank this one's pieces of its parameter; what all ranks have of this one's."""
        ranks = range(self.layout.ranks)
        outgoing = [self._block(place, fields) for place in batch]
        outgoing += [outgoing[0].new_empty(fields, 0)] * (len(ranks) - len(batch))
        lengths = [sum(piece[2] for piece in self.layout.of(mine, rank)) if mine else 0 for rank in ranks]
        incoming = dist.exchange([block.view(-1) for block in outgoing], [fields * length for length in lengths])
        return {rank: block.view(fields, -1) for rank, block in enumerate(incoming) if lengths[rank]}

    def _block(self, place: Place, fields: int) -> Tensor:
        """This rank's pieces of a parameter side by side, [K, their elements], on the device that trains."""
        shard, record = self.layout.shards[place.shard], self._records[place.shard]
        state = self._optimizer.state.get(shard.tensor, {})
        new = (shard.tensor.detach(), *(state.get(name) for name in self.states))
        flats = [*new, record.weight, record.gradient, *record.states][:fields]
        pieces = [piece for piece in shard.fragments if piece.parameter == place.number]
        block = torch.zeros(fields, sum(piece.length for piece in pieces), device=self.zero.device)
        for row, flat in zip(block, flats, strict=True):
            parts = row.split([piece.length for piece in pieces])
            for part, piece in zip(parts, pieces, strict=True):
                if flat is not None:
                    part.copy_(flat.view(-1)[range_of(piece)])
        return block

    def _assemble(self, place: Place, blocks: dict[int, Tensor]) -> Tensor:
        """The whole parameter from the blocks of the ranks that have pieces of it."""
        fields = next(iter(blocks.values())).shape[0]
        whole = torch.zeros(fields, place.info.numel, device=self.zero.device)
        for rank, block in blocks.items():
            pieces = self.layout.of(place, rank)
            columns = block.split([length for _, _, length in pieces], dim=1)
            for (_, start, length), column in zip(pieces, columns, strict=True):
                whole[:, start : start + length] = column
        return whole

    @torch.no_grad()
    def copies(self) -> tuple[list[int], list[int]]:
        """Of each of `layout.places` how many elements of the model's own parameter are not this rank's rounded
        masters, and a checksum that is the same on all ranks; collective at stage 3.

        At stage 0, where each rank has its own masters, the checksum is theirs.
        """
        model = dict(self.zero.model.module.named_parameters())
        stale, sums = [], []
        for place in self.layout.places:
            shard = self.layout.shards[place.shard]
            parameter = model[place.info.name]
            with self.zero.wrapper.gathered(parameter):
                copy = parameter.detach().view(-1)
                stale.append(
                    sum(_stale(copy, shard, piece) for piece in shard.fragments if piece.parameter == place.number)
                )
                sums.append(checksum(shard.tensor.detach() if shard.is_whole else copy))
        return stale, sums


def _piece(fragment: Fragment) -> Piece:
    return fragment.parameter, fragment.parameter_start, fragment.length


def range_of(piece: Fragment) -> slice:
    """The fragment's elements of its shard's flat tensor."""
    return slice(piece.start, piece.start + piece.length)


def _keep(tensor: Tensor) -> Tensor:
    """A flat copy on the CPU, so that what a step needs of a GPU's memory stays as it is."""
    return tensor.detach().reshape(-1).to("cpu", torch.float32, copy=True)


@contextlib.contextmanager
def _before_call(owner: Any, name: str, action: Callable[[], None]) -> Iterator[None]:
    """Do something before each call of a method, which may have been replaced on the object already."""
    own, method = vars(owner).get(name), getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        action()
        return method(*arguments, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _stale(copy: Tensor, shard: Shard, piece: Fragment) -> int:
    """Elements of a parameter's copy, flat, that are not the rounded elements of the shard's fragment."""
    master = shard.tensor.detach().view(-1)[range_of(piece)]
    copied = copy[piece.parameter_start : piece.parameter_start + piece.length]
    parts = zip(master.split(CHUNK), copied.split(CHUNK), strict=True)
    return sum(int((old.to(new.device, new.dtype) != new).sum()) for old, new in parts)


def checksum(tensor: Tensor) -> int:
    """A number that a change of any bits, or of their order, changes with near certainty."""
    bits = tensor.contiguous().view(-1).view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
    weights = torch.arange(1, min(CHUNK, len(bits)) + 1, device=bits.device)
    total = 0
    for part in bits.split(CHUNK):
        total = (31 * total + int((part * weights[: len(part)]).sum())) % 2**63
    return total
