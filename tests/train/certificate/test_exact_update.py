"""The float64 step: torch's AdamW in float64, LAMB written out, and what it says of steps that are wrong."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import OPTIMIZERS, OptimConfig
from engine.optim.adamw import AdamRule
from engine.optim.lamb import LambRule
from engine.train.certificate import exact
from engine.train.certificate.exact import CHUNK, Comparison, Rule, chunk_on, compare, field_names

SHAPE = (5, CHUNK // 2 + 3)
RATE = 1e-3
FIELDS = field_names(("exp_avg", "exp_avg_sq"))


def rule(step: int = 3, factor: float = 0.25, shape: tuple[int, ...] = SHAPE, **options: object) -> Rule:
    config = OptimConfig(**options)  # type: ignore[arg-type]
    (group,) = [group for group in OPTIMIZERS.get(config.name).groups({"p": shape}, config) if group.names]
    return Rule.of(config, group, RATE, step, factor)


def before(first: bool = False) -> dict[str, Tensor]:
    """Weights, gradient and moments of a parameter of several chunks."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient, exp_avg, exp_avg_sq = torch.randn(4, SHAPE[0] * SHAPE[1], generator=generator)
    old = {"weight": 0.1 * weight, "gradient": gradient, "exp_avg": 0.1 * exp_avg, "exp_avg_sq": exp_avg_sq.square()}
    return old | {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq") if first}


def stepped(old: dict[str, Tensor], applied: Rule) -> dict[str, Tensor]:
    """The update of a rule, with the trust ratio of the whole parameter, in float64 and then rounded."""
    weight, gradient, exp_avg, exp_avg_sq = (value.double() for value in old.values())
    exact = applied.exact
    assert isinstance(exact, AdamRule)
    (b1, b2), g = exact.betas, gradient * applied.factor
    exp_avg = b1 * exp_avg + (1 - b1) * g
    exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g * g
    mhat, vhat = exp_avg / (1 - b1**exact.number), exp_avg_sq / (1 - b2**exact.number)
    update = mhat / (vhat.sqrt() + exact.eps) + exact.weight_decay * weight
    trusted = isinstance(exact, LambRule) and exact.trusted
    ratio = min(float(weight.norm() / update.norm()), exact.largest_ratio) if trusted else 1.0
    new = {"weight": weight - applied.rate * ratio * update, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return {"new_" + name: value.float() for name, value in new.items()}


def compared(old: dict[str, Tensor], new: dict[str, Tensor], expected: Rule) -> Comparison:
    rows = [(new | old)[name] for name in FIELDS]
    assert isinstance(expected.exact, AdamRule)
    return compare(torch.stack(rows if expected.exact.number > 1 else rows[:5]), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_step_of_torchs_adamw_in_float64(steps: int) -> None:
    old, config = before(first=True), OptimConfig()
    p = torch.nn.Parameter(old["weight"].double())
    optimizer = torch.optim.AdamW([p], lr=RATE, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    for step in range(1, steps + 1):
        state = optimizer.state.get(p, {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)})
        kept = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        old = {"weight": p.detach().float(), "gradient": old["gradient"].roll(step), **kept}
        p.grad = old["gradient"].double() * 0.25
        optimizer.step()
        new = {"new_weight": p.detach().float()}
        new |= {"new_" + name: optimizer.state[p][name].float() for name in ("exp_avg", "exp_avg_sq")}
        found = compared(old, new, rule(step))
        assert found.error < 2e-7
        assert (found.trust_ratio, found.factor) == (1.0, pytest.approx(0.25))
        assert found.length == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"max_trust_ratio": 0.01}, {"nvlamb": True}])
@pytest.mark.parametrize("shape", [SHAPE, (SHAPE[0] * SHAPE[1],)])
def test_lambs_ratio_is_of_the_whole_parameter(options: dict[str, object], shape: tuple[int, ...]) -> None:
    old, applied = before(), rule(shape=shape, name="lamb", **options)
    assert isinstance(applied.exact, LambRule)
    assert applied.exact.trusted == (len(shape) == 2 or "nvlamb" in options)
    found = compared(old, stepped(old, applied), applied)
    assert found.error < 1e-7
    assert found.weight_norm == pytest.approx(float(old["weight"].norm()), rel=1e-5)
    moved = old["weight"].double() - stepped(old, applied)["new_weight"].double()
    assert found.update_norm == pytest.approx(float(moved.norm()), rel=1e-4)


def untrusted(applied: Rule) -> Rule:
    assert isinstance(applied.exact, LambRule)
    return replace(applied, exact=replace(applied.exact, trusted=False))


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_parameter_of_zeros_has_no_ratio_and_no_error(zero: str) -> None:
    old, applied = before(first=True), rule(step=1, name="lamb", weight_decay=0.01)
    old[zero] = torch.zeros_like(old[zero])
    if zero == "gradient":
        old["weight"] = torch.zeros_like(old["weight"])
    found = compared(old, stepped(old, untrusted(applied)), applied)
    assert (found.trust_ratio, found.error < 1e-7) == (1.0, True)


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_any_chunk_gives_the_same_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, applied = before(), rule(name=name)
    new = stepped(old, rule(name=name, factor=0.2501))
    expected, counts = asdict(compared(old, new, applied)), []
    assert expected["weights"] > 1e-5
    for chunk in (1000, CHUNK, chunk_on(torch.device("cuda"))):
        monkeypatch.setattr(exact, "CHUNK", chunk)
        with Operators() as operators:
            found = asdict(compared(old, new, applied))
        counts.append((-(-SHAPE[0] * SHAPE[1] // chunk), operators.count))
        for field, value in expected.items():
            assert found[field] == pytest.approx(value, rel=1e-9), field
    (few, small), (many, large) = counts[-1], counts[0]
    assert few == 1
    assert 70 < (large - small) / (many - few) < 100, "operators a chunk"


def test_what_is_wrong_is_told_apart() -> None:
    old, right = before(), rule(name="lamb")
    clipped_twice = compared(old, stepped(old, rule(name="lamb", factor=0.125)), right)
    assert clipped_twice.states["exp_avg"] > 1e-2
    assert clipped_twice.factor == pytest.approx(0.125)
    late = compared(old, stepped(old, rule(step=4)), rule())
    assert late.weights > 1e-3 > 1e-6 > max(late.states.values())
    clamped = compared(old, stepped(old, rule(name="lamb", max_trust_ratio=0.01)), right)
    assert clamped.length == pytest.approx(0.01 / right_ratio(old, right), rel=1e-2)
    one_element = stepped(old, right)
    one_element["new_exp_avg_sq"][-1] += 1e-3
    assert compared(old, one_element, right).states["exp_avg_sq"] > 1e-5


def right_ratio(old: dict[str, Tensor], applied: Rule) -> float:
    return compared(old, stepped(old, applied), applied).trust_ratio


def test_weights_may_be_off_by_their_rounding_and_by_no_more() -> None:
    """At a tiny learning rate a step is smaller than the distance of fp32 numbers."""
    old, applied = before(), replace(rule(), rate=1e-9)
    new = stepped(old, applied)
    assert compared(old, new, applied).error < 1e-7
    new["new_weight"] *= 1 + 2**-20
    assert compared(old, new, applied).weights > 1.0


@pytest.mark.parametrize("name", [*FIELDS])
def test_what_is_not_finite_is_an_error(name: str) -> None:
    old, applied = before(), rule()
    values = old | stepped(old, applied)
    values[name][-1] = math.nan
    assert not compare(torch.stack([values[field] for field in FIELDS]), applied).error < math.inf
