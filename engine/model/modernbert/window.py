"""Attention within a window, on packed tokens, in memory that grows with the tokens and not with their square.

The packed tokens are cut into blocks as long as the window reaches to a side: a block's queries see the block before,
their own and the next, less what is too far away or belongs to another sequence. So there is no padded grid.
Shape legend: T packed tokens with the rows behind them, A heads, D width of a head, R reach, N = ceil(T / R) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.model.packing import Packing


@dataclass(frozen=True)
class Window:
    """Who sees whom. Not a container of tensors on purpose, see `engine.model.packing.Packing`."""

    reach: int
    mask: Tensor
    """[N, 1, R, 3 * R] true where a block's query sees a token of its neighbourhood"""

    @classmethod
    def of(cls, packing: Packing, rows: int, reach: int) -> Window:
        """Tokens of one sequence that are at most `reach` apart, in batches with `rows` rows."""
        lengths, blocks = packing.sequences.lengths, -(-rows // reach)
        device = lengths.device
        sequences = torch.arange(packing.batch, device=device)
        owner = torch.repeat_interleave(sequences, lengths, output_size=packing.tokens)
        # Rows behind the last token see themselves alone: a softmax over nothing is NaN.
        behind = torch.arange(-1, packing.tokens - blocks * reach - 1, -1, device=device)
        owner = torch.cat((owner, behind))
        padded = F.pad(owner, (reach, reach), value=packing.batch)
        seen = padded.unfold(0, 3 * reach, reach)[:, None]
        distance = torch.arange(-reach, 2 * reach, device=device) - torch.arange(reach, device=device)[:, None]
        return cls(reach, ((owner.view(blocks, reach, 1) == seen) & (distance.abs() <= reach))[:, None])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """Scaled dot-product attention, three [T, A, D] to one, with dropout of the probabilities."""
        rows, blocks = len(query), len(self.mask)
        asked = F.pad(query, (0, 0, 0, 0, 0, blocks * self.reach - rows)).unflatten(0, (blocks, self.reach))
        keys, values = self._neighbourhoods(key, blocks), self._neighbourhoods(value, blocks)
        asked = asked.transpose(1, 2)
        context = F.scaled_dot_product_attention(asked, keys, values, attn_mask=self.mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(0, 1)[:rows]

    def _neighbourhoods(self, states: Tensor, blocks: int) -> Tensor:
        """[T, A, D] to [N, A, 3 * R, D], zeros beyond the ends."""
        padded = F.pad(states, (0, 0, 0, 0, self.reach, (blocks + 1) * self.reach - len(states)))
        return padded.unfold(0, 3 * self.reach, self.reach).transpose(2, 3)
