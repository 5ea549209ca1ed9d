"""The verdict on a run that was killed: its losses and samples against those of one that wasn't. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.train.audit import Ledger

#: largest relative difference of a loss where the number of ranks changed; sums in another order give about 1e-7
BOUND = 1e-4


class Sample(NamedTuple):
    """A sequence that the model must see: a sample, or a piece of one where it holds several documents."""

    digest: str
    epoch: int
    number: int
    """of its sample within the epoch"""


@dataclass
class Account:
    """What was found of the steps that one start of a run contributed."""

    steps: list[int] = field(default_factory=list)
    difference: float = 0.0
    """largest of a loss, relative"""
    twice: int = 0
    missed: int = 0
    problems: list[str] = field(default_factory=list)


def judge(
    ledger: Ledger,
    stream: Sequence[Sequence[Sample]],
    losses: Sequence[tuple[int, float]],
    truth: Sequence[tuple[int, float]],
    batch: int,
    bound: float,
) -> dict[str | None, Account]:
    """The account of each start that did a step; what belongs to none, as a step nobody did, is of None.

    Args:
        ledger: the run's audit.
        stream: what the model must see in each step of the run.
        losses: the run's curve.
        truth: the curve of the undisturbed run.
        batch: samples of a step.
        bound: of the relative difference of a loss; 0 asks for equal bits.
    """
    accounts: dict[str | None, Account] = {start: Account() for start in ledger.resumed}
    accounts[None] = Account()
    for step, seen in ledger.steps.items():
        accounts[seen.start].steps.append(step)
    owner = {step: accounts[seen.start] for step, seen in ledger.steps.items()}
    check_steps(ledger, len(stream), batch, owner, accounts[None])
    check_samples(ledger, stream, owner, accounts[None])
    check_losses(losses, truth, len(stream), bound, owner, accounts[None])
    return accounts


def check_steps(ledger: Ledger, steps: int, batch: int, owner: Mapping[int, Account], nobody: Account) -> None:
    """Every step is done, by all ranks of its start, and the count of samples is right."""
    for step in range(1, steps + 1):
        if step not in ledger.steps:
            nobody.problems.append(f"step {step} was never done")
    for step, seen in sorted(ledger.steps.items()):
        problems = owner[step].problems
        if not 1 <= step <= steps:
            problems.append(f"step {step} is beyond the end of the run")
        if seen.silent:
            problems.append(f"step {step}: no note of rank(s) {', '.join(map(str, seen.silent))}")
        if seen.consumed != step * batch:
            problems.append(f"step {step}: {seen.consumed} samples are counted as consumed, not {step * batch}")


def check_samples(
    ledger: Ledger, stream: Sequence[Sequence[Sample]], owner: Mapping[int, Account], nobody: Account
) -> None:
    """Each sample of the stream is seen once, in its own step, and no other one."""
    places: dict[str, tuple[int, Sample]] = {}
    for step, samples in enumerate(stream, 1):
        for sample in samples:
            places.setdefault(sample.digest, (step, sample))
    allowed, seen = Counter(sample.digest for samples in stream for sample in samples), Counter[str]()
    for step, done in sorted(ledger.steps.items()):
        account = owner[step]
        for digest in done.samples:
            seen[digest] += 1
            if digest not in allowed:
                account.problems.append(f"step {step}: a sample that is none of the stream")
            elif seen[digest] > allowed[digest]:
                account.twice += 1
                account.problems.append(f"step {step}: {_name(places[digest][1])} seen twice")
        expected = Counter(sample.digest for sample in (stream[step - 1] if 1 <= step <= len(stream) else ()))
        if strangers := Counter(done.samples) - expected:
            account.problems.append(f"step {step}: {strangers.total()} sample(s) that don't belong to it")
    for digest, count in (allowed - seen).items():
        step, sample = places[digest]
        account = owner.get(step, nobody)
        account.missed += count
        account.problems.append(f"step {step}: {_name(sample)} missed")


def _name(sample: Sample) -> str:
    return f"sample {sample.number} of epoch {sample.epoch}"


def check_losses(
    losses: Sequence[tuple[int, float]],
    truth: Sequence[tuple[int, float]],
    steps: int,
    bound: float,
    owner: Mapping[int, Account],
    nobody: Account,
) -> None:
    """Every step has one loss, that of the undisturbed run."""
    measured, exact = _points(losses), _points(truth)
    for step in range(1, steps + 1):
        account, points = owner.get(step, nobody), measured.pop(step, [])
        if (len(points), len(exact.get(step, []))) != (1, 1):
            account.problems.append(f"step {step} has {len(points)} points of the loss curve, not one of each run")
            continue
        difference = relative(points[0], exact[step][0])
        account.difference = max(account.difference, difference)
        if not difference <= bound:
            told = f"loss {points[0]:.8g}, not {exact[step][0]:.8g}"
            account.problems.append(f"step {step}: {told} ({difference:.1e} apart)")
    nobody.problems += [f"step {step} of the loss curve is beyond the end of the run" for step in measured]


def _points(curve: Sequence[tuple[int, float]]) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for step, loss in curve:
        points.setdefault(step, []).append(loss)
    return points


def relative(value: float, exact: float) -> float:
    """The distance of two losses as a share of the exact one; infinite where one of them is no number."""
    if not (math.isfinite(value) and math.isfinite(exact)):
        return math.inf
    return 0.0 if value == exact else abs(value - exact) / max(abs(exact), math.ulp(0.0))
