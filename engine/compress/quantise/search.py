"""Which layers are int8: all of them, or as many as a budget of accuracy allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.compress.quantise.convert import Activations, Converter
from engine.compress.quantise.graph import Feed, Layer, distance, outputs_of, session_of
from engine.compress.quantise.latency import latencies, typical
from engine.compress.score import Score, change
from engine.tasks.significance import Difference

#: two models whose times differ by less are about as fast, and how often they are timed
ABOUT, ROUNDS = 1.05, 30


@dataclass(frozen=True)
class Budget:
    """What a model may lose."""

    points: float
    """of the metric, in hundredths"""
    certain: bool = True
    """whether the whole 95 % interval of the difference must be within, and not only the difference"""

    def holds(self, found: Difference) -> bool:
        """Whether a change of the metric is within."""
        return (found.low if self.certain else found.value) >= -self.points / 100


@dataclass(frozen=True)
class Candidate:
    """An int8 model."""

    activations: Activations
    kept: tuple[Layer, ...]
    """layers that stay float"""
    score: Score
    change: Difference
    """from the float model's score"""


@dataclass
class Search:
    """Tries int8 models of one float model.

    Attributes:
        distances: of the outputs on the probes, by how activations become bytes.
        sensitivities: the same where one layer alone is int8; empty if all could be.
        tried: all models that were scored, in their order.
    """

    converter: Converter
    probes: Sequence[Feed]
    """samples that no range was calibrated on"""
    threads: int
    scored: Callable[[Any], Score]
    """scores a session"""
    before: Score
    """of the float model"""
    budget: Budget
    tell: Callable[[str], None]
    distances: dict[Activations, float] = field(default_factory=dict)
    sensitivities: dict[Layer, float] = field(default_factory=dict)
    tried: list[Candidate] = field(default_factory=list)

    def run(self, methods: Sequence[Activations]) -> Candidate:
        """The first model within the budget: with all layers in int8, or else with the fewest in float.

        Of the calibrated methods only the one whose outputs are nearest to the float model's is scored.
        """
        for method in methods:
            found = self._outputs(self.converter.whole(method))
            self.distances[method] = distance(self._reference, found)
            self.tell(f"{method}: outputs {self.distances[method]:.4f} from the float model's")
        static = sorted((method for method in methods if method != "dynamic"), key=self.distances.__getitem__)
        finalists = [method for method in methods if method == "dynamic"] + static[:1]
        whole = [self._try(method, ()) for method in finalists]
        good = [candidate for candidate in whole if self.budget.holds(candidate.change)]
        if not good:
            return self._with_float(max(whole, key=lambda candidate: candidate.change.value).activations)
        return self._fastest(good)

    def _fastest(self, good: Sequence[Candidate]) -> Candidate:
        """The fastest, and of those that are about as fast the most accurate."""
        sessions: dict[str, Any] = {
            each.activations: session_of(self.converter.whole(each.activations), self.threads) for each in good
        }
        times = latencies(sessions, typical(self.probes), ROUNDS)
        limit = ABOUT * min(each.median for each in times.values())
        return max(
            (each for each in good if times[each.activations].median <= limit), key=lambda each: each.change.value
        )

    def _with_float(self, method: Activations) -> Candidate:
        """As few of the most sensitive layers in float as the budget allows: doubled until it holds, then halved."""
        self.sensitivities = self._measure(method)
        order = sorted(self.sensitivities, key=self.sensitivities.__getitem__, reverse=True)
        least, most, found = 0, 1, None
        while found is None:
            candidate = self._try(method, order[:most])
            if self.budget.holds(candidate.change) or most == len(order):
                found = candidate
            else:
                least, most = most, min(2 * most, len(order))
        while most - least > 1:
            middle = (least + most) // 2
            candidate = self._try(method, order[:middle])
            if self.budget.holds(candidate.change):
                most, found = middle, candidate
            else:
                least = middle
        return found

    def _measure(self, method: Activations) -> dict[Layer, float]:
        """How far the outputs are where one layer alone is int8."""
        layers, found = self.converter.layers, {}
        self.tell(f"over the budget; measuring {len(layers)} layers one by one")
        for layer in layers:
            alone = self.converter.mixed(method, [other for other in layers if other != layer])
            found[layer] = distance(self._reference, self._outputs(alone))
        return found

    def _try(self, method: Activations, kept: Sequence[Layer]) -> Candidate:
        score = self.scored(session_of(self.converter.mixed(method, kept), self.threads))
        found = Candidate(method, tuple(kept), score, change(self.before, score))
        self.tried.append(found)
        self.tell(
            f"{method}, {len(kept)} layers in float: {score.metric} {score.value:.4f}, "
            f"{100 * found.change.value:+.2f} points ({100 * found.change.low:+.2f} to {100 * found.change.high:+.2f})"
        )
        return found

    def _outputs(self, model: Any) -> NDArray[np.float32]:
        return outputs_of(session_of(model, self.threads), self.probes)

    @cached_property
    def _reference(self) -> NDArray[np.float32]:
        return self._outputs(self.converter.model)
