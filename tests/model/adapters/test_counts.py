"""Trained parameters and FLOPs by arithmetic, against the real model and what torch counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.config import AdapterConfig, ModelConfig, architecture_of
from engine.kernels import select
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.flops import step_flops
from engine.model.adapters.trained import Trained
from engine.model.build import build_config, initialise
from engine.model.packing import pack
from engine.model.pretrained import LoadReport

SIZES = {"hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 96, "max_positions": 48}
CASES: list[tuple[dict[str, Any], str | None]] = [
    ({"method": "lora", "rank": 4}, None),
    ({"method": "lora", "rank": 4, "targets": "attention-input"}, "layers:0-1"),
    ({"method": "dora", "rank": 4, "targets": "feed-forward"}, None),
    ({"method": "adalora", "rank": 4, "initial_rank": 6}, None),
    ({"method": "ia3"}, None),
    ({"method": "houlsby", "bottleneck": 8}, "layers:0"),
    ({"method": "bitfit"}, None),
    ({"method": "prefix", "virtual_tokens": 5}, None),
    ({"method": "prompt", "virtual_tokens": 5}, None),
    ({"method": "bitfit"}, "embeddings,layers:0"),
    ({}, "embeddings,layers:0-1"),
    ({}, "layers:1"),
    ({}, "encoder"),
]


def adapted(
    architecture: str, options: dict[str, Any], freeze: str | None, head: str = "sequence_classification"
) -> tuple[nn.Module, Trained]:
    """A classifier as if its encoder were a folder's."""
    config = build_config(ModelConfig(**SIZES, architecture=architecture), 1000, labels=("a", "b", "c"))
    kind = architecture_of(config)
    model = kind.build(head, config, False)
    initialise(model, 0)
    names = [name for name, _ in model.named_parameters()]
    taken = tuple(name for name in names if name.startswith(kind.prefix))
    others = tuple(name for name in names if not name.startswith(kind.prefix))
    adapter = AdapterConfig(**options)
    Adaptation(adapter, freeze, 1, 10, "none").apply(model, LoadReport(taken, others, ()))
    shape = replace(kind.shape_of(config), decoder=False, pooler=head == "sequence_classification")
    return model, Trained(shape, adapter, freeze, kind)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The counter knows neither our kernels nor products that are added in place."""
    monkeypatch.setattr("engine.model.adapters.lora.LoraLinear._is_simple", lambda *_: False)
    select("reference")
    yield
    select("auto")


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta"])
@pytest.mark.parametrize(("options", "freeze"), CASES)
def test_trained_parameters_are_those_of_the_model(
    architecture: str, options: dict[str, Any], freeze: str | None
) -> None:
    if architecture == "modernbert" and options.get("targets") == "feed-forward":
        options = options | {"targets": "all-linear"}
    if architecture == "modernbert" and options.get("method") in ("bitfit", "prefix"):
        pytest.skip("ModernBERT has no biases, and takes no prefixes")
    model, trained = adapted(architecture, options, freeze)
    assert trained.parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained.shape.parameters() + sum(trained.added()) == sum(
        p.numel() for name, p in model.named_parameters() if "ranknum" not in name
    )


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(("options", "freeze"), [case for case in CASES if "virtual_tokens" not in case[0]])
def test_flops_of_a_step_are_those_that_torch_counts(options: dict[str, Any], freeze: str | None) -> None:
    model, trained = adapted("bert", options, freeze, "token_classification")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        packed = pack(torch.randint(5, 1000, (2, 40)), torch.ones(2, 40))
        model.eval()(**packed, max_length=40).sum().backward()
    # what the read tokens ask in the last layer isn't counted
    asked = 4 * 80 * 40 * 64 * (1 if freeze == "encoder" else 3)
    counted = step_flops(trained.shape, [40, 40], 80, trained) + asked
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01 if options.get("method") == "dora" else 1e-6)
