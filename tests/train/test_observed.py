"""Every rank and every start draws dropout of its own, and a point of the curves counts the tokens of all ranks."""

from __future__ import annotations

import json
import subprocess
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.train.observed import observed
from tests.train.runs import ROOT, command, environment, losses

Steps = list[dict[str, Any]]


class Observed(NamedTuple):
    """Micro-batches of runs of one rank and of two; keys are "fresh", or the step that a run was resumed from."""

    alone: dict[str, Steps]
    ranks: list[dict[str, Steps]]
    fresh: Path
    """the run of two ranks from the beginning"""


@pytest.fixture(scope="module")
def runs(one_rank: Pool, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Each resumes what the other has saved."""
    folder = tmp_path_factory.mktemp("observed")
    data, single, two = f"--data.path={store}", folder / "single", folder / "two"
    two.mkdir()
    options = [data, "--train.steps=4", "--train.save_interval=2"]
    alone = {"fresh": one_rank.apply(observed, (single, options))}
    started = [*command("torchrun", 2), "-m", "tests.train.observed", str(store), str(single / "checkpoints"), str(two)]
    subprocess.run(started, cwd=ROOT, env=environment(), check=True, timeout=200)
    for step in (2, 4):
        checkpoint = two / "fresh" / "checkpoints" / f"step-{step:06d}"
        resume = [f"--resume={checkpoint}", f"--train.steps={step + 1}", "--train.save_interval=null"]
        alone[str(step)] = one_rank.apply(observed, (folder / f"from-{step}", [data, *resume]))
    return Observed(alone, [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)], two / "fresh")


def kept(steps: Steps) -> tuple[bool, ...]:
    """What dropout keeps in the first micro-batch of a run."""
    return tuple(steps[0]["kept"])


def test_the_ranks_draw_dropout_of_their_own(runs: Observed) -> None:
    drawn = [tuple(step["kept"]) for of_rank in runs.ranks for step in of_rank["fresh"]]
    assert len(drawn) == 2 * 4
    assert len(set(drawn)) == len(drawn)


def test_dropout_after_a_resume_by_other_ranks_depends_on_rank_and_step(runs: Observed) -> None:
    """New generators must not be those of the other rank, of the start, or of another resume."""
    for starts in ([runs.alone], runs.ranks):
        drawn = [kept(of_rank[start]) for of_rank in starts for start in ("fresh", "2", "4")]
        assert len(set(drawn)) == len(drawn)


def test_a_point_counts_the_tokens_of_all_ranks(runs: Observed) -> None:
    speeds, times = (losses(runs.fresh, f"train/{name}") for name in ("tokens_per_second", "step_time"))
    counted = {step: 0 for step, _ in speeds}
    for of_rank in runs.ranks:
        assert [step["batch"] for step in of_rank["fresh"]] == [1, 2, 3, 4]
        for step in of_rank["fresh"]:
            assert step["tokens"] > 0
            counted[step["batch"]] += step["tokens"]
    found = {step: speed * seconds for (step, speed), (_, seconds) in zip(speeds, times, strict=True)}
    assert found == pytest.approx(counted, rel=1e-5)
