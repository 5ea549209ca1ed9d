"""A token classifier's losses and scores don't depend on ranks, ZeRO stage and accumulation, nor on a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.tokens.folders import save_model, write_conll
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokens")
    return [
        "--task=token_classification", f"--model.init_from={save_model(folder / 'bert')}",
        f"--labelled.train={write_conll(folder / 'train.conll', 60, seed=1)}",
        f"--labelled.validation={write_conll(folder / 'validation.conll', 21, seed=2)}",
        f"--labelled.test={write_conll(folder / 'test.conll', 9, seed=3, most=9)}",
        "--labelled.max_length=16", "--labelled.stride=4", "--optim.learning_rate=2e-3", "--train.steps=6",
        "--train.eval_interval=3", "--train.global_batch=16", "--train.deterministic=true", *NO_DROPOUT,
    ]  # fmt: skip


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    run(output, *options, "--train.zero_stage=0", "--train.save_interval=3")
    return output


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


@pytest.mark.slow
def test_a_resume_goes_on_exactly(options: list[str], alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *options, "--train.zero_stage=0", "--train.steps=3", "--optim.schedule=constant")
    run(tmp_path / "whole", *options, "--train.zero_stage=0", "--optim.schedule=constant")
    run(tmp_path / "run", *options, "--train.zero_stage=0", "--optim.schedule=constant", "--resume=auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert report(tmp_path / "run") == report(tmp_path / "whole")
    printed = run(tmp_path / "run", *options, "--labelled.stride=5", "--train.steps=9", "--resume=auto", code=2)
    assert "labelled.stride: 5 differs from 4" in printed
