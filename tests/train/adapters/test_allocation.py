"""AdaLoRA's ranks are moved as peft moves them, whatever the layout, and over a resume in mid-schedule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from engine.config import AdapterConfig
from engine.errors import UserError
from engine.export import Wish, export_best
from engine.model.adapters import budget
from launch.curves import Curve
from tests.single_rank import single_rank
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.adapters.against_peft import ADAPTER, STEPS, differences
from tests.train.runs import NO_DROPOUT, free_port, losses, run

LAYERS = 6
TARGET = ADAPTER.rank * LAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and labelled examples."""
    made = tmp_path_factory.mktemp("adalora")
    tiny_bert(made / "bert")
    write(made / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(made / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    return made


@pytest.mark.slow
def test_importance_masks_and_weights_are_those_of_peft(folder: Path) -> None:
    """Also under ZeRO-3 with nothing left whole, where the penalty gathers factors itself."""
    with single_rank(free_port()) as rank:
        for stage in (0, 2, 3):
            found = rank.apply(differences, (folder / "bert", str(folder / "train.jsonl"), stage))
            worst = {name: max(step[name] for step in found) for name in ("weights", "sensitivity", "uncertainty")}
            print(f"stage {stage}: largest differences {worst}")
            assert max(worst.values()) < 1e-5
            assert [step["mask"] for step in found] == [0.0] * STEPS
            kept = [step["kept"] for step in found]
            assert kept[3] > kept[5] > kept[7] >= kept[8] == TARGET
            assert kept[8:] == [TARGET] * 4  # once they are final, also those that a step made non-zero again


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_importance_in_bf16_is_nearly_that_of_fp32(folder: Path, stage: int) -> None:
    """Each stage has another wrapper of DeepSpeed's around the optimizer."""
    with single_rank(free_port()) as rank:
        found = rank.apply(differences, (folder / "bert", str(folder / "train.jsonl"), stage, "bf16"))
    worst = {name: max(step[name] for step in found[:3]) for name in ("sensitivity", "uncertainty")}
    print(f"stage {stage}, bf16: largest differences {worst}")
    assert 0.0 < max(worst.values()) < 0.05
    assert found[-1]["kept"] == TARGET


def options(folder: Path, *more: str) -> list[str]:
    values = {
        name: getattr(ADAPTER, name) for name in ("method", "initial_rank", "rank", "warmup", "final", "interval")
    }
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", f"--train.steps={STEPS}",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        "--labelled.max_length=14", "--optim.learning_rate=5e-3", "--optim.schedule=constant", "--optim.warmup=0",
        *(f"--adapter.{name}={value}" for name, value in values.items()), *NO_DROPOUT, *more,
    ]  # fmt: skip


TWO = ["--train.zero_stage=2", "--train.micro_batch=4", "--train.save_interval=5", "--train.keep=9"]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run on two ranks at ZeRO-2 with accumulation, saved in the middle of the schedule and after its end."""
    run(folder / "whole", *options(folder, *TWO), ranks=2)
    return folder / "whole"


def exported(output: Path) -> dict[str, Tensor]:
    return load_file(output / "export" / "adapter_model.safetensors")


def apart(output: Path, other: Path) -> float:
    """The largest difference of two runs' exported weights, of which the kept ranks must be the same."""
    ours, theirs = exported(output), exported(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert "lora_E" not in name or torch.equal(tensor == 0, theirs[name] == 0)
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def relative(curve: Curve, other: Curve) -> float:
    assert [step for step, _ in curve] == [step for step, _ in other]
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(curve, other, strict=True))


def test_the_budget_is_reached(whole: Path) -> None:
    factors = {name: tensor for name, tensor in exported(whole).items() if "lora_E" in name}
    ranks = [int((tensor != 0).sum()) for tensor in factors.values()]
    print(f"ranks {ranks}")
    assert len(ranks) == LAYERS
    assert sum(ranks) == TARGET
    penalties = [value for _, value in losses(whole, "train/orthogonality")]
    assert penalties[-1] < penalties[0]


def test_peft_opens_what_was_trained_and_a_merge_computes_the_same(whole: Path, tmp_path: Path) -> None:
    export_best(whole, tmp_path / "merged", Wish(merge=True))
    config = BertConfig.from_pretrained(whole / "export")
    base = BertForSequenceClassification.from_pretrained(whole.parent / "bert", config=config).eval()
    ids = torch.randint(5, 11, (4, 9), generator=torch.Generator().manual_seed(0))
    before = base(ids).logits
    opened = peft.PeftModel.from_pretrained(base, whole / "export").eval()(ids).logits
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()(ids).logits
    torch.testing.assert_close(merged, opened, rtol=1e-5, atol=1e-6)
    assert float((opened - before).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "micro_batch"), [(1, 0, 16), (2, 3, 4), pytest.param(2, 1, 8, marks=pytest.mark.slow)]
)
def test_layouts_keep_the_same_ranks(folder: Path, whole: Path, ranks: int, stage: int, micro_batch: int) -> None:
    output = folder / f"{ranks}-{stage}"
    layout = [f"--train.zero_stage={stage}", f"--train.micro_batch={micro_batch}", "--train.save_interval=null"]
    run(output, *options(folder, *layout, "--monitor.norm_interval=4"), ranks=ranks)
    worst = relative(losses(output), losses(whole))
    print(f"{ranks} ranks, ZeRO-{stage}: losses within {worst:.1e}, weights within {apart(output, whole):.1e}")
    assert worst < 1e-5
    assert apart(output, whole) < 1e-5
    norms = losses(output, "update_norm/layer.0")
    assert [step for step, _ in norms] == [4, 8, 12]
    assert min(value for _, value in norms) > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(folder: Path, whole: Path, step: int) -> None:
    output = folder / f"resumed-{step}"
    start = whole / "checkpoints" / f"step-{step:06d}"
    run(output, *options(folder, *TWO, f"--resume={start}"), ranks=2)
    assert apart(output, whole) == 0.0
    assert losses(output) == [point for point in losses(whole) if point[0] > step]


