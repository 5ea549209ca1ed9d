"""Recorded steps: the files, the sums, the FLOPs, and that training is what it would have been."""

from __future__ import annotations

import gzip
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import Shape, TrainConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.errors import UserError
from engine.kernels.gemm import GemmPeak
from engine.model.flops import forward_flops, training_flops
from engine.tasks.pretrain import Pretraining
from engine.train.profile.breakdown import HOST, KINDS, PARTS, Operators, RankRecord, kind_of, operators, summarise
from engine.train.profile.profile import check_profile, compress, warm_up_steps
from engine.train.profile.recording import BACKWARD, FORWARD, OTHER, Clock, wrapped
from launch.configure.options import parse
from tests.train.runs import SMALL, losses, run

STEPS = 7
RECORDED = 3
FIRST = 4
OPTIONS = [f"--train.steps={STEPS}", "--train.save_interval=null", "--data.short_sequence_probability=0.5"]


@dataclass(frozen=True)
class Profiled:
    """A run that recorded steps, and what it left."""

    options: list[str]
    output: Path
    printed: str
    summary: dict[str, Any]


def profiled(store: Path, output: Path, ranks: int, *more: str) -> Profiled:
    options = [f"--data.path={store}", *OPTIONS, *more]
    printed = run(output, *options, f"--train.profile={RECORDED}", ranks=ranks)
    return Profiled(options, output, printed, json.loads((output / "profile" / "summary.json").read_text()))


def check_run(found: Profiled, ranks: int) -> None:
    """What holds for every recorded run."""
    summary = found.summary
    assert (summary["first_step"], summary["steps"], summary["ranks"]) == (FIRST, RECORDED, ranks)
    assert tuple(summary["parts"]) == PARTS
    assert tuple(summary["kinds"]) == KINDS
    assert sum(summary["parts"].values()) == pytest.approx(summary["step_seconds"], rel=1e-6)
    # two clocks, the profiler's and ours, and what lies between their readings
    assert sum(summary["kinds"].values()) == pytest.approx(summary["step_seconds"], rel=0.05)
    # DeepSpeed has nothing to reduce on one rank at stage 0
    idle = {"gradient reduction"} if ranks == 1 and "--train.zero_stage=0" in found.options else set()
    assert {part for part in PARTS if summary["parts"][part] == 0} == idle
    assert min(summary["parts"].values()) >= 0
    for kind in ("matrix products", "attention", "element-wise", "embedding", "optimizer", "copies and casts"):
        assert summary["kinds"][kind] > 0, kind
    assert 0 < summary["mfu"] < 1.2
    assert summary["mfu"] == pytest.approx(summary["flops_per_second"] / summary["gemm_peak"])
    assert summary["flops_per_step"] == pytest.approx(expected_flops(found), rel=1e-9)
    assert [Path(path).name for path in summary["traces"]] == [f"rank{rank}.pt.trace.json" for rank in range(ranks)]
    for path in summary["traces"]:
        check_trace(json.loads(Path(path).read_text())["traceEvents"], set(PARTS) - {OTHER} - idle)


def check_trace(events: list[dict[str, Any]], parts: set[str]) -> None:
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    steps = [f"ProfilerStep#{step}" for step in range(FIRST, FIRST + RECORDED)]
    assert [name for name in ranges if name.startswith("ProfilerStep")] == steps
    assert set(PARTS) & set(ranges) == parts
    assert sum(event.get("cat") == "cpu_op" for event in events) > 100 * RECORDED


def expected_flops(found: Profiled) -> float:
    """Of the very batches of the recorded steps, a step."""
    config = parse([f"--output={found.output}", *SMALL, *found.options])
    task = Pretraining(config)
    shape = Shape(32, 2, 2, 128, task.model_config.vocab_size)
    batches = training_batches(task.train_source(), BatchLayout(16, 16), Cursor(), 0)
    recorded = [next(batches) for _ in range(FIRST - 1 + RECORDED)][FIRST - 1 :]
    assert len({length for batch in recorded for length in batch.inputs["lengths"].tolist()}) > 1, "lengths differ"
    each = [
        training_flops(shape, batch.inputs["lengths"].tolist(), batch.inputs["mlm_positions"].numel())
        for batch in recorded
    ]
    return sum(each) / RECORDED


