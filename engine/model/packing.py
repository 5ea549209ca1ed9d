"""Packed batches: sequences lie one after the other, so padding costs nothing outside attention.

Shape legend: B sequences, T tokens in all of them, S tokens in the longest, V keys and values of a prefix in front of
each sequence's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.terms import Sequences

#: a number of rows is rounded up by at most a part in so many
ROUNDING = 32


@dataclass(frozen=True)
class Packing:
    """The sequences of packed tokens, and where each token lies in the padded grid [B, S], if attention works on one.

    What only the grid needs is made when it is first asked for, once a micro-batch.
    Neither a tensor nor a container of tensors on purpose: DeepSpeed's ZeRO-3 hooks look into tuples, lists and
    dicts that modules exchange, and leave other objects alone.
    """

    batch: int
    max_length: int
    tokens: int
    """T; what is packed may have further rows, which belong to no sequence"""
    sequences: Sequences
    """where every token asks"""
    prefix: int = 0
    """V, see `behind`"""

    @classmethod
    def from_lengths(cls, lengths: Tensor, tokens: int, max_length: int | None = None, prefix: int = 0) -> Packing:
        """The packing of `tokens` tokens in sequences of `lengths` [B], each at least 1.

        Without `max_length` it is read from `lengths`, which waits for the device when they lie on a GPU.
        """
        width = int(lengths.max()) if max_length is None else max_length
        return cls(lengths.numel(), width, tokens, Sequences.of(lengths, tokens, width), prefix)

    def asking(self, read: Tensor | None) -> Sequences:
        """The sequences where only the tokens `read` [R] ask, in ascending order; all without."""
        return self._all_asking if read is None else self._with_prefix(self.sequences.asking(read))

    @cached_property
    def _all_asking(self) -> Sequences:
        return self._with_prefix(self.sequences)

    def _with_prefix(self, asking: Sequences) -> Sequences:
        """The same queries, which ask each sequence's prefix too."""
        if not self.prefix:
            return asking
        bounds = asking.bounds + torch.arange(self.batch + 1, device=asking.bounds.device) * self.prefix
        tokens, longest = self.tokens + self.batch * self.prefix, self.max_length + self.prefix
        return replace(asking, bounds=bounds, tokens=tokens, longest=longest)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return places_behind(self.sequences.lengths, self.tokens, self.prefix)

    def behind(self, states: Tensor, prefix: Tensor) -> Tensor:
        """Keys or values [T or more, H] with `prefix` [V, H] in front of each sequence's: [T + B V, H]."""
        tokens, virtual = self._places
        packed = states.new_empty(self.tokens + self.batch * self.prefix, states.shape[1])
        return packed.index_copy_(0, tokens, states[: self.tokens]).index_copy_(
            0, virtual, prefix.repeat(self.batch, 1)
        )

    @property
    def starts(self) -> Tensor:
        """[B] index of each sequence's first token among the packed tokens."""
        return self.sequences.starts

    @property
    def full(self) -> bool:
        """Whether the sequences fill the grid; the sizes are known on the host, so this needs no look at the device."""
        return self.tokens == self.batch * self.max_length

    @cached_property
    def cells(self) -> Tensor | None:
        """[T] index of each token in the flattened grid; None when the sequences fill the grid."""
        if self.full:
            return None
        device = self.starts.device
        shift = torch.arange(self.batch, device=device) * self.max_length - self.starts
        of_tokens = torch.repeat_interleave(shift, self.sequences.lengths, output_size=self.tokens)
        return torch.arange(self.tokens, device=device) + of_tokens

    @cached_property
    def key_mask(self) -> Tensor | None:
        """[B, 1, 1, V + S] true where the grid holds a token or a prefix; None when the sequences fill the grid."""
        if self.full:
            return None
        held = torch.arange(self.max_length, device=self.starts.device) < self.sequences.lengths[:, None]
        return F.pad(held, (self.prefix, 0), value=True)[:, None, None, :]

    def to_grid(self, packed: Tensor) -> Tensor:
        """[T or more, ...] to [B, S, ...]; cells without a token hold zeros."""
        packed = grid = packed[: self.tokens] if len(packed) > self.tokens else packed
        if self.cells is not None:
            grid = packed.new_zeros(self.batch * self.max_length, *packed.shape[1:]).index_copy_(0, self.cells, packed)
        return grid.view(self.batch, self.max_length, *packed.shape[1:])

    def from_grid(self, grid: Tensor, rows: int) -> Tensor:
        """[B, S, H] to [rows, H], zeros from row T on."""
        flat = grid.flatten(0, 1)
        packed = flat if self.cells is None else flat.index_select(0, self.cells)
        return F.pad(packed, (0, 0, 0, rows - self.tokens)) if rows > self.tokens else packed


def places_behind(lengths: Tensor, tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Where rows are when `count` further ones come in front of each sequence's.

    Args:
        lengths: [B], tokens of each sequence; `tokens` in all.

    Returns:
        the tokens' rows [T], and the further ones' [B * count], int64.
    """
    further = torch.arange(1, len(lengths) + 1, device=lengths.device) * count
    of_tokens = torch.repeat_interleave(further, lengths, output_size=tokens)
    first = lengths.cumsum(0) - lengths + further - count
    virtual = first[:, None] + torch.arange(count, device=lengths.device)
    return torch.arange(tokens, device=lengths.device) + of_tokens, virtual.flatten()


def spare_rows(rows: int, like: Tensor) -> int:
    """Rows to add to `rows` so that matrix products of tensors like `like` meet few distinct shapes.

    oneDNN compiles a bf16 product anew for every number of rows, and keeps 1,024 of them: 0.5 ms and 0.55 MB each
    (measured), half a gigabyte after 80 steps of packed batches. Elsewhere none are added.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return 0
    return -rows % (1 << max(0, rows.bit_length() - ROUNDING.bit_length()))


def with_spare_rows(states: Tensor) -> Tensor:
    """[T, H] and behind it rows of zeros, as many as `spare_rows` says."""
    spare = spare_rows(len(states), states)
    return F.pad(states, (0, 0, 0, spare)) if spare else states


def pick(states: Tensor, rows: Tensor) -> Tensor:
    """Some rows [R] of [T, H], with spare ones."""
    return with_spare_rows(states.index_select(0, rows))


def sequence_means(states: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each sequence's states [T, H], summed in fp32: fp32 [B, H]; `lengths` [B] add up to T."""
    return torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)  # safe is a wait for the device


def pack(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> dict[str, Tensor]:
    """A padded batch as packed keyword arguments of the models.

    Args:
        input_ids: [B, S] token ids.
        attention_mask: [B, S], non-zero where there is a token; each sequence needs one.
        token_type_ids: [B, S] segment ids; zeros when absent.

    Returns:
        input_ids, token_type_ids, position_ids (a token's column) [T] and lengths [B], all int64.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    assert bool((lengths > 0).all()), "a sequence without tokens cannot be packed"
    segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return {
        "input_ids": input_ids[kept],
        "token_type_ids": segments[kept],
        "position_ids": columns[kept],
        "lengths": lengths,
    }
