"""Norms of weights and updates: right by layer, written at their interval, and measured without changing a bit."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from engine.model import bert_entry
from engine.model.bert_entry import BERT
from engine.optim import FusedAdamW, FusedLamb
from engine.optim.layout import ParameterNorms
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.train.curves.norms import curves, histograms
from tests.train.runs import NO_DROPOUT, losses, run


def test_layers_are_named_as_the_examples_say() -> None:
    assert doctest.testmod(bert_entry).failed == 0


def test_a_layers_norm_is_that_of_its_parameters_end_to_end() -> None:
    found = {
        "bert.encoder.layer.0.output.dense.weight": ParameterNorms(3.0, 0.3, 2.0),
        "bert.encoder.layer.0.output.dense.bias": ParameterNorms(4.0, 0.4, 1.0),
        "bert.embeddings.word_embeddings.weight": ParameterNorms(0.0, 0.1, 0.5),
    }
    values = curves(found, BERT.layer_of)
    assert values["weight_norm/layer.0"] == 5.0
    assert values["update_norm/layer.0"] == pytest.approx(0.5)
    assert values["update_to_weight/layer.0"] == pytest.approx(0.1)
    assert "update_to_weight/embeddings" not in values
    assert [values[f"trust_ratio/{name}"] for name in ("lowest", "highest")] == [0.5, 2.0]
    assert histograms(found)["parameters/trust_ratio"] == [2.0, 0.5]
    assert "trust_ratio/lowest" not in curves({"a": ParameterNorms(1.0, 1.0, 1.0)}, BERT.layer_of)


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLamb])
def test_observing_measures_and_changes_no_bit(kind: type[FusedAdamW] | type[FusedLamb]) -> None:
    results = []
    for observing in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (70, 5003)]
        infos = [ParameterInfo(name, tuple(p.shape)) for name, p in zip("ab", params, strict=True)]
        optimizer = kind(params, lr=1e-2, weight_decay=0.1, max_grad_norm=0.0)
        optimizer.lay_out(
            [Shard(p, 0, (info,), (Fragment(0, 0, p.numel(), 0),), None) for p, info in zip(params, infos, strict=True)]
        )
        optimizer.observing = observing
        before = [p.detach().clone() for p in params]
        for _ in range(3):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for name, old, new in zip("ab", before, results[1], strict=True):
        seen = optimizer.observed[name]
        assert float(seen.weight) == pytest.approx(float(old.norm()), rel=1e-5)
        assert 1e-2 * float(seen.update) == pytest.approx(float((new - old).norm()), rel=1e-4)
        assert (float(seen.ratio) != 1.0) == (kind is FusedLamb)


def tags(output: Path, kind: str) -> dict[str, list[int]]:
    """Steps of each curve or histogram under our tags."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    read = events.Scalars if kind == "scalars" else events.Histograms
    ours = ("weight_norm/", "update_norm/", "update_to_weight/", "trust_ratio/", "parameters/")
    return {tag: [point.step for point in read(tag)] for tag in events.Tags()[kind] if tag.startswith(ours)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_lamb_run_writes_them_at_their_interval_the_same_on_any_layout(
    store: Path, tmp_path: Path, stage: int
) -> None:
    shared = [f"--data.path={store}", "--optim.name=lamb", "--train.steps=4", "--monitor.norm_interval=2"]
    run(tmp_path / "sharded", *shared, *NO_DROPOUT, f"--train.zero_stage={stage}", ranks=2)
    run(tmp_path / "whole", *shared, *NO_DROPOUT, "--train.zero_stage=0")
    for kind in ("scalars", "histograms"):
        found = tags(tmp_path / "sharded", kind)
        assert found == tags(tmp_path / "whole", kind)
        assert set(map(tuple, found.values())) == {(2, 4)}
    for tag in ("weight_norm/embeddings", "update_norm/layer.1", "trust_ratio/median"):
        pairs = zip(losses(tmp_path / "sharded", tag), losses(tmp_path / "whole", tag), strict=True)
        assert all(math.isclose(a, b, rel_tol=1e-3) for (_, a), (_, b) in pairs), tag