@pytest.fixture(scope="module")
def sharded(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """2 ranks, ZeRO-2, accumulation 2."""
    return profiled(store, tmp_path_factory.mktemp("profile") / "run", 2, "--train.micro_batch=4")


def test_a_run_tells_where_its_time_went(sharded: Profiled) -> None:
    check_run(sharded, 2)
    assert sharded.summary["kinds"]["communication"] > 0
    assert "communication: all_reduce" in {row["name"] for row in sharded.summary["top"]}


def test_its_lines_are_printed_once_and_written_to_tensorboard(sharded: Profiled) -> None:
    assert sharded.printed.count("profile: steps 4 to 6") == 1
    assert "of the measured GEMM peak (MFU)" in sharded.printed
    assert "of 2 ranks at once: fp32 " in sharded.printed
    assert "profiler_start" not in sharded.printed
    events = EventAccumulator(str(sharded.output / "tensorboard")).Reload()
    (text,) = events.Tensors("profile/summary/text_summary")
    assert text.step == FIRST + RECORDED - 1
    assert b"profile: steps 4 to 6" in text.tensor_proto.string_val[0]


@pytest.mark.slow
def test_recording_changes_no_loss(sharded: Profiled, tmp_path: Path) -> None:
    run(tmp_path / "plain", *sharded.options, ranks=2)
    assert losses(sharded.output) == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["--train.zero_stage=0"]),
        (1, ["--train.zero_stage=1", "--train.precision=bf16", "--optim.name=lamb"]),
        (2, ["--train.zero_stage=0", "--train.micro_batch=8"]),
        (2, ["--train.zero_stage=3", "--train.micro_batch=4"]),
        (2, ["--train.zero_stage=1", "--train.precision=bf16", "--train.micro_batch=4", "--data.workers=1"]),
        (1, ["--train.zero_stage=2", "--model.activation_checkpointing=true", "--train.eval_interval=5"]),
    ],
)
def test_every_stage_is_recorded(store: Path, tmp_path: Path, ranks: int, options: list[str]) -> None:
    found = profiled(store, tmp_path / "run", ranks, *options)
    check_run(found, ranks)
    run(tmp_path / "plain", *found.options, ranks=ranks)
    assert losses(found.output) == losses(tmp_path / "plain")


@pytest.mark.slow
def test_a_resume_with_too_few_steps_records_none(store: Path, tmp_path: Path) -> None:
    options = [f"--data.path={store}", "--train.save_interval=5", "--train.profile=3"]
    run(tmp_path, *options, "--train.steps=6")
    (tmp_path / "checkpoints" / "latest").write_text("step-000005\n")
    before = (tmp_path / "profile" / "summary.json").read_bytes()
    printed = run(tmp_path, *options, "--train.steps=6", f"--resume={tmp_path / 'checkpoints' / 'step-000005'}")
    assert "profile: left out, 1 steps are left and the first 3 are not recorded" in printed
    assert (tmp_path / "profile" / "summary.json").read_bytes() == before


@pytest.mark.parametrize("value", [0, -2])
def test_a_number_of_steps_that_is_none_is_refused(value: int) -> None:
    with pytest.raises(UserError, match=rf"train.profile: {value} is not allowed; give a whole number of at least 1"):
        TrainConfig(profile=value).validate()


@pytest.mark.parametrize(
    ("profile", "total", "verified", "remedy"),
    [
        (5, 7, 1, "its first 3 are not recorded; give at most 4"),
        (1, 2, 1, "its first 3 are not recorded; give the run more steps"),
        (8, 10, 2, "its first 4 are not recorded; give at most 6"),
    ],
)
def test_more_steps_than_the_run_has_are_refused(profile: int, total: int, verified: int, remedy: str) -> None:
    train = TrainConfig(profile=profile, verify_update=verified)
    with pytest.raises(
        UserError, match=f"train.profile: {profile} is not allowed; the run has {total} steps.*{remedy}"
    ):
        check_profile(train, total)
    check_profile(replace(train, profile=None), total)
    if total > warm_up_steps(train):
        check_profile(replace(train, profile=total - warm_up_steps(train)), total)


def test_the_command_refuses_it_in_one_line(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    printed = run(output, f"--data.path={store}", "--train.steps=5", "--train.profile=3", code=2)
    assert printed.splitlines()[-1].startswith("error: train.profile: 3 is not allowed; the run has 5 steps")
    assert "Traceback" not in printed
    assert not output.exists()


def test_flops_of_packed_sequences_are_their_sum() -> None:
    shape = Shape(64, 3, 4, 256, 1000)
    parts = forward_flops(shape, [40], 6) + forward_flops(shape, [7], 1)
    assert forward_flops(shape, [40, 7], 7) == parts
    assert training_flops(shape, [40, 7], 7) == 3 * parts
    assert forward_flops(shape, [40], 6) < forward_flops(shape, [47], 6)
    of_six = forward_flops(shape, [40], 6) - forward_flops(shape, [40], 0)
    head, of_the_last_layer = 64 * 64 + 64 * 1000, 2 * 64 * 64 + 2 * 64 * 256
    assert of_six == 2 * 6 * (head + of_the_last_layer)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::linear", "matrix products"),
        ("zerobert::linear_cross_entropy", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::embedding_dense_backward", "embedding"),
        ("_RotaryAttentionBackward", "attention"),
        ("_AddedNorm", "element-wise"),
        ("_GeGluBackward", "element-wise"),
        ("aten::native_layer_norm", "element-wise"),
        ("aten::mul", "element-wise"),
        ("aten::index_add_", "element-wise"),
        ("zerobert::softmax_cross_entropy_", "element-wise"),
        ("aten::_to_copy", "copies and casts"),
        ("aten::index_select", "copies and casts"),
        ("aten::zero_", "copies and casts"),
        ("aten::t", "other operators"),
        ("aten::empty_strided", "other operators"),
        ("c10d::allreduce_", "communication"),
        ("gloo:all_reduce", "communication"),
        ("communication: broadcast", "communication"),
        ("zerobert::lamb_moments_", "optimizer"),
        ("Optimizer.step#FusedAdamW.step", "optimizer"),
        ("autograd::engine::evaluate_function: EmbeddingBackward0", HOST),
        ("torch::autograd::AccumulateGrad", HOST),
        ("AddmmBackward0", HOST),
        ("gradient reduction", HOST),
        ("optimizer", HOST),
    ],
)
def test_operators_have_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@dataclass
class Event:
    """What `operators` reads of a profiler's event."""

    name: str
    self_cpu_time_total: float
    self_device_time_total: float = 0.0
    cpu_children: list[Event] = field(default_factory=list)


