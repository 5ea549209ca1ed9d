"""Scores of units, their rearrangement, the fit of what stays, and the whole of it on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.compress.folder import open_source
from engine.compress.prune import cost, fisher
from engine.compress.prune.compact import compact, zeros
from engine.compress.prune.latency import Load, Runtime, measure
from engine.compress.prune.layers import spread, with_layers
from engine.compress.prune.prune import Options, prune
from engine.compress.prune.target import parse_target
from engine.compress.prune.tune import fit, tune
from engine.config import architecture_of
from engine.errors import UserError
from engine.model.flops import forward_flops
from engine.model.pruning.units import sublayers
from engine.tasks.finetune import FineTuning
from launch.scored import scored_task
from tests.model.pruning.tiny import KINDS, config_of, widened

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(classifier: Path) -> FineTuning:
    more = ["--labelled.text=text", "--labelled.max_length=30", f"--labelled.validation={classifier.parent}/dev.jsonl"]
    return scored_task(str(classifier), open_source(str(classifier)), f"{classifier.parent}/train.jsonl", more)


def packed(generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.tensor([12, 7, 18])
    count = int(lengths.sum())
    places = torch.cat([torch.arange(length) for length in lengths.tolist()])
    ids = torch.randint(4, 60, (count,), generator=generator)
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "position_ids": places, "lengths": lengths}


def built(kind: str) -> nn.Module:
    config = config_of(kind)
    return widened(architecture_of(config).build("sequence_classification", config, False))


def test_derivatives_are_those_of_a_unit_that_shrinks(task: FineTuning, classifier: Path) -> None:
    model = open_source(str(classifier)).load().double()
    parts = sublayers(model)
    found = fisher.derivatives(task, model, parts, 3, CPU)
    assert [tuple(each.shape) for each in found] == [(3, 2), (3, 48)] * 2
    step, part, unit = 1e-2, parts[1], 5
    for index, batch in enumerate(fisher.batches(task.train_source(), 3, 1)):
        losses = []
        for factor in (1 - step, 1 + step):
            with torch.no_grad():
                held = part.output.weight[:, unit].clone()
                part.output.weight[:, unit] *= factor
                losses.append(float(task.step(model, batch).loss))
                part.output.weight[:, unit] = held
        assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(float(found[1][index, unit]), rel=2e-2, abs=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rearranged_units_lose_less_and_are_as_many() -> None:
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(40, 3, generator=generator)
    gradients = common @ torch.randn(3, 20, generator=generator) + 0.3 * torch.randn(40, 20, generator=generator)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[fisher.importance(gradients).argsort(descending=True)[:8]] = True

    def lost(units: Tensor) -> float:
        return float((gradients @ (~units).float()).square().mean())

    other = fisher.rearranged(gradients, kept)
    assert int(other.sum()) == 8
    assert lost(other) < lost(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_models_are_nearer_to_the_whole_one(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    whole, batches = built(kind), [packed(generator) for _ in range(20)]
    pruned, plain = built(kind), built(kind)
    for model in (pruned, plain):
        for part in sublayers(model):
            part.zero(torch.arange(part.count) % 4 == 0)

    def run(model: nn.Module):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            yield from (model(**batch) for batch in batches)

    tune(whole, pruned, "matrix", run)
    other = [packed(generator) for _ in range(10)]
    with torch.no_grad():
        wanted, fitted, unfitted = (torch.cat([m(**batch) for batch in other]) for m in (whole, pruned, plain))
    assert (fitted - wanted).square().mean() < 0.6 * (unfitted - wanted).square().mean()
    assert all(torch.equal(a.kept(), b.kept()) for a, b in zip(sublayers(pruned), sublayers(plain), strict=True))


@pytest.mark.parametrize("how", ["matrix", "mask"])
def test_a_fit_finds_what_the_columns_were_made_of(how: str) -> None:
    part = sublayers(built("bert"))[0]
    part.zero(torch.tensor([False, True, False, False]))
    columns = torch.randn(500, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = part.output.weight.detach().double().T * torch.tensor([0.5, 1.0, 2.0, 1.5]).repeat_interleave(8)[:, None]
    fit(part, columns.T @ columns, columns.T @ columns @ weight, how)  # type: ignore[arg-type]
    assert torch.allclose(part.output.weight.double().T, weight, atol=0.02)


def test_nothing_changes_where_nothing_is_taken_out() -> None:
    whole, same = built("bert"), built("bert")
    batch = packed(torch.Generator().manual_seed(1))
    tune(whole, same, "mask", lambda model: iter([model(**batch).detach()]))
    for (name, one), other in zip(whole.named_parameters(), same.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_flops_and_bytes_are_those_of_the_model(kind: str) -> None:
    model = built(kind)
    config, parts = model.config, sublayers(model)
    costs, length = cost.flops(parts, 16), 16
    shape = replace(architecture_of(config).shape_of(config), decoder=False, pooler=False, windows=0)  # type: ignore[arg-type]
    classifier, last_attention = (
        2 * length * 32 * 2,
        4 * length * length * 32,
    )  # which it counts where they are asked for
    counted = forward_flops(shape, [length], length) - classifier + last_attention
    assert costs.whole(3) * length == pytest.approx(counted)
    size = cost.file_bytes(model, parts)
    assert size.whole(3) == 4 * sum(parameter.numel() for parameter in model.parameters())
    for part in parts:
        part.shrink(torch.arange(part.count) < part.count // 2)
    kept = [(part.kind, part.count) for part in parts]
    assert size.total(kept) == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_measured_times_grow_with_the_units(runtime: Runtime) -> None:
    costs = measure(config_of("bert"), Load(length=16, runtime=runtime, rounds=3))
    assert [len(costs.heads), len(costs.neurons)] == [5, 49]
    assert min(np.diff(costs.heads).min(), np.diff(costs.neurons).min()) >= 0
    assert costs.whole(3) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_some_layers_is_that_of_these(kind: str) -> None:
    model = built(kind)
    smaller = with_layers(model, "sequence_classification", [0, 2])
    assert smaller.config.num_hidden_layers == 2  # type: ignore[union-attr]
    old, new = sublayers(model), sublayers(smaller)
    assert torch.equal(new[2].output.weight, old[4].output.weight)
    assert torch.equal(new[0].output.weight, old[0].output.weight)
    batch = packed(torch.Generator().manual_seed(1))
    with torch.no_grad():
        smaller(**batch)
    if kind == "modernbert":
        with pytest.raises(UserError, match=r"^layers: 1,2 is not allowed; layer 1 normalises"):
            with_layers(model, "sequence_classification", [1, 2])
    assert spread(2, 6) == [0, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compact_model_computes_the_same(kind: str) -> None:
    model, batch = built(kind), packed(torch.Generator().manual_seed(1))
    for part in sublayers(model):
        part.zero(torch.arange(part.count) < (1 if part.kind == "heads" else 10 + part.layer))
    with torch.no_grad():
        before = model(**batch)
        assert compact(model) == 38
        after = model(**batch)
    assert (before - after).abs().max() <= 1e-6 * before.abs().max()
    assert zeros(model) == {"heads": (12, 3), "neurons": (114, 3)}
    rebuilt = architecture_of(model.config).build("sequence_classification", model.config, False)  # type: ignore[arg-type]
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize("target", ["flops 0.6", "size 0.06MB", "heads 0.5, neurons 0.7"])
def test_a_target_is_kept(task: FineTuning, classifier: Path, target: str) -> None:
    model = open_source(str(classifier)).load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = prune(task, model, Options(parse_target(target), samples=16))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    shares = {kind: sum(n for _, k, n, _ in found.kept if k == kind) for kind in ("heads", "neurons")}
    if target.startswith("flops"):
        assert 0.4 < found.share <= 0.6
    elif target.startswith("size"):
        assert found.share * found.whole <= 60_000
    else:
        assert shares == {"heads": 2, "neurons": 64}
    for part, (_, _, size, _) in zip(sublayers(found.model), found.kept, strict=True):
        assert int(part.kept().sum()) == size


def test_a_target_out_of_reach_is_refused(task: FineTuning, classifier: Path) -> None:
    model = open_source(str(classifier)).load()
    for target, match in (
        ("flops 0.01", r"target: flops 0.01 is out of reach; with one head"),
        ("neurons 0.1", "keeps 16"),
    ):
        with pytest.raises(UserError, match=match):
            prune(task, model, Options(parse_target(target), samples=4))
