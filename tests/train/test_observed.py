"""Every start of every rank draws dropout of its own; a point of the curves tells all ranks' tokens, the time of the
steps alone, and the rate that they had."""

from __future__ import annotations

import json
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.train.checkpoint.folder import complete_checkpoints
from engine.train.watch.faults import read_faults
from engine.zero.archive import full_weights
from tests.train.observed import DELAY, delayed, evaluated, observed
from tests.train.runs import execute, losses

Steps = list[dict[str, Any]]
#: of 4 steps that warm up to 1e-3 in 2 and then fall to 0
RATES = (5e-4, 1e-3, 1e-3, 5e-4)


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
    done = execute("tests/train/observed.py", str(store), str(single / "checkpoints"), str(two))
    assert done.returncode == 0, done.stdout
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


def test_an_evaluation_scores_the_held_out_samples_of_all_ranks_without_dropout(
    one_rank: Pool, runs: Observed, store: Path
) -> None:
    """What was exported after the last step, evaluated by one process on as many samples as the run was told."""
    alone = one_rank.apply(evaluated, (runs.fresh / "export", [f"--data.path={store}"]))
    for name in ("mlm_loss", "nsp_loss", "perplexity", "mlm_accuracy", "nsp_accuracy"):
        (step, value), *more = losses(runs.fresh, f"eval/{name}")
        assert (step, more) == (4, [])
        assert value == pytest.approx(alone[name], rel=1e-5), name


def test_a_fault_of_one_rank_is_that_of_all(runs: Observed) -> None:
    """The loss that is judged is the sum of the ranks': rank 0, which writes the record, met nothing itself."""
    output = runs.fresh.with_name("spoiled")
    (found,) = read_faults(output / "faults.jsonl")
    assert (found["step"], found["kind"], found["value"], found["action"]) == (2, "loss", "nan", "skip")
    assert [step for step, _ in losses(output)] == [1, 3, 4]


@pytest.fixture(scope="module")
def slow(one_rank: Pool, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of which two warm up; a save after each, the first of them slow, and an evaluation after the third."""
    output = tmp_path_factory.mktemp("slow")
    options = [
        f"--data.path={store}", "--train.steps=4", "--train.save_interval=1", "--train.keep=9",
        "--train.eval_interval=3", "--optim.warmup=2", "--optim.learning_rate=1e-3",
        "--optim.schedule=linear", "--optim.min_ratio=0",
    ]  # fmt: skip
    one_rank.apply(delayed, (output, options))
    return output


def test_saves_and_evaluations_are_no_step_time(slow: Path) -> None:
    times = losses(slow, "train/step_time")
    assert [step for step, _ in times] == [1, 2, 3, 4]
    assert max(seconds for _, seconds in times) < DELAY / 2


def test_what_is_due_in_an_interval_is_due_after_the_last_step_too(slow: Path) -> None:
    """Every third step of four is evaluated."""
    assert [step for step, _ in losses(slow, "eval/mlm_loss")] == [3, 4]
    saved = [path.name for path in complete_checkpoints(slow / "checkpoints")]
    assert saved == [f"step-{step:06d}" for step in range(1, 5)]


def test_the_curve_of_the_learning_rate_is_that_of_the_updates(slow: Path) -> None:
    """AdamW's first update is the rate itself, up to the sign; biases start at 0 and don't decay."""
    assert losses(slow, "train/learning_rate") == [
        (s, pytest.approx(r)) for s, r in zip(range(1, 5), RATES, strict=True)
    ]
    weights = full_weights(slow / "checkpoints" / "step-000001")
    first = max(float(value.abs().max()) for name, value in weights.items() if name.endswith("dense.bias"))
    assert first == pytest.approx(RATES[0], rel=1e-2)
