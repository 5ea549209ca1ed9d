"""Runs whose layers compute with rounded numbers: alike on every layout, resumed bit by bit, exported as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.runs import NO_DROPOUT, losses, run

#: a difference of 1e-7 may round another way, which moves a number by a step
BOUND = 1e-3


def options(folder: Path, *more: str) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", "--labelled.max_length=14",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        "--train.steps=4", "--optim.learning_rate=1e-3", "--optim.schedule=constant", "--optim.warmup=0",
        *NO_DROPOUT, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_rounded_layers_learn_alike_on_two_ranks_and_resumed(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    write(tmp_path / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(tmp_path / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    aware, keep = "--train.int8_aware=true", ["--train.save_interval=2", "--train.keep=9"]
    alone, two, resumed = (tmp_path / name for name in ("alone", "two", "resumed"))
    run(alone, *options(tmp_path, aware, "--train.zero_stage=0", *keep))
    run(two, *options(tmp_path, aware, "--train.zero_stage=3", "--train.micro_batch=4"), ranks=2)
    run(tmp_path / "plain", *options(tmp_path, "--train.zero_stage=0"))
    own = losses(alone)
    assert losses(tmp_path / "plain") != own
    for (_, theirs), (_, ours) in zip(losses(two), own, strict=True):
        assert theirs == pytest.approx(ours, rel=BOUND)
    run(resumed, *options(tmp_path, aware, "--train.zero_stage=0", f"--resume={alone / 'checkpoints' / 'step-000002'}"))
    assert losses(resumed) == own[2:]
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (alone, resumed)]
    assert all(values.equal(weights[1][name]) for name, values in weights[0].items())
    refused = run(tmp_path / "other", *options(tmp_path, f"--resume={alone / 'checkpoints' / 'step-000002'}"), code=2)
    assert "train.int8_aware" in refused
