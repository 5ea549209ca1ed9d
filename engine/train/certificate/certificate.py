"""The certificate of an update: what ZeRO's ranks made of their pieces, against the exact step of whole parameters.

Before a step every rank keeps its pieces of the fp32 weights, the states, and the gradient as it was reduced. After it
whole parameters are put together, each on one rank, and the optimizer's exact rule says in float64 what should have
become of them. The rules come from the run's configuration and the step's number, not from the optimizer that steps.
How the gradient came about is no part of it.
"""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import dist
from engine.config import OPTIMIZERS, OptimConfig
from engine.config.optimizer import Group, placed_groups
from engine.durable import written_aside
from engine.errors import RunError
from engine.train.certificate.exact import TINY, Comparison, Rule, compare
from engine.train.certificate.recorded import Layout, RecordedUpdate
from engine.train.log import say
from engine.zero.engine import ZeroEngine

#: Largest error of an update. tests/train/certificate/test_verify.py measures at most 4e-7, a few roundings of fp32.
BOUND = 1e-5
#: Largest relative error of the gradient norm that clipping goes by. DeepSpeed takes it in fp32 at stage 0 and in its
#: BF16_Optimizer, where torch on CPUs is off by 1e-3 for 2e7 elements and by 1e-2 for 1e8.
NORM_BOUND = 0.05
TABLE = "verify_update.csv"


def columns(states: Sequence[str]) -> tuple[str, ...]:
    """Of the table, for an optimizer with these states."""
    errors = ("error", "weights_error", *(f"{name}_error" for name in states))
    return ("step", "parameter", "elements", *errors, "stale_elements", "trust_ratio", "weight_norm", "update_norm")


@dataclass(frozen=True)
class ParameterFinding:
    """What is known of one parameter after a step."""

    name: str
    elements: int
    comparison: Comparison
    stale: int
    """elements of the model's own parameter that are not the rounded masters, over all ranks"""
    agreed: bool
    """whether all ranks have the same parameter"""

    @property
    def error(self) -> float:
        """The largest error; infinite if the model's parameter is wrong."""
        return math.inf if self.stale or not self.agreed else self.comparison.error

    def row(self, step: int) -> tuple[object, ...]:
        """The values of `columns`."""
        comparison = self.comparison
        errors = [f"{value:.3e}" for value in (self.error, comparison.weights, *comparison.states.values())]
        norms = [f"{value:.7g}" for value in (comparison.trust_ratio, comparison.weight_norm, comparison.update_norm)]
        return (step, self.name, self.elements, *errors, self.stale, *norms)

    def fault(self, factor: float) -> str:
        """What is wrong, the cause before what follows from it.

        Args:
            factor: what the gradient should have been multiplied by.
        """
        comparison = self.comparison
        for index, (name, error) in enumerate(comparison.states.items()):
            if not error <= BOUND:
                told = (
                    f"; its gradient was multiplied by {comparison.factor:.6g}, "
                    f"and loss scale and clipping make {factor:.6g}"
                )
                return f"{name} has an error of {error:.1e}" + (told if index == 0 else "")
        if not comparison.weights <= BOUND:
            return (
                f"the weights have an error of {comparison.weights:.1e}; they moved {comparison.length:.6g} times "
                f"as far as they should, by a trust ratio of {comparison.trust_ratio:.6g}"
            )
        if self.stale:
            return f"{self.stale} elements of the model's own weights are not the optimizer's, rounded"
        return "the ranks have different weights"


