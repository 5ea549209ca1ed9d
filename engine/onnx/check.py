"""Whether a graph computes what the model computes that it was made from.

The model is ours, on packed tokens, and the graph is that of transformers' model on padded ones: one judges the other,
and no sample may change with those that it is padded beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.model.roundtrip import BOUND, Sample, compare_logits, own_logits, packed
from engine.model.sentence import FIELD
from engine.onnx.module import OnnxModule

GraphPrecision = Literal["fp32", "fp16"]
#: by precision, the largest difference of a logit relative to the largest one of its kind: fp32 as of any export; in
#: fp16 each of some hundred roundings in a row may be off by half an eps, 4.9e-4
BOUNDS: dict[str, float] = {"fp32": BOUND, "fp16": 32 * torch.finfo(torch.float16).eps}
#: samples that are padded to one length
TOGETHER = 8
#: of those that are also computed alone
ALONE = 4


@dataclass(frozen=True)
class GraphCheck:
    """What was written, what it was compared with, and how far apart they were."""

    precision: str
    opset: int
    bytes: int
    """of the graph with its weights"""
    source_bytes: int
    """of the weights in fp32"""
    bound: float
    samples: int = 0
    """compared; 0 where nothing was"""
    tokens: int = 0
    batches: int = 0
    of_data: bool = False
    """whether the samples are the user's, or random ids"""
    differences: dict[str, float] = field(default_factory=dict)
    """by output, relative to the largest value"""

    def __str__(self) -> str:
        """Two lines."""
        share = self.bytes / self.source_bytes
        told = f"opset {self.opset}, {self.precision}, {self.bytes / 1e6:,.1f} MB ({share:.0%} of the fp32 weights)"
        if not self.samples:
            return f"{told}\nchecked: nothing, as --check false says"
        kind = "your samples" if self.of_data else "random ids"
        samples = f"{self.samples} of {kind} in {self.batches} batches, {self.tokens:,} tokens"
        worst = max(self.differences.values())
        return f"{told}\nchecked: {samples}: largest relative difference {worst:.1e}, allowed {self.bound:.1e}"

    def record(self) -> dict[str, Any]:
        """The same as plain values."""
        import onnxruntime

        return {**asdict(self), "onnxruntime": onnxruntime.__version__}


def batches(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """The first samples alone, and all of them beside others, which pads them."""
    yield from ([sample] for sample in samples[:ALONE])
    yield from (samples[start : start + TOGETHER] for start in range(0, len(samples), TOGETHER))


@torch.no_grad()
def compare(
    model: nn.Module, graph: OnnxModule, samples: Sequence[Sample], bound: float
) -> tuple[dict[str, float], int]:
    """Compare a graph with the model that it was made from, of the same head.

    Returns:
        by output the largest difference relative to its largest value, and the batches that were compared.

    Raises:
        UserError: one is above the bound; says which, and how much.
    """
    differences: dict[str, float] = {}
    computed = 0
    for batch in batches(samples):
        ours, theirs = (outputs(each, graph.head, packed(batch)) for each in (model, graph))
        found = compare_logits(ours, theirs, "the ONNX graph", bound)
        differences = {name: max(value, differences.get(name, 0.0)) for name, value in found.items()}
        computed += 1
    return differences, computed


def outputs(model: nn.Module, head: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model or a graph computes of a packed batch, by output; vectors have length 1 where they are to."""
    found = own_logits(model, head, batch, torch.arange(len(batch["input_ids"])))
    if head == "embeddings":
        vectors: Tensor = model(**batch)
        told = getattr(model.config, FIELD)
        found["sentence_embedding"] = functional.normalize(vectors, dim=-1) if told["normalize"] else vectors
    return found
