"""What regularisers of weights and dropout ask of the loop; of a run without them nothing."""

from __future__ import annotations

import math

from engine import dist
from engine.config import RegulariseConfig, require
from engine.model.adapters.places import plain
from engine.model.pretrained import LoadReport
from engine.model.regularised.dropout import Dropouts, share_at
from engine.zero.engine import ZeroEngine


class Regularising:
    """A run's regularisers, made from an engine that has neither loaded nor stepped anything; collective.

    A resumed run builds the weights of its start again, from the same base, before it loads its own.

    Raises:
        UserError: nothing that is pre-trained would decay.
    """

    def __init__(self, zero: ZeroEngine, config: RegulariseConfig, total: int, loaded: LoadReport | None) -> None:
        """
        Args:
            total: optimizer steps of the run.
            loaded: what the model has from the folder that it starts from.
        """
        self._end, self._total = config.dropout_end, total
        self._dropouts = None if config.dropout_end is None else Dropouts(zero.model.module)
        if config.start_decay > 0.0 and loaded is not None:
            elements = sum(dist.gather_objects(zero.decay_to_start(pretrained(zero, loaded), config.start_decay)))
            remedy = "no weight of model.init_from is trained; leave it out, or freeze less"
            require(elements > 0, "regularise.start_decay", config.start_decay, remedy)
        if config.ema > 0.0:
            zero.keep_average(config.ema)

    def before_step(self, step: int) -> None:
        """Step number `step`, from 0, is about to begin."""
        if self._dropouts is not None and self._end is not None:
            self._dropouts.scale(share_at(step, self._total, self._end))


def pretrained(zero: ZeroEngine, loaded: LoadReport) -> dict[str, int]:
    """Of each parameter that has values of the start model's folder, how many elements, from the first on."""
    rows = {each.name: each.taken for each in loaded.reshaped}
    taken = set(loaded.taken)
    found = {}
    for wrapped, parameter in zero.model.module.named_parameters():
        name, shape = plain(wrapped), zero.wrapper.shape_of(parameter)
        if name in taken:
            found[wrapped] = rows.get(name, shape[0] if shape else 1) * math.prod(shape[1:])
    return found
