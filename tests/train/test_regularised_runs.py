"""Runs with regularisers of weights: on every layout alike, resumed bit by bit, and exporting their averages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import RunConfig
from engine.export import AS_IT_IS
from engine.optim.average import AVERAGE, decay_at
from engine.zero.archive import Archive, full_weights
from launch.average import average
from launch.export import export
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.runs import NO_DROPOUT, losses, run

BOUND = 1e-4
STEPS, EMA = 6, 0.7
WEIGHTS = ["--regularise.start_decay=20", f"--regularise.ema={EMA}"]
#: one layer alone, so that what decays are the embeddings
ALL = [*WEIGHTS, "--regularise.layer_drop=0.5", "--regularise.dropout_end=0.2", "--regularise.fresh_layers=1"]


def options(folder: Path, *more: str) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", "--labelled.max_length=14",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        f"--train.steps={STEPS}", "--optim.learning_rate=5e-3", "--optim.schedule=constant", "--optim.warmup=0",
        "--labelled.metric=loss", "--train.verify_update=3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and labelled examples."""
    made = tmp_path_factory.mktemp("regularised")
    tiny_bert(made / "bert")
    write(made / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(made / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """One process at stage 0, without dropout, that keeps a checkpoint of each step."""
    more = ["--train.zero_stage=0", "--train.save_interval=1", "--train.keep=9", "--train.eval_interval=3"]
    printed = run(folder / "alone", *options(folder, *NO_DROPOUT, *WEIGHTS, *more))
    assert printed.count("update verified") == 3
    return folder / "alone"


def exported(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "export" / "model.safetensors")


def scores(output: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / "report" / "report.json").read_text())["scores"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_two_ranks_learn_what_one_learns(folder: Path, alone: Path, stage: int) -> None:
    more = [f"--train.zero_stage={stage}", "--train.micro_batch=4", "--train.eval_interval=3"]
    output = folder / f"two-{stage}"
    printed = run(output, *options(folder, *NO_DROPOUT, *WEIGHTS, *more), ranks=2)
    assert printed.count("update verified") == 3
    for tag in ("train/loss", "eval/loss"):
        pairs = zip(losses(output, tag), losses(alone, tag), strict=True)
        assert max(abs(ours - theirs) / theirs for (_, ours), (_, theirs) in pairs) < BOUND
    assert scores(output) == pytest.approx(scores(alone), rel=BOUND)
    for name, theirs in exported(alone).items():
        torch.testing.assert_close(exported(output)[name], theirs, rtol=BOUND, atol=1e-6)


def test_what_is_exported_is_the_average_of_the_checkpoints(alone: Path, tmp_path: Path) -> None:
    averages: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        archive = Archive(alone / "checkpoints" / f"step-{step:06d}")
        share = 1.0 - decay_at(step, EMA) if averages else 1.0
        for name in archive.index.parameters:
            weights = archive.whole(name)
            before = averages.get(name, torch.zeros_like(weights))
            averages[name] = before + share * (weights - before)
            torch.testing.assert_close(archive.whole(name, AVERAGE), averages[name], rtol=1e-5, atol=1e-7)
    export(alone / "checkpoints" / f"step-{STEPS:06d}", tmp_path / "last", "last", AS_IT_IS)
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert last.keys() == averages.keys()
    for name, theirs in averages.items():
        torch.testing.assert_close(last[name], theirs, rtol=1e-5, atol=1e-7)
    best = json.loads((alone / "export" / "zerobert.json").read_text())["best"]["step"]
    if best == STEPS:
        assert all(torch.equal(last[name], weights) for name, weights in exported(alone).items())


def test_the_last_checkpoints_have_a_mean(alone: Path, tmp_path: Path) -> None:
    told = average([alone], tmp_path / "mean", 3, True)
    assert "averaged 3 models" in told
    assert "basin" not in told
    found = load_file(tmp_path / "mean" / "model.safetensors")
    last = [full_weights(alone / "checkpoints" / f"step-{step:06d}") for step in range(STEPS - 2, STEPS + 1)]
    for name, mean in found.items():
        torch.testing.assert_close(mean, sum(weights[name] for weights in last) / 3, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(folder: Path) -> None:
    """With every regulariser and dropout; decay pulls to the weights that are read again from the start model."""
    whole, parted = folder / "whole", folder / "parted"
    more = options(folder, *ALL, "--train.save_interval=3", "--train.keep=9", "--train.eval_interval=2")
    printed = run(whole, *more)
    assert "newly initialised: encoder layers 0 (16), pooler (2)" in printed
    printed = run(parted, *more, f"--resume={whole / 'checkpoints' / 'step-000003'}")
    assert "resumed" in printed
    assert printed.count("update verified") == 3
    assert losses(parted)[-3:] == losses(whole)[-3:]
    assert losses(parted, "eval/loss")[-1] == losses(whole, "eval/loss")[-1]
    archives = [Archive(output / "checkpoints" / f"step-{STEPS:06d}") for output in (whole, parted)]
    for name in archives[0].index.parameters:
        for state in ("weight", AVERAGE, "exp_avg"):
            assert torch.equal(*(archive.whole(name, state) for archive in archives)), (name, state)
    for field, value in (("ema", 0.5), ("fresh_layers", 0)):
        told = run(parted, *more, f"--regularise.{field}={value}", "--resume=auto", code=2)
        assert f"regularise.{field}: {value} differs from" in told


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_same_layers_are_skipped_at_every_stage(folder: Path, adapter: str) -> None:
    """The draws are a rank's, whatever it shards, and recomputation repeats them; stage 3 gathers what layers need."""
    found = []
    for stage, recomputed in ((0, False), (1, False), (2, True), (3, True)):
        output = folder / f"skipping-{adapter}-{stage}"
        more = [
            f"--train.zero_stage={stage}",
            f"--model.activation_checkpointing={recomputed}",
            "--train.micro_batch=4",
        ]
        more += ["--regularise.layer_drop=0.6", f"--adapter.method={adapter}"]
        run(output, *options(folder, *NO_DROPOUT, *more), ranks=2)
        found.append([loss for _, loss in losses(output)])
    without = folder / f"keeping-{adapter}"
    run(without, *options(folder, *NO_DROPOUT, "--train.micro_batch=4", f"--adapter.method={adapter}"), ranks=2)
    assert [loss for _, loss in losses(without)] != pytest.approx(found[0], rel=BOUND)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=BOUND)


def test_a_frozen_base_is_no_start_to_decay_to(folder: Path) -> None:
    told = run(folder / "frozen", *options(folder, *WEIGHTS, "--train.freeze=encoder"), code=2)
    assert "regularise.start_decay: 20.0 is not allowed; no weight of model.init_from is trained; leave it out" in told


def test_defaults_keep_no_further_tensors() -> None:
    assert RunConfig().regularise.weight_copies == 0