def test_pieces_of_attention_are_attention() -> None:
    inner = [Event("aten::bmm", 5e5, 7e5, [Event("aten::copy_", 1e5)]), Event("aten::softmax", 2e5)]
    root = Event(
        "forward", 1e6, 0.0, [Event("aten::scaled_dot_product_attention", 3e5, 0, inner), Event("aten::bmm", 4e5)]
    )
    found = operators([root], on_device=False)
    assert found.kinds["attention"] == pytest.approx(1.1)
    assert found.kinds["matrix products"] == pytest.approx(0.4)
    assert found.kinds[HOST] == pytest.approx(1.0)
    assert [(row["name"], row["kind"]) for row in found.top(1, count=2)] == [
        ("aten::bmm", "attention"),
        ("aten::bmm", "matrix products"),
    ]
    assert operators([root], on_device=True).kinds["attention"] == pytest.approx(0.7)


def test_a_moment_belongs_to_the_innermost_part() -> None:
    clock = Clock(torch.device("cpu"))
    start = time.perf_counter()
    with clock.part(OTHER):
        with clock.part(FORWARD):
            time.sleep(0.03)
        with clock.part(BACKWARD), clock.part("gradient reduction"):
            time.sleep(0.02)
    whole = time.perf_counter() - start
    time.sleep(0.02)
    with clock.part(OTHER):
        pass
    seconds = clock.seconds()
    assert seconds[FORWARD] >= 0.03
    assert seconds["gradient reduction"] >= 0.02
    assert seconds[BACKWARD] < 0.01
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.005)


def test_wrapped_methods_come_back_after_an_error() -> None:
    class Owner:
        def twice(self, value: int) -> int:
            return 2 * value

    owner, module, opened = Owner(), SimpleNamespace(thrice=lambda value: 3 * value), []
    own = module.thrice

    def around(name: str) -> Any:
        opened.append(name)
        return torch.profiler.record_function(name)

    def fail() -> None:
        with wrapped([(owner, "twice"), (module, "thrice")], around):
            assert owner.twice(2) + module.thrice(value=1) == 7
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert opened == ["twice", "thrice"]
    assert vars(owner) == {}
    assert module.thrice is own


def test_ranks_are_brought_together() -> None:
    def record(seconds: float, flops: float, peak: float | None) -> RankRecord:
        parts = dict.fromkeys(PARTS, 0.0) | {FORWARD: seconds, BACKWARD: 3 * seconds}
        gemm = None if peak is None else GemmPeak(peak, "mm", (1, 2, 3), "fp32", "cpu", 2, 6)
        return RankRecord(parts, Operators(), flops, 100, gemm, "trace")

    summary = summarise([record(1.0, 8e9, 2e9), record(1.0, 16e9, 4e9)], 3, 2, "cpu")
    assert summary.step_seconds == pytest.approx(2.0)
    assert summary.flops_per_second == pytest.approx(6e9)
    assert summary.mfu == pytest.approx(1.0)
    assert summary.tokens_per_second == pytest.approx(50)
    assert "100.0 % of the measured GEMM peak (MFU), 6 GFLOP/s of 2 ranks at once" in summary.lines()[-1]
    unknown = summarise([record(1.0, 8e9, None)], 3, 2, "cuda")
    assert unknown.mfu is None
    assert unknown.lines()[-1].endswith("MFU unknown, for no memory was left to measure matrix products")
    assert math.isclose(unknown.step_seconds, 2.0)


def test_a_large_trace_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / "rank0.pt.trace.json"
    path.write_text('{"traceEvents": []}')
    small = compress(path)
    assert small.name == "rank0.pt.trace.json.gz"
    assert not path.exists()
    with gzip.open(small, "rt") as file:
        assert json.load(file) == {"traceEvents": []}
