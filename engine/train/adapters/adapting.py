"""What the loop asks of a run that trains a part of its model; of any other run it does nothing."""

from __future__ import annotations

from pathlib import Path

from engine.model.adapters.adapt import Adaptation
from engine.tasks.task import StepOutput
from engine.train.adapters.allocation import Allocation
from engine.train.adapters.movement import Movement, prove
from engine.zero.engine import ZeroEngine


class Adapting:
    """A run's adapters, made from an engine that has neither loaded nor stepped anything."""

    def __init__(self, zero: ZeroEngine, adaptation: Adaptation | None) -> None:
        """Args: adaptation is None where the task always trains all weights."""
        partial = adaptation is not None and adaptation.is_partial
        self._movement = Movement(zero) if partial else None
        adaptive = adaptation is not None and adaptation.adapter.method == "adalora"
        self._allocation = Allocation(zero, adaptation.adapter, adaptation.steps) if adaptation and adaptive else None

    @property
    def may_be_best(self) -> bool:
        """Whether the weights may be exported as the best: with AdaLoRA not before its budget is reached."""
        return self._allocation is None or self._allocation.is_final

    def penalised(self, output: StepOutput) -> StepOutput:
        """See `Allocation.penalised`."""
        return output if self._allocation is None else self._allocation.penalised(output)

    def after_update(self) -> None:
        """The update of a step is done; collective."""
        if self._allocation is not None:
            self._allocation.after_update()

    def prove_trained(self, output: Path) -> None:
        """At the end of the run, whose folder is `output`; collective.

        Raises:
            RunError: see `prove`.
        """
        if self._movement is not None:
            prove(self._movement, output, frozenset() if self._allocation is None else self._allocation.emptied())
