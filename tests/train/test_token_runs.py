"""A token classifier's losses and scores don't depend on ranks, ZeRO stage and accumulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.tokens.folders import save_model, write_conll
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference

WEIGHTS = ("--labelled.class_weights=balanced", "--labelled.label_smoothing=0.1")


@pytest.fixture(scope="module", params=[(), pytest.param(WEIGHTS, marks=pytest.mark.slow)], ids=["plain", "weighted"])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokens")
    return [
        "--task=token_classification", f"--model.init_from={save_model(folder / 'bert')}",
        f"--labelled.train={write_conll(folder / 'train.conll', 60, seed=1)}",
        f"--labelled.validation={write_conll(folder / 'validation.conll', 21, seed=2)}",
        f"--labelled.test={write_conll(folder / 'test.conll', 9, seed=3, most=9)}",
        "--labelled.max_length=16", "--labelled.stride=4", "--optim.learning_rate=2e-3", "--train.steps=6",
        "--train.eval_interval=3", "--train.global_batch=16", "--train.deterministic=true", *NO_DROPOUT,
        *request.param,
    ]  # fmt: skip


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    run(output, *options, "--train.zero_stage=0", "--train.save_interval=3")
    return output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_with_accumulation_are_one_process(
    options: list[str], alone: Path, tmp_path: Path, stage: int
) -> None:
    run(tmp_path / "two", *options, f"--train.zero_stage={stage}", "--train.micro_batch=2", ranks=2)
    for tag in ("train/loss", "eval/loss", "eval/f1"):
        assert len(losses(alone, tag)) >= 2
        assert largest_difference(losses(tmp_path / "two", tag), losses(alone, tag)) < 1e-5
    one, two = report(alone), report(tmp_path / "two")
    assert two["scores"].pop("loss") == pytest.approx(one["scores"].pop("loss"), rel=1e-5)
    assert two == one
    for name in ("predictions.conll", "predictions.jsonl"):
        assert (tmp_path / "two" / "report" / name).read_text() == (alone / "report" / name).read_text()


def test_other_windows_are_refused_on_resume(options: list[str], alone: Path) -> None:
    printed = run(alone, *options, "--labelled.stride=5", "--train.steps=9", "--resume=auto", code=2)
    assert "labelled.stride: 5 differs from 4" in printed
