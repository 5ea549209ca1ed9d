"""The comparison of architectures: what it holds equal, and what it picks; nothing is timed here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import architectures
from benchmarks.pretrain_step import Run
from engine.config import architecture_of
from engine.model.build import build_config
from launch.configure.options import parse as parse_training


@pytest.mark.parametrize("size", ["tiny", "mini", "small"])
def test_the_rivals_have_equally_many_parameters(size: str) -> None:
    both = architectures.rivals(size, vocabulary=8192, length=128)
    assert [rival.name for rival in both] == ["bert", "modernbert"]
    assert both[0].parameters == pytest.approx(both[1].parameters, rel=0.005)
    for rival in both:
        config = build_config(parse_training([*rival.options, "--data.path=store"]).model, 8192)
        model = architecture_of(config).build("masked_lm", config, activation_checkpointing=False)
        assert sum(parameter.numel() for parameter in model.parameters()) == rival.parameters


def test_the_rate_with_the_lowest_loss_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {5e-4: 7.5, 1e-3: 7.1, 2e-3: 7.9}

    def pretrained(self: Any, rival: Any, steps: int, rate: float, seed: int, evaluated: int = 0) -> tuple[Path, Run]:
        return tmp_path, Run([], 0, [f"evaluation at step {steps}: mlm_loss {losses[rate]}, perplexity 9"])

    monkeypatch.setattr(architectures.Bench, "pretrained", pretrained)
    bench = architectures.Bench(argparse.Namespace(rates=[*losses]), tmp_path)
    rate, tried = bench.best_rate(architectures.Rival("bert", 1, ()), steps=3)
    assert rate == 1e-3
    assert tried == {"loss at 0.0005": 7.5, "loss at 0.001": 7.1, "loss at 0.002": 7.9}


def test_the_summary_has_means_and_deviations() -> None:
    table = architectures.summary([(6.0, 0.7), (8.0, 0.9)])
    assert table == pytest.approx(
        {"held-out MLM loss": 7.0, "loss_deviation": 2**0.5, "accuracy": 0.8, "accuracy_deviation": 0.02**0.5}
    )
    assert [*architectures.summary([(6.0, None)])] == ["held-out MLM loss", "loss_deviation"]
