"""The plan, the verdict and the report of a certificate: every planted fault is found and named."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from engine.train.audit import Ledger, Step
from launch.certify.plan import (
    MOST_KILLS_OF_A_RUN,
    SAVE_INTERVAL,
    STEPS,
    Plan,
    kill_after,
    least_resumed,
    plan_runs,
    walk,
)
from launch.certify.report import failed_rows, last_lines, rows_of, summary, table
from launch.certify.runs import Start
from launch.certify.verdict import BOUND, Account, Sample, judge, relative

ROUTES = [(1, 2, 4, 2, 1), (2, 2)]
#: 4 steps of 2 samples, the last two by a second start
STREAM = [Sample(f"{epoch}/{number}", epoch, number) for epoch in (0, 1) for number in range(4)]
LOSSES = [(step, 8.0 - step / 10) for step in (1, 2, 3, 4)]


def ledger() -> Ledger:
    """Of a run that did everything right."""
    steps = {
        step: Step(
            "first" if step < 3 else "second", 2 * step, tuple(s.digest for s in STREAM[2 * step - 2 : 2 * step]), ()
        )
        for step in (1, 2, 3, 4)
    }
    return Ledger(steps, {"first": 0, "second": 2})


def by_step(stream: list[Sample]) -> list[list[Sample]]:
    return [stream[first : first + 2] for first in range(0, len(stream), 2)]


def verdict(found: Ledger, losses: list[tuple[int, float]] = LOSSES, bound: float = BOUND) -> dict[str | None, Account]:
    return judge(found, by_step(STREAM), losses, LOSSES, 2, bound)


def problems(accounts: dict[str | None, Account]) -> list[tuple[str | None, str]]:
    return [(start, problem) for start, account in accounts.items() for problem in account.problems]


def changed(step: int, **values: Any) -> Ledger:
    found = ledger()
    found.steps[step] = replace(found.steps[step], **values)
    return found


def test_a_sample_may_be_seen_in_pieces() -> None:
    """As where a sample holds several documents: a piece of the next step's is a stranger, a piece less is missed."""
    pieces = [[*samples, Sample(f"piece {step}", 0, 2 * step)] for step, samples in enumerate(by_step(STREAM))]
    steps = {step: replace(seen, samples=(*seen.samples, f"piece {step - 1}")) for step, seen in ledger().steps.items()}
    found = replace(ledger(), steps=steps)
    assert not problems(judge(found, pieces, LOSSES, LOSSES, 2, BOUND))
    steps[2] = replace(steps[2], samples=steps[2].samples[:2])
    told = [("first", "step 2: sample 2 of epoch 0 missed")]
    assert problems(judge(found, pieces, LOSSES, LOSSES, 2, BOUND)) == told


def test_a_run_that_did_everything_right_has_no_problem() -> None:
    accounts = verdict(ledger(), bound=0.0)
    assert not problems(accounts)
    assert {start: one.steps for start, one in accounts.items()} == {"first": [1, 2], "second": [3, 4], None: []}


def test_a_sample_seen_twice_and_the_missed_one_are_named_with_their_steps() -> None:
    accounts = verdict(changed(3, samples=("0/3", "1/1")))
    assert problems(accounts) == [
        ("second", "step 3: sample 3 of epoch 0 seen twice"),
        ("second", "step 3: 1 sample(s) that don't belong to it"),
        ("second", "step 3: sample 0 of epoch 1 missed"),
    ]
    assert (accounts["second"].twice, accounts["second"].missed) == (1, 1)


def test_a_missed_sample_is_named() -> None:
    accounts = verdict(changed(2, samples=("0/2",)))
    assert problems(accounts) == [("first", "step 2: sample 3 of epoch 0 missed")]
    assert accounts["first"].missed == 1


def test_a_sample_of_nowhere_is_named() -> None:
    assert ("first", "step 1: a sample that is none of the stream") in problems(
        verdict(changed(1, samples=("0/0", "x")))
    )


