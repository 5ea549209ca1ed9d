"""What a quantised model is, was before, and why: as values and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.compress.quantise.graph import Layer
from engine.compress.quantise.latency import Latency
from engine.compress.quantise.search import Budget, Candidate, Search

#: the models that a report compares
FLOAT, INT8 = "fp32", "int8"


@dataclass(frozen=True)
class Report:
    """An int8 model beside the float model that it was made of."""

    search: Search
    chosen: Candidate
    budget: Budget
    processor: str
    saturates: bool
    """whether weights of 8 bits would overflow on it"""
    bytes: Mapping[str, int]
    """of the ONNX files, by `FLOAT` and `INT8`"""
    times: Mapping[int, Mapping[str, Latency]]
    """by batch, of the same two"""
    tokens: int
    """of a timed sequence"""

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        search, chosen, change = self.search, self.chosen, self.chosen.change
        return {
            "activations": chosen.activations,
            "weight_bits": 7 if search.converter.reduced else 8,
            "metric": chosen.score.metric,
            "examples": len(chosen.score.outcomes),
            "before": _score(search.before),
            "after": _score(chosen.score),
            "change": {"value": change.value, "interval_95": [change.low, change.high], "p": change.p},
            "budget": {"points": self.budget.points, "certain": self.budget.certain},
            "float_layers": [_told(layer, search.sensitivities) for layer in chosen.kept],
            "distances": search.distances,
            "tried": [
                {"activations": each.activations, "float_layers": len(each.kept), "change": each.change.value}
                for each in search.tried
            ],
            "bytes": dict(self.bytes),
            "machine": {
                "processor": self.processor, "threads": search.threads, "tokens": self.tokens,
                "weights_of_8_bits_overflow": self.saturates,
            },
            "milliseconds": {
                str(batch): {name: {"p50": each.median, "p95": each.p95} for name, each in of.items()}
                for batch, of in self.times.items()
            },
        }  # fmt: skip

    def __str__(self) -> str:
        """A few lines."""
        search, chosen, change = self.search, self.chosen, self.chosen.change
        before, after = search.before, chosen.score
        bits = "7 bits, since 8 would overflow here" if search.converter.reduced and self.saturates else "8 bits"
        if search.converter.reduced and not self.saturates:
            bits = "7 bits"
        lines = [
            f"{before.metric} {before.value:.4f} -> {after.value:.4f} on {len(after.outcomes):,} examples: "
            f"{100 * change.value:+.2f} points (95 % interval {100 * change.low:+.2f} to {100 * change.high:+.2f}), "
            f"budget {self.budget.points:g}",
            f"activations {chosen.activations}, weights of {bits}",
            f"bytes {self.bytes[FLOAT]:,} -> {self.bytes[INT8]:,} "
            f"({self.bytes[FLOAT] / self.bytes[INT8]:.2f} times smaller)",
        ]
        for batch, of in self.times.items():
            ratio = of[FLOAT].median / of[INT8].median
            lines.append(
                f"batch {batch} x {self.tokens} tokens: {of[FLOAT].median:.2f} -> {of[INT8].median:.2f} ms "
                f"({ratio:.2f} times faster; p95 {of[FLOAT].p95:.2f} -> {of[INT8].p95:.2f})"
            )
        lines.append(f"on {self.processor}, {search.threads} thread(s)")
        kept = [f"  {each['layer']}: alone in int8 it moves outputs by {each['distance']:.4f}"
                for each in (_told(layer, search.sensitivities) for layer in chosen.kept)]  # fmt: skip
        lines.append(f"layers that stay float: {len(kept)} of {len(search.converter.layers)}")
        return "\n".join([*lines, *kept])


def _score(score: Any) -> dict[str, Any]:
    return {"value": score.value, "interval_95": list(score.interval)}


def _told(layer: Layer, sensitivities: Mapping[Layer, float]) -> dict[str, Any]:
    return {"layer": layer.label, "shape": list(layer.shape), "distance": sensitivities[layer]}
