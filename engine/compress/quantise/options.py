"""What a user asks of a quantised model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import require

Method = Literal["auto", "dynamic", "static", "minmax", "entropy", "percentile"]
#: how activations become bytes, by what a user may ask for
TRIED: dict[str, tuple[str, ...]] = {
    "auto": ("dynamic", "minmax", "entropy", "percentile"),
    "static": ("minmax", "entropy", "percentile"),
}
FEWEST_SAMPLES, MOST_SAMPLES = 8, 10_000


@dataclass(frozen=True)
class QuantiseConfig:
    """How a model becomes int8, and how much of its score it may lose."""

    method: Method = "auto"
    """how activations become bytes: dynamic, by the range of each batch; minmax, entropy or percentile, by a range
    that was calibrated so; static, by the best of these three; auto, the fastest of all that keep to the budget"""
    budget: float = 1.0
    """points (hundredths) of the metric that may be lost; what loses more keeps its most sensitive layers in float"""
    certain: bool = True
    """whether the 95 % interval of the loss must keep to the budget, and not only the loss that was measured"""
    samples: int = 128
    """training samples that ranges are calibrated on; a quarter as many more tell how far outputs are"""
    reduce_range: bool | None = None
    """whether weights have 7 bits, so that sums of products don't overflow on processors without VNNI; null: if they
    do on this one"""
    embeddings: bool = True
    """whether tables of embeddings are int8 too, with a scale a row"""
    threads: int = 1
    """of onnxruntime, in all that is timed"""

    def validate(self) -> None:
        """Raises: UserError: a field that can't be used."""
        choices = get_args(Method)
        require(self.method in choices, "method", self.method, f"choose {', '.join(choices)}")
        require(0.0 < self.budget <= 100.0, "budget", self.budget, "give points in (0, 100]")
        remedy = f"give a whole number in [{FEWEST_SAMPLES}, {MOST_SAMPLES}]"
        require(FEWEST_SAMPLES <= self.samples <= MOST_SAMPLES, "samples", self.samples, remedy)
        require(self.threads >= 1, "threads", self.threads, "give at least 1")

    @property
    def tried(self) -> tuple[str, ...]:
        """The ways that activations become bytes."""
        return TRIED.get(self.method, (self.method,))