def test_samples_of_each_others_steps_are_named_though_each_is_seen_once() -> None:
    found = ledger()
    found.steps[1], found.steps[2] = (
        replace(found.steps[1], samples=("0/0", "0/2")),
        replace(found.steps[2], samples=("0/1", "0/3")),
    )
    assert problems(verdict(found)) == [
        ("first", "step 1: 1 sample(s) that don't belong to it"),
        ("first", "step 2: 1 sample(s) that don't belong to it"),
    ]


def test_the_order_within_a_step_is_the_layouts_affair() -> None:
    assert not problems(verdict(changed(1, samples=("0/1", "0/0"))))


def test_equal_samples_of_the_stream_may_be_seen_as_often() -> None:
    twins = [*STREAM[:1], STREAM[0]._replace(number=1), *STREAM[2:]]
    found = changed(1, samples=("0/0", "0/0"))
    assert not problems(judge(found, by_step(twins), LOSSES, LOSSES, 2, BOUND))


@pytest.mark.parametrize("silent", [(1,), (0, 3)])
def test_a_rank_without_a_note_is_named(silent: tuple[int, ...]) -> None:
    named = ", ".join(map(str, silent))
    assert problems(verdict(changed(4, silent=silent))) == [("second", f"step 4: no note of rank(s) {named}")]


def test_a_wrong_count_of_consumed_samples_is_named() -> None:
    told = "step 2: 6 samples are counted as consumed, not 4"
    assert problems(verdict(changed(2, consumed=6))) == [("first", told)]


def test_a_step_that_nobody_did_and_one_too_many_are_named() -> None:
    found = ledger()
    del found.steps[4]
    assert (None, "step 4 was never done") in problems(verdict(found))
    assert (None, "step 4: sample 3 of epoch 1 missed") in problems(verdict(found))
    found = ledger()
    found.steps[5] = replace(found.steps[4], consumed=10)
    assert ("second", "step 5 is beyond the end of the run") in problems(verdict(found))


@pytest.mark.parametrize(
    ("factor", "bound", "refused"),
    [
        (1 + 2e-4, BOUND, True),
        (1 - 2e-4, BOUND, True),
        (1 + 5e-5, BOUND, False),
        (1 + 1e-7, 0.0, True),
        (1.0, 0.0, False),
        (math.nan, BOUND, True),
        (math.inf, BOUND, True),
    ],
)
def test_a_loss_that_is_off_is_named(factor: float, bound: float, refused: bool) -> None:
    losses = [(step, loss * factor if step == 3 else loss) for step, loss in LOSSES]
    accounts = verdict(ledger(), losses, bound)
    found = problems(accounts)
    assert [(start, told.split(":")[0]) for start, told in found] == [("second", "step 3")] * refused
    assert accounts["first"].difference == 0.0
    if math.isfinite(factor):
        assert accounts["second"].difference == pytest.approx(abs(factor - 1), rel=1e-3)


@pytest.mark.parametrize("losses", [LOSSES[:1] + LOSSES[2:], [*LOSSES, LOSSES[1]]])
def test_a_step_needs_one_loss(losses: list[tuple[int, float]]) -> None:
    (problem,) = problems(verdict(ledger(), losses))
    assert problem[0] == "first"
    assert problem[1].startswith("step 2 has ")


def test_relative_differences() -> None:
    assert relative(0.0, 0.0) == 0.0
    assert relative(1.0, 2.0) == 0.5
    assert relative(1.0, 0.0) > 1e300
    assert relative(math.inf, math.inf) == math.inf


def test_kills_are_dealt_to_every_change_of_layout() -> None:
    plans = plan_runs([1, 2, 3], ROUTES, 20)
    assert sum(plan.kills for plan in plans) == 20
    reached = {(plan.stage, *pair) for plan in plans for pair in pairwise(plan.ranks)}
    wanted = {(stage, *pair) for stage in (1, 2, 3) for pair in [(1, 2), (2, 4), (4, 2), (2, 1), (2, 2)]}
    assert reached == wanted
    assert [plan.dropout for plan in plans] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kills", [1, 3, 15, 36, 37, 100])
def test_any_number_of_kills_is_dealt_out(kills: int) -> None:
    plans = plan_runs([1, 3], ROUTES, kills)
    assert sum(plan.kills for plan in plans) == kills
    assert all(1 <= plan.kills <= MOST_KILLS_OF_A_RUN for plan in plans)
    names = [plan.name for plan in [*plans, *{plan.reference for plan in plans}]]
    assert len(names) == len(set(names))


