"""What the loop asks of a run that trains a part of its model or takes parts out; of any other it does nothing."""

from __future__ import annotations

from pathlib import Path

from engine.config import PruneConfig
from engine.model.adapters.adapt import Adaptation
from engine.tasks.task import StepOutput
from engine.train.adapters.allocation import Allocation
from engine.train.adapters.movement import Movement, prove
from engine.train.pruning.pruning import Pruning
from engine.zero.engine import ZeroEngine


class Adapting:
    """A run's adapters and pruning, made from an engine that has neither loaded nor stepped anything."""

    def __init__(
        self, zero: ZeroEngine, adaptation: Adaptation | None, prune: PruneConfig | None = None, steps: int = 0
    ) -> None:
        """
        Args:
            adaptation: None where the task always trains all weights.
            prune: what is taken out; None for nothing.
            steps: of the run.
        """
        partial = adaptation is not None and adaptation.is_partial
        self._movement = Movement(zero) if partial else None
        adaptive = adaptation is not None and adaptation.adapter.method == "adalora"
        self._allocation = Allocation(zero, adaptation.adapter, adaptation.steps) if adaptation and adaptive else None
        self._pruning = Pruning(zero, prune, steps) if prune is not None and prune.is_on else None

    @property
    def may_be_best(self) -> bool:
        """Whether the weights may be exported as the best: with AdaLoRA or pruning not before what is kept stays."""
        return all(each is None or each.is_final for each in (self._allocation, self._pruning))

    def penalised(self, output: StepOutput) -> StepOutput:
        """See `Allocation.penalised`."""
        return output if self._allocation is None else self._allocation.penalised(output)

    def after_update(self) -> None:
        """The update of a step is done; collective."""
        for each in (self._allocation, self._pruning):
            if each is not None:
                each.after_update()

    def prove_trained(self, output: Path) -> None:
        """At the end of the run, whose folder is `output`; collective.

        Raises:
            RunError: see `prove`.
        """
        if self._movement is not None:
            prove(self._movement, output, frozenset() if self._allocation is None else self._allocation.emptied())
