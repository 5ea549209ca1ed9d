"""All dropout of a model on a schedule: linear from the first step to the last.

Dropout that grows is curriculum dropout (Morerio et al. 2017); late and early dropout are those of Liu et al. 2023.
"""

from __future__ import annotations

from torch import nn

from engine.config import require


def share_at(step: int, total: int, end: float) -> float:
    """What dropout is multiplied by in a step: from 1 in the first one, number 0, to `end` in the last.

    >>> [share_at(step, 5, 0.5) for step in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    """
    return 1.0 + (end - 1.0) * step / max(1, total - 1)


class Dropouts:
    """The probabilities of a model's dropout: of torch's modules, and those that our fused layers keep and pass on.

    Adapters' own are among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._first = [
            (module, name, float(getattr(module, name)))
            for module in model.modules()
            for name in ("p" if isinstance(module, nn.Dropout) else "dropout_probability",)
            if isinstance(getattr(module, name, None), (int, float))
        ]

    def check(self, end: float) -> None:
        """Refuse a schedule that changes nothing, or ends where all is dropped.

        Raises:
            UserError: names regularise.dropout_end.
        """
        largest = max((first for _, _, first in self._first), default=0.0)
        require(largest > 0.0, "regularise.dropout_end", end, "the model has no dropout; give model.hidden_dropout too")
        remedy = f"dropout of {largest:g} would end at {largest * end:g}; give less than {1 / max(largest, 1e-9):g}"
        require(largest * end < 1.0, "regularise.dropout_end", end, remedy)

    def scale(self, share: float) -> None:
        """Set each probability to a share of its first value."""
        for module, name, first in self._first:
            setattr(module, name, first * share)