@pytest.mark.parametrize("step", [10, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_layout(folder: Path, whole: Path, step: int) -> None:
    """Importance, and after the schedule what is kept, come from a checkpoint of ZeRO-2 on two ranks."""
    output = folder / f"other-{step}"
    start = whole / "checkpoints" / f"step-{step:06d}"
    layout = ["--train.zero_stage=3", "--train.micro_batch=16", "--train.save_interval=null"]
    run(output, *options(folder, *layout, f"--resume={start}"))
    assert apart(output, whole) < 1e-5


def test_a_resume_does_not_change_the_schedule(folder: Path, whole: Path) -> None:
    start = whole / "checkpoints" / "step-000005"
    said = run(folder / "longer", *options(folder, f"--resume={start}", "--train.steps=20"), code=2)
    assert "train.steps: 20 differs from 12 in" in said


@pytest.mark.parametrize("steps", [10, 30, 97])
def test_the_budget_shrinks_as_peft_says(steps: int) -> None:
    adapter = AdapterConfig(method="adalora", initial_rank=9, rank=4, warmup=0.1, final=0.3, interval=3)
    schedule = budget.Schedule.of(adapter, steps)
    told = peft.AdaLoraConfig(
        init_r=9, target_r=4, deltaT=3, tinit=schedule.warmup, tfinal=steps - schedule.last, total_step=steps
    )
    allocator = peft.tuners.adalora.RankAllocator(torch.nn.Module(), told, "default")
    allocator.init_bgt, allocator.target_bgt = 9 * LAYERS, 4 * LAYERS
    for step in range(1, schedule.last):
        size, changes = allocator.budget_schedule(step)
        assert schedule.budget(step, LAYERS) == (size if changes else None)
    assert schedule.budget(schedule.last, LAYERS) == 4 * LAYERS
    assert {schedule.budget(step, LAYERS) for step in range(schedule.last + 1, steps + 1)} <= {None}


def test_just_the_budget_is_kept_of_equal_scores() -> None:
    assert budget.kept(torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0]), 3).tolist() == [False, True, False, True, True]
    assert budget.kept(torch.ones(4), 4).all()


def test_parts_of_a_factor_know_their_triplets() -> None:
    for name, shape in {"x.lora_A.default": (3, 4), "x.lora_E.default": (3, 1), "x.lora_B.default": (5, 3)}.items():
        of = budget.triplets_of(name, shape, 0, shape[0] * shape[1])
        assert torch.equal(of[2:7], budget.triplets_of(name, shape, 2, 5)[: len(of[2:7])])
        assert of.bincount().tolist() == [budget.spread(name, shape)] * 3
        assert all(a <= b for a, b in pairwise(of.tolist())) is (".lora_B." not in name)


@pytest.mark.parametrize(("steps", "interval"), [(12, 10), (5, 4), (1, 1)])
def test_a_run_too_short_for_the_schedule_is_refused(steps: int, interval: int) -> None:
    adapter = AdapterConfig(method="adalora", interval=interval)
    with pytest.raises(
        UserError, match=f"^adapter.interval: {interval} .* of {steps}, and no multiple of it lies there"
    ):
        budget.Schedule.of(adapter, steps).check()
    budget.Schedule.of(AdapterConfig(method="adalora", interval=2), 12).check()


def test_a_short_run_ends_in_one_line(folder: Path) -> None:
    said = run(folder / "short", *options(folder, "--train.steps=2"), code=2)
    assert "adapter.interval: 2" in said
    assert "Traceback" not in said
    swapped = ["--zero.offload_optimizer=nvme", f"--zero.nvme_path={folder}", "--train.zero_stage=3"]
    said = run(folder / "nvme", *options(folder, *swapped), code=2)
    assert "zero.offload_optimizer: 'nvme' is not allowed; adapter.method adalora changes weights between steps" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [("initial_rank", 2), ("interval", 0), ("warmup", 1.0), ("final", -0.1), ("final", 0.9), ("orthogonality", -1.0)],
)
def test_values_that_make_no_budget_are_refused(field: str, value: float) -> None:
    adapter = replace(ADAPTER, **{field: value})
    with pytest.raises(UserError, match=f"^adapter.{field}: {value} is not allowed; "):
        adapter.validate()
