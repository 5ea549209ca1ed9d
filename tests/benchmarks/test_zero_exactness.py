"""AdamW and LAMB under ZeRO are the unsharded optimizers: weights against float64 after 20 clipped steps."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.zero_exactness import Case, all_cases, measure

#: largest relative difference of a parameter; measured 3.3e-7 over all cases
BOUND = 2e-6
ACCUMULATED = [case for case in all_cases() if case.accumulation == 2]
LAMB = [Case(2, "fp32", "lamb", 1), Case(3, "bf16", "lamb", 1)]


def check(rows: list[dict[str, Any]], cases: list[Case]) -> None:
    assert len(rows) == len(cases)
    assert [row for row in rows if not row["difference"] <= BOUND] == []


@pytest.mark.slow
def test_two_ranks_agree_with_float64_at_every_stage_and_precision() -> None:
    check(measure(2, ACCUMULATED), ACCUMULATED)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_layout_agrees_with_float64(ranks: int) -> None:
    check(measure(ranks, all_cases()), all_cases())


@pytest.mark.slow
def test_a_trust_ratio_for_a_flat_partition_would_be_found() -> None:
    rows = measure(2, LAMB, naive=True)
    assert [row for row in rows if row["difference"] < 100 * BOUND] == []
