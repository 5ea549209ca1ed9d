"""Adapters and frozen weights train alike on every layout and survive kills; checkpoints hold what is trained alone."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from launch.curves import Curve
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import POSITIONS, WORDS, save_tokenizer
from tests.train.runs import NO_DROPOUT, losses, run, start_warm

Alone = Callable[[str], Curve]
BOUND = 1e-4
STEPS = 6
#: wide enough that ZeRO-3 divides its matrices, which DeepSpeed does from 100,000 elements on
WIDE = BertConfig(
    vocab_size=len(WORDS), hidden_size=320, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
METHODS = {
    "lora": ["--adapter.method=lora", "--optim.lora_ratio=4"],
    "dora": ["--adapter.method=dora", "--adapter.rank=4"],
    "ia3": ["--adapter.method=ia3"],
    "houlsby": ["--adapter.method=houlsby", "--adapter.bottleneck=8"],
    "bitfit": ["--adapter.method=bitfit"],
    "freeze": ["--train.freeze=embeddings,layers:0", "--optim.layer_decay=0.7"],
    "lora over freeze": ["--adapter.method=lora", "--train.freeze=layers:0", "--optim.layer_decay=0.7"],
}
#: parameters of each, the classifier's two among them
TRAINED = {
    "lora": 2 * 12 + 2,
    "dora": 3 * 12 + 2,
    "ia3": 3 * 2 + 2,
    "houlsby": 4 * 4 + 2,
    "bitfit": 1 + 8 * 2 + 1 + 2,
    "freeze": 16 + 2 + 2,
    "lora over freeze": 2 * 6 + 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and labelled files."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    BertModel(WIDE).save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert")
    write(folder / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(folder / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> Alone:
    """By method, the losses of one process without ZeRO."""
    return functools.cache(lambda method: train(data, data / "alone" / method, method, 1, 0, 1))


def options(data: Path, method: str, ranks: int, stage: int, accumulation: int) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={data / 'bert'}",
        f"--labelled.train={data / 'train.jsonl'}", f"--labelled.validation={data / 'validation.jsonl'}",
        "--labelled.max_length=14", f"--train.steps={STEPS}", f"--train.micro_batch={16 // ranks // accumulation}",
        f"--train.zero_stage={stage}", "--optim.learning_rate=2e-3", "--optim.schedule=constant", "--optim.warmup=0",
        "--train.verify_update=2", *METHODS[method],
    ]  # fmt: skip


def train(data: Path, output: Path, method: str, ranks: int, stage: int, accumulation: int, *more: str) -> Curve:
    """The curve of the loss of a run whose first two updates were verified, of every trained parameter."""
    arguments = [*options(data, method, ranks, stage, accumulation), *NO_DROPOUT, "--train.save_interval=null", *more]
    printed = run(output, *arguments, ranks=ranks)
    verified = re.findall(r"update verified: step \d+, (\d+) parameters", printed)
    assert verified == [str(TRAINED[method])] * 2, printed
    return losses(output)


def apart(curve: Curve, other: Curve) -> float:
    return max(abs(ours - theirs) / theirs for (_, ours), (_, theirs) in zip(curve, other, strict=True))


FAST = {("lora", 2), ("dora", 3), ("freeze", 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        pytest.param(method, stage, marks=() if (method, stage) in FAST else pytest.mark.slow)
        for method in METHODS
        for stage in range(4)
    ],
)
def test_two_ranks_learn_what_one_learns(data: Path, alone: Alone, tmp_path: Path, method: str, stage: int) -> None:
    accumulation = 2 if stage % 2 else 1
    together = train(data, tmp_path, method, 2, stage, accumulation)
    worst = apart(together, alone(method))
    print(f"{method}, 2 ranks, ZeRO-{stage}, accumulation {accumulation}: largest relative difference {worst:.1e}")
    assert len(together) == STEPS
    assert len({loss for _, loss in together}) == STEPS
    assert worst < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_optimizer_on_the_cpu_learns_the_same(data: Path, alone: Alone, tmp_path: Path, method: str) -> None:
    together = train(data, tmp_path, method, 2, 2, 1, "--zero.offload_optimizer=cpu")
    assert apart(together, alone(method)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("lora", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ia3", 3), ("houlsby", 0), ("bitfit", 1))),
    ],
)
def test_bf16_learns_the_same_but_for_rounding(
    data: Path, alone: Alone, tmp_path: Path, method: str, stage: int
) -> None:
    rounded = train(data, tmp_path, method, 2, stage, 1, "--train.precision=bf16")
    worst = apart(rounded, alone(method))
    print(f"{method}, bf16, ZeRO-{stage}: {worst:.1e}")
    assert worst < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("lora", 3),
        *(
            pytest.param(method, stage, marks=pytest.mark.slow)
            for method, stage in [("dora", 2), ("ia3", 1), ("houlsby", 3), ("bitfit", 0), ("freeze", 2)]
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit_with_dropout_on(data: Path, tmp_path: Path, method: str, stage: int) -> None:
    dropout = ["--adapter.dropout=0.2"] if method in ("lora", "dora", "houlsby") else []
    arguments = [*options(data, method, 2, stage, 1), "--train.save_interval=2", "--model.hidden_dropout=0.1", *dropout]
    run(tmp_path / "whole", *arguments, ranks=2)
    killed = tmp_path / "killed"
    kill_after(killed, killed / "checkpoints" / "step-000002", *arguments)
    assert "resumed" in run(killed, *arguments, "--resume=auto", ranks=2)
    assert losses(killed) == losses(tmp_path / "whole")


def kill_after(output: Path, checkpoint: Path, *arguments: str) -> None:
    """Kill -9 every rank once there is a checkpoint."""
    process = start_warm(output, *arguments, ranks=2)
    deadline = time.monotonic() + 120
    while not checkpoint.is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(method, marks=pytest.mark.slow) for method in ("dora", "ia3", "houlsby", "freeze"))],
)
def test_another_layout_goes_on_alike(data: Path, alone: Alone, tmp_path: Path, method: str) -> None:
    first = [*options(data, method, 2, 3, 1), *NO_DROPOUT, "--train.save_interval=2"]
    kill_after(tmp_path / "parts", tmp_path / "parts" / "checkpoints" / "step-000002", *first)
    moved = tmp_path / "moved"
    shutil.copytree(data / "bert", moved)
    second = [*options(data, method, 1, 0, 2), *NO_DROPOUT, f"--model.init_from={moved}", "--resume=auto"]
    assert "resumed" in run(tmp_path / "parts", *second)
    worst = apart(losses(tmp_path / "parts"), alone(method))
    print(f"{method}: ZeRO-3 on 2 ranks, then ZeRO-0 on 1 over a moved base: {worst:.1e}")
    assert worst < 1e-5


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def told(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "zerobert.json").read_text())
    return values


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_trained_and_a_resume_needs_its_base_and_options(data: Path, tmp_path: Path) -> None:
    output, base = tmp_path / "run", tmp_path / "bert"
    shutil.copytree(data / "bert", base)
    given = [*options(data, "lora", 1, 2, 1), *NO_DROPOUT, f"--model.init_from={base}", "--train.save_interval=3"]
    run(output, *given)
    trained = load_file(output / "export" / "adapter_model.safetensors")
    elements = sum(tensor.numel() for tensor in trained.values())
    checkpoint = output / "checkpoints" / "step-000006"
    # weights and two moments of fp32; beside them headers, the tokenizer, and states of random numbers
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert 12 * elements <= weights < 12 * elements + 20_000
    assert weights < 0.5 * (base / "model.safetensors").stat().st_size
    assert size(output / "export") < 4 * elements + 20_000
    longer = [*given, "--train.steps=8", "--resume=auto"]
    for option, remedy in {
        "--adapter.rank=4": "adapter.rank",
        "--adapter.targets=attention": "adapter.targets",
        "--train.freeze=layers:0": "train.freeze",
        "--adapter.method=dora": "adapter.method",
    }.items():
        assert remedy in one_line(run(output, *longer, option, code=2)), option
    torch.manual_seed(1)
    BertModel(WIDE).save_pretrained(base)
    assert "model.init_from: the base weights of this run" in one_line(run(output, *longer, code=2))
    shutil.rmtree(base)
    shutil.copytree(data / "bert", base)
    assert "step 8/8" in run(output, *longer)
    assert told(output / "export")["facts"]["base weights"]


def one_line(printed: str) -> str:
    """The only line of an error."""
    lines = [line for line in printed.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0]
