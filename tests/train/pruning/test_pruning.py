"""Gradual pruning: the same whatever the layout and over a resume, with the shares that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from engine.model.pruning.units import sublayers
from engine.optim.shard import Fragment, ParameterInfo
from engine.train.pruning.pruning import unit_sums, units_of
from launch.curves import Curve
from tests.model.pruning.tiny import config_of
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import POSITIONS, WORDS, save_tokenizer
from tests.train.runs import NO_DROPOUT, losses, run

STEPS = 14
#: wide enough that ZeRO-3 divides its matrices
WIDE = BertConfig(
    vocab_size=len(WORDS), hidden_size=320, num_hidden_layers=2, num_attention_heads=4, intermediate_size=320,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
BOUND = 1e-4


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_sums_and_units_of_parts_are_those_of_the_whole(kind: str) -> None:
    from engine.config import architecture_of

    config = config_of("modernbert")
    model = architecture_of(config).build("masked_lm", config, False)
    part = next(each for each in sublayers(model) if each.kind == kind)
    name, shape = f"{part.output_name}.weight", tuple(part.output.weight.shape)
    info, values = ParameterInfo(name, shape), torch.randn(shape)
    whole = values.double().view(shape[0], part.count, -1).sum((0, 2))
    pieces = [Fragment(0, 0, length, start) for start, length in ((0, 50), (50, 333), (383, values.numel() - 383))]
    flat = values.view(-1)
    parts = [flat[piece.parameter_start : piece.parameter_start + piece.length] for piece in pieces]
    sums = [unit_sums(own, piece.parameter_start, info, part) for own, piece in zip(parts, pieces, strict=True)]
    assert torch.allclose(torch.stack(sums).sum(0), whole)
    gone = torch.arange(part.count) % 2 == 0
    zeroed = [
        own.masked_fill(gone[units_of(info, p, part, behind=True)], 0.0) for own, p in zip(parts, pieces, strict=True)
    ]
    (before,) = part.inputs.values()
    rows = ParameterInfo("", tuple(before.weight.shape))
    units = units_of(rows, Fragment(0, 0, rows.numel, 0), part, behind=False).view(rows.shape)
    with torch.no_grad():
        part.output.weight.copy_(values)
    part.zero(gone)
    assert torch.equal(torch.cat(zeroed).view(shape), part.output.weight)
    assert torch.equal(before.weight == 0, gone[units])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and labelled files."""
    made = tmp_path_factory.mktemp("pruning")
    torch.manual_seed(0)
    BertModel(WIDE).save_pretrained(made / "bert")
    save_tokenizer(made / "bert")
    write(made / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(made / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    return made


def options(folder: Path, stage: int, *more: str) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", f"--train.steps={STEPS}",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        "--labelled.max_length=14", "--optim.learning_rate=5e-4", "--optim.schedule=constant", "--optim.warmup=0",
        "--prune.heads=0.5", "--prune.neurons=0.25", "--prune.interval=2", f"--train.zero_stage={stage}",
        "--train.micro_batch=4", "--train.verify_update=1", *NO_DROPOUT, *more,
    ]  # fmt: skip


def zeros(output: Path) -> dict[str, list[int]]:
    """Units of each sub-layer that are kept, by the export's weights, whose rows and columns must agree."""
    weights = load_file(output / "export" / "model.safetensors")
    kept: dict[str, list[int]] = {"heads": [], "neurons": []}
    for layer in range(2):
        prefix = f"bert.encoder.layer.{layer}."
        for kind, width, before, behind in (
            (
                "heads",
                80,
                ("attention.self.query", "attention.self.key", "attention.self.value"),
                "attention.output.dense",
            ),
            ("neurons", 1, ("intermediate.dense",), "output.dense"),
        ):
            there = (weights[f"{prefix}{behind}.weight"] != 0).any(0).view(-1, width).any(1)
            for name in before:
                rows = (weights[f"{prefix}{name}.weight"] != 0).any(1).view(-1, width).any(1)
                assert torch.equal(rows, there), name
            kept[kind].append(int(there.sum()))
    return kept


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run of one process without ZeRO, saved in the middle of the schedule."""
    run(folder / "alone", *options(folder, 0, "--train.save_interval=5", "--train.keep=9"))
    return folder / "alone"


def apart(curve: Curve, other: Curve) -> float:
    assert [step for step, _ in curve] == [step for step, _ in other]
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(curve, other, strict=True))


def weights_apart(output: Path, other: Path) -> float:
    ours, theirs = (load_file(each / "export" / "model.safetensors") for each in (output, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.slow
def test_a_run_ends_with_the_shares_that_were_asked_for(alone: Path) -> None:
    kept = zeros(alone)
    assert sum(kept["heads"]) == 4
    assert sum(kept["neurons"]) == 160


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_prune_what_one_prunes(folder: Path, alone: Path, tmp_path: Path, stage: int) -> None:
    run(tmp_path, *options(folder, stage, "--train.save_interval=null"), ranks=2)
    assert zeros(tmp_path) == zeros(alone)
    print(f"ZeRO-{stage}: {apart(losses(tmp_path), losses(alone)):.1e}, weights {weights_apart(tmp_path, alone):.1e}")
    assert apart(losses(tmp_path), losses(alone)) < BOUND
    assert weights_apart(tmp_path, alone) < 1e-3


@pytest.mark.slow
def test_a_resume_prunes_what_the_undisturbed_run_prunes(folder: Path, alone: Path, tmp_path: Path) -> None:
    start = alone / "checkpoints" / "step-000005"
    run(tmp_path, *options(folder, 2, f"--resume={start}", "--train.save_interval=null"), ranks=2)
    assert zeros(tmp_path) == zeros(alone)
    assert weights_apart(tmp_path, alone) < 1e-3


@pytest.mark.slow
def test_bf16_ends_with_the_same_shares(folder: Path, tmp_path: Path) -> None:
    run(tmp_path, *options(folder, 1, "--train.precision=bf16", "--prune.even=true", "--train.save_interval=null"))
    assert zeros(tmp_path) == {"heads": [2, 2], "neurons": [80, 80]}