def test_a_long_run_walks_its_route_back_and_forth() -> None:
    assert walk((1, 2, 4), 7) == (1, 2, 4, 2, 1, 2, 4)
    assert walk((2, 1), 4) == (2, 1, 2, 1)


def test_every_kill_leaves_a_checkpoint_before_it_and_steps_after_it() -> None:
    moments = random.Random(1)
    for kills in range(1, MOST_KILLS_OF_A_RUN + 1):
        for _ in range(200):
            resumed = 0
            for left in range(kills, 0, -1):
                killed = kill_after(moments, resumed, left)
                assert resumed + SAVE_INTERVAL <= least_resumed(killed) < killed < STEPS
                resumed = killed // SAVE_INTERVAL * SAVE_INTERVAL


PLAN = Plan(2, (2, 1), dropout=False)
WANTED = {"ZeRO-2 2 -> 1"}
STARTS = [Start(2, "first", 3, 6.25, saving=True), Start(1, "second", None, 7.0)]


def test_the_table_shows_each_start_and_the_last_line_what_was_proved() -> None:
    found = verdict(ledger())
    rows = rows_of(PLAN, STARTS, {"first": 0, "second": 2}, found)
    assert [row.transition for row in rows] == ["ZeRO-2 2", "ZeRO-2 2 -> 1"]
    result = {**summary(rows, WANTED), "seed": 1, "seconds": 9}
    assert result["certified"]
    assert (result["kills"], result["kills_in_a_save"], result["steps_redone"]) == (1, 1, 1)
    line = table(rows).splitlines()[-1]
    assert line.split() == [
        "2",
        "->",
        "1",
        "step",
        "3,",
        "6.2",
        "s",
        "in",
        "a",
        "save",
        "step",
        "2",
        "2",
        "0",
        "0",
        "0",
        "ok",
    ]
    assert last_lines(rows, result).startswith(
        "certified: 1 kill(s), 1 of them in a save, over 1 of 1 changes of layout"
    )


def test_problems_refuse_the_certificate_and_are_listed() -> None:
    rows = rows_of(PLAN, STARTS, {"first": 0, "second": 2}, verdict(changed(3, samples=("1/0",))))
    result = {**summary(rows, WANTED), "seed": 1, "seconds": 9}
    assert not result["certified"]
    assert table(rows).splitlines()[-1].endswith("FAILED")
    assert last_lines(rows, result).splitlines() == [
        "ZeRO-2 2 -> 1 (zero2-2-1): step 3: sample 1 of epoch 1 missed",
        "not certified: 1 problem(s); seed 1",
    ]


def test_a_resume_from_too_old_a_checkpoint_is_a_problem() -> None:
    starts = [replace(STARTS[0], killed=9), STARTS[1]]
    rows = rows_of(PLAN, starts, {"first": 0, "second": 2}, verdict(ledger()))
    assert rows[1].problems == ["killed after step 9, it went on from step 2: saves were lost"]


def test_no_kill_no_certificate() -> None:
    rows = rows_of(PLAN.reference, STARTS[1:], {"second": 0}, {"second": Account(), None: Account()})
    result = {**summary(rows, WANTED), "seed": 1, "seconds": 9}
    assert not result["certified"]
    assert "no run was killed" in last_lines(rows, result)


def test_a_failed_start_is_a_problem() -> None:
    (row,) = failed_rows(PLAN, [STARTS[0], Start(1, None, None, 0.0, failure="it broke")])
    assert (row.transition, row.killed, row.problems) == ("ZeRO-2 2 -> 1", 3, ["it broke"])


def test_many_problems_of_a_start_are_cut_short() -> None:
    rows = rows_of(PLAN, STARTS, {"first": 0, "second": 2}, verdict(ledger(), []))
    rows[0].problems *= 3
    told = last_lines(rows, {**summary(rows, WANTED), "seed": 1, "seconds": 9}).splitlines()
    assert told[4] == "ZeRO-2 2 (zero2-2-1): and 2 more"
    assert told[-1] == "not certified: 8 problem(s); seed 1"