class UpdateCertificate:
    """Verifies the first updates of a run, also of a resumed one, but for those on NVMe; collective.

    Attributes:
        remaining: updates that are still to be verified. Two kinds of step don't count: those whose gradient is not
            finite, which change nothing, and those in which DeepSpeed raises fp16's loss scale: it does so before it
            divides the gradient by it, which is then too small unless it is clipped.
        findings: of the last update that was verified, the largest parameter first.
        seconds: what the last step's verification cost.
    """

    def __init__(self, zero: ZeroEngine, config: OptimConfig, updates: int, output: Path) -> None:
        """Args: rank 0 writes the table into the folder `output`."""
        self.zero, self.config, self.output = zero, config, output
        self.entry = OPTIMIZERS.get(config.name)
        self.remaining = updates
        self.findings: list[ParameterFinding] = []
        self.seconds = 0.0
        self._layout: Layout | None = None
        self._rows: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def watch(self, step: int, rate: float, *, last_micro_batch: bool = True) -> Iterator[None]:
        """Verify the update that happens inside, if there are any left to verify.

        Args:
            step: number of the optimizer step in the run, from 1.
            rate: its learning rate.
            last_micro_batch: whether there is an update.

        Raises:
            RunError: the update is wrong; the same on every rank.
        """
        self.seconds = 0.0
        if not (last_micro_batch and self.remaining > 0):
            yield
            return
        if self.zero.is_swapped:
            self.remaining = 0
            say("update not verified: that would take the memory that zero.offload_optimizer nvme saves")
            yield
            return
        start, skipped = time.perf_counter(), self.zero.skipped_steps
        layout = self._laid_out(step)
        rates = {name: rate * group.rate_multiplier for name, group in self._groups(layout).items()}
        recorded = RecordedUpdate(self.zero, layout, self.entry.states, rates)
        self.seconds = time.perf_counter() - start
        with recorded.recording():
            yield
        start = time.perf_counter()
        self._judge(recorded, step, skipped, rate)
        self.seconds += time.perf_counter() - start

    def _laid_out(self, step: int) -> Layout:
        if self._layout is None:
            self._layout = Layout(self.zero)
            if gaps := self._layout.gaps():
                raise self._failure(step, f"{gaps[0]}: not each of its elements is stepped once", len(gaps))
        return self._layout

    def _groups(self, layout: Layout) -> dict[str, Group]:
        """What the configuration says of each parameter."""
        return {name: group for group in placed_groups(layout.shapes, self.config) for name in group.names}

    def _judge(self, recorded: RecordedUpdate, step: int, skipped: int, rate: float) -> None:
        norm = recorded.gradient_norm()
        if not math.isfinite(norm) or self.zero.skipped_steps > skipped:
            say(f"update not verified: the gradient of step {step} is not finite")
            return
        if (self.zero.loss_scale or 1.0) != recorded.loss_scale:
            say(f"update not verified: DeepSpeed raised the loss scale in step {step}, and unscaled by the new one")
            return
        used = self.zero.grad_norm()
        if used is None or not abs(used - norm) <= NORM_BOUND * norm:
            raise self._failure(step, f"the gradient norm is {norm:.7g}, and clipping went by {used}")
        factor = self._clipping(used) / recorded.loss_scale
        self.findings = self._findings(recorded, rate, step - skipped, factor)
        self.remaining -= 1
        self._rows += [finding.row(step) for finding in self.findings]
        self._write_table()
        wrong = [finding for finding in self.findings if not finding.error <= BOUND]
        worst = max(wrong or self.findings, key=lambda finding: _rank(finding.error))
        if wrong:
            raise self._failure(step, f"{worst.name}: {worst.fault(factor)}", len(wrong))
        say(
            f"update verified: step {step}, {len(self.findings)} parameters, "
            f"largest relative error {worst.error:.1e} ({worst.name}); "
            f"error of the gradient norm {abs(used - norm) / max(norm, TINY):.1e}"
        )

    def _clipping(self, norm: float) -> float:
        limit = self.config.max_grad_norm
        return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0

    def _findings(self, recorded: RecordedUpdate, rate: float, count: int, factor: float) -> list[ParameterFinding]:
        """What all ranks found out together, the same on each."""
        groups, pulled = self._groups(recorded.layout), self.zero.start_decay is not None
        compared = {
            place.info.name: compare(
                whole, Rule.of(self.config, groups[place.info.name], rate, count, factor, pulled=pulled)
            )
            for place, whole in recorded.whole(first=count == 1)
        }
        stale, sums = recorded.copies()
        ranks = dist.gather_objects((compared, stale, sums))
        everyone = {name: comparison for compared, _, _ in ranks for name, comparison in compared.items()}
        return [
            ParameterFinding(
                place.info.name,
                place.info.numel,
                everyone[place.info.name],
                stale=sum(stale[index] for _, stale, _ in ranks),
                agreed=len({sums[index] for _, _, sums in ranks}) == 1,
            )
            for index, place in enumerate(recorded.layout.places)
            if place.info.name in everyone
        ]

    def _failure(self, step: int, what: str, parameters: int = 0) -> RunError:
        several = f" ({parameters} parameters are wrong)" if parameters > 1 else ""
        table = f" with {self.output / TABLE}" if self._rows else ""
        return RunError(
            f"the update of step {step} is wrong: {what}{several}; ZeRO stage {self.zero.stage}, "
            f"{self.zero.world_size} rank(s), {self.config.name}, bound {BOUND:.0e}; please report it{table}; "
            "train.kernels reference trains without our kernels, train.verify_update 0 without this check"
        )

    def _write_table(self) -> None:
        """Every update that this process verified, in one rename."""
        if dist.place()[0] == 0:
            with written_aside(self.output / TABLE) as aside, aside.open("w", newline="") as file:
                csv.writer(file).writerows([columns(self.entry.states), *self._rows])


def _rank(error: float) -> float:
    """The error as an order: what is no number is the largest."""
    return math.inf if math.isnan(error) else error
