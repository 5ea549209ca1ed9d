"""The memory forecast: exact counts, the published formulas, its shape as a function, and real allocations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory_forecast import CASES, Case, compare
from engine.config import MODEL_SIZES, ModelConfig, RegulariseConfig, Shape, architecture_of
from engine.errors import UserError
from engine.model.bert import BertForMaskedLM, BertForPreTraining
from engine.model.build import build_config
from engine.model.heads import BertForSequenceClassification
from engine.train.certificate.exact import chunk_on
from launch.forecast.activations import embedding_bytes, layer_bytes, passes
from launch.forecast.memory import DEVICE_CHUNK, Workload, forecast, largest_micro_batch, shape_of

BASE = Shape(768, 12, 12, 3072, 30522)
WORK = Workload(BASE, 128, 8, 2, 8, 8, "bf16")
GIB = 1 << 30

workloads = st.builds(
    Workload,
    shape=st.builds(
        lambda size, vocabulary: shape_of(ModelConfig(size), vocabulary),
        st.sampled_from(list(MODEL_SIZES["bert"])),
        st.sampled_from([1000, 30522, 120_000]),
    ),
    sequence_length=st.sampled_from([8, 128, 512]),
    micro_batch=st.integers(1, 256),
    stage=st.sampled_from([0, 1, 2, 3]),
    ranks=st.sampled_from([1, 2, 8, 64]),
    ranks_per_node=st.just(8),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    optimizer=st.sampled_from(["adamw", "lamb"]),
    activation_checkpointing=st.booleans(),
    attention=st.sampled_from(["flash", "plain"]),
    accelerator=st.sampled_from(["cuda", "cpu"]),
    dropout=st.sampled_from([0.0, 0.1]),
    kernels=st.booleans(),
    accumulates=st.booleans(),
    verify_update=st.sampled_from([0, 1]),
)


@pytest.mark.parametrize("size", list(MODEL_SIZES["bert"]))
@pytest.mark.parametrize("vocabulary", [101, 30522])
def test_the_parameters_are_those_of_the_real_model(size: str, vocabulary: int) -> None:
    config = ModelConfig(size)
    with torch.device("meta"):
        model = BertForPreTraining(build_config(config, vocabulary))
        # the constructor ties tensors: named_parameters tells each of them once
    shape = shape_of(config, vocabulary)
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    assert shape.layer_parameters() == sum(p.numel() for p in model.bert.encoder.layer[0].parameters())


def test_other_dimensions_and_positions_count_too() -> None:
    config = ModelConfig("tiny", hidden_size=96, layers=3, heads=3, intermediate_size=100, max_positions=77)
    with torch.device("meta"):
        model = BertForPreTraining(build_config(config, 50))
    assert shape_of(config, 50).parameters() == sum(p.numel() for p in model.parameters())


def test_a_classifier_has_no_decoder() -> None:
    """Neither its parameters, nor its logits, nor its gradient beside that of the word embeddings."""
    config = ModelConfig("mini")
    with torch.device("meta"):
        model = BertForSequenceClassification(build_config(config, 30522, labels=("a", "b", "c")))
    classifier = architecture_of(model.config).shape_of(model.config)
    shape = replace(classifier, decoder=False)
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    tuned, trained = (replace(WORK, shape=s, read_share=r) for s, r in ((shape, 0.0), (classifier, 0.15)))
    assert forecast(tuned).head < forecast(trained).head / 1000
    assert passes(trained).end - passes(tuned).end == 2 * 30522 * shape.hidden
    assert forecast(trained).startup - forecast(tuned).startup > 4 * 30522 * shape.hidden


def test_mlm_alone_has_neither_pooler_nor_classifier() -> None:
    config = ModelConfig("mini")
    with torch.device("meta"):
        model = BertForMaskedLM(build_config(config, 30522))
    both = shape_of(config, 30522)
    shape = replace(both, pooler=False)
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    alone, paired = (forecast(replace(WORK, shape=s)) for s in (shape, both))
    assert alone.parameters < paired.parameters
    assert alone.activations < paired.activations


def test_the_forecast_needs_no_torch() -> None:
    program = (
        "import sys; from engine.config import Shape; from launch.forecast.memory import Workload, forecast;"
        "forecast(Workload(Shape(768, 12, 12, 3072, 30522), 128, 8, 2, 8, 8, 'bf16'));"
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_kept_weights_take_four_bytes_of_a_rank_s_share(stage: int, offload: str) -> None:
    """The weights of the start, and their moving average, lie where the optimizer steps."""
    if stage == 0 and offload == "cpu":
        return
    copies = RegulariseConfig(start_decay=1.0, ema=0.9).weight_copies
    work = replace(WORK, stage=stage, offload_optimizer=offload, precision="bf16")
    plain, more = (forecast(replace(work, copies=count)) for count in (0, copies))
    share = BASE.parameters() if stage == 0 else work.share
    grown = [more.optimizer - plain.optimizer, more.host - plain.host]
    assert grown == ([8 * share, 0] if offload == "none" else [0, 8 * share])


@pytest.mark.parametrize(
    ("stage", "whole", "shared"),
    [(0, 2 + 2 + 12, 0), (1, 2 + 2, 12), (2, 2, 2 + 12), (3, 0, 2 + 2 + 12)],
)
def test_fp16_states_are_those_of_the_zero_paper(stage: int, whole: int, shared: int) -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + K bytes a parameter, K = 12, of which stages share parts."""
    count, ranks = BASE.parameters(), 64
    states = forecast(replace(WORK, precision="fp16", stage=stage, ranks=ranks)).model_states
    assert states == pytest.approx(whole * count + shared * count / ranks, abs=16 * ranks)


def test_bf16_gradients_are_accumulated_in_fp32() -> None:
    count = BASE.parameters()
    gradients = {stage: forecast(replace(WORK, stage=stage, ranks=1)).gradients for stage in range(4)}
    assert gradients == {0: 2 * count, 1: 6 * count, 2: 4 * count, 3: 4 * count}


def test_a_layer_in_half_precision_keeps_34_bytes_a_token_and_unit() -> None:
    """Korthikanti et al. 2022, equation 2, without the scores; LayerNorm's and attention's statistics are apart."""
    tokens, hidden, heads = WORK.tokens, BASE.hidden, BASE.heads
    statistics = tokens * (2 * 2 * 4 + 4 * heads)
    assert layer_bytes(replace(WORK, kernels=False)) == 34 * tokens * hidden + statistics


def test_our_kernels_keep_no_masks_of_layer_normalisation() -> None:
    """One byte an element, on CPUs a number; with plain attention that of its probabilities stays."""
    for attention in ("flash", "plain"):
        work = replace(WORK, attention=attention)
        plain = replace(work, kernels=False)
        assert layer_bytes(plain) - layer_bytes(work) == 2 * WORK.tokens * BASE.hidden
        assert embedding_bytes(plain) - embedding_bytes(work) == WORK.tokens * BASE.hidden
        undropped = [replace(each, dropout=0.0) for each in (work, plain)]
        assert layer_bytes(undropped[0]) == layer_bytes(undropped[1])
    on_cpu = [layer_bytes(replace(WORK, accelerator="cpu", kernels=kernels)) for kernels in (True, False)]
    assert on_cpu[0] == on_cpu[1] - 2 * 2 * WORK.tokens * BASE.hidden == layer_bytes(WORK)


def test_our_kernels_keep_no_activation_of_geglu_but_on_gpus_in_fp32() -> None:
    """ModernBERT's feed-forward network keeps both branches and the product; torch's GELU its result too."""
    gated = shape_of(ModelConfig(architecture="modernbert"), 30522)
    work = replace(WORK, shape=gated, dropout=0.0)
    for precision, saved in (("bf16", 2), ("fp16", 2), ("fp32", 0)):
        ours = replace(work, precision=precision)
        theirs = replace(ours, kernels=False)
        assert layer_bytes(theirs) - layer_bytes(ours) == saved * WORK.tokens * gated.intermediate
    for precision, width in (("bf16", 2), ("fp32", 4)):
        ours = replace(work, precision=precision, accelerator="cpu")
        theirs = replace(ours, kernels=False)
        assert layer_bytes(theirs) - layer_bytes(ours) == width * WORK.tokens * gated.intermediate


def test_plain_attention_grows_with_the_square_of_the_length() -> None:
    short, long = replace(WORK, sequence_length=256), replace(WORK, sequence_length=512)
    scores = [layer_bytes(replace(one, attention="plain")) - layer_bytes(one) for one in (short, long)]
    assert scores[1] > 3 * scores[0]


def test_checkpointing_keeps_one_hidden_state_a_layer() -> None:
    many, few = replace(WORK, micro_batch=64), replace(WORK, micro_batch=64, activation_checkpointing=True)
    hidden = 2 * many.tokens * BASE.hidden
    embeddings = passes(few).kept - (BASE.layers - 1) * hidden
    assert hidden < embeddings < 4 * hidden
    assert passes(few).peak < passes(many).peak / 3


def test_the_kinds_are_the_total() -> None:
    guess = forecast(WORK)
    assert list(guess.kinds()) == [
        "parameters", "master", "gradients", "optimizer", "activations", "head", "buckets", "margin",
    ]  # fmt: skip
    assert guess.total == sum(guess.kinds().values())
    assert guess.model_states == guess.parameters + guess.master + guess.gradients + guess.optimizer
    assert guess.margin > 0
    assert forecast(replace(WORK, accelerator="cpu")).margin == 0


@given(workloads)
def test_no_part_is_negative(work: Workload) -> None:
    guess = forecast(work)
    assert min(*guess.kinds().values(), guess.host, guess.nvme, guess.startup) >= 0


@given(workloads)
def test_more_ranks_never_take_more_bytes_each(work: Workload) -> None:
    """From two on: one rank alone neither reduces nor gathers."""
    few, many = (forecast(replace(work, ranks=ranks)) for ranks in (2 * work.ranks, 4 * work.ranks))
    assert many.total <= few.total
    assert many.model_states <= few.model_states


@given(workloads)
def test_a_larger_micro_batch_never_takes_less(work: Workload) -> None:
    assert forecast(replace(work, micro_batch=work.micro_batch + 1)).total >= forecast(work).total


@given(workloads)
def test_higher_stages_never_keep_more_states(work: Workload) -> None:
    """In fp16: bf16 accumulates in fp32 from stage 1 on, and fp32 has no master weights at stage 0."""
    work = replace(work, ranks=2 * work.ranks, precision="fp16")
    states = [forecast(replace(work, stage=stage)).model_states for stage in range(4)]
    assert states == sorted(states, reverse=True)


@given(workloads, st.integers(1, 80), st.integers(1, 512))
def test_the_largest_micro_batch_is_the_boundary(work: Workload, gibibytes: int, limit: int) -> None:
    memory = gibibytes * GIB
    found = largest_micro_batch(work, memory, limit=limit)

    def fits(micro_batch: int) -> bool:
        guess = forecast(replace(work, micro_batch=micro_batch))
        return max(guess.total, guess.startup if work.accelerator == "cpu" else 0) <= memory

    assert found is None or (1 <= found <= limit and fits(found))
    assert found == limit or not fits((found or 0) + 1)


def test_no_micro_batch_fits_into_nothing() -> None:
    assert largest_micro_batch(WORK, GIB // 2, limit=64) is None
    assert largest_micro_batch(WORK, 80 * GIB, limit=0) is None
    assert largest_micro_batch(WORK, 80 * GIB, limit=1) == 1


@pytest.mark.parametrize(("stage", "place"), [(1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_offload_moves_states_off_the_device(stage: int, place: str) -> None:
    here = forecast(replace(WORK, stage=stage))
    away = forecast(replace(WORK, stage=stage, offload_optimizer=place))
    assert (away.master, away.optimizer) == (0, 0)
    assert away.total < here.total
    if place == "cpu":
        assert away.host >= 12 * WORK.share
        assert away.nvme == 0
    else:
        assert away.nvme == 16 * WORK.share


def test_offloaded_parameters_lie_on_the_host() -> None:
    work = replace(WORK, stage=3, offload_optimizer="cpu")
    away = forecast(replace(work, offload_parameters="cpu"))
    assert away.parameters == 0
    assert away.host == forecast(work).host + 2 * WORK.share


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 1024}, "data.sequence_length: 1024 is not allowed; it exceeds model.max_positions (512)"),
        ({"stage": 2, "offload_parameters": "cpu"}, "zero.offload_parameters"),
        ({"stage": 2, "offload_optimizer": "nvme"}, "zero.offload_optimizer"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "zero.offload_optimizer"),
    ],
)
def test_what_a_user_can_get_wrong_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(WORK, **values)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_folder_of_weights_has_no_shape_here() -> None:
    with pytest.raises(UserError, match=r"model\.init_from"):
        shape_of(ModelConfig(init_from="runs/a/export"), 30522)


@pytest.mark.parametrize(
    "values", [{"micro_batch": 0}, {"ranks": 0}, {"stage": 4}, {"precision": "fp8"}, {"attention": "sparse"}]
)
def test_impossible_numbers_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        replace(WORK, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_deepspeed_estimates_the_same_for_stage_2_by_its_assumptions(ranks: int) -> None:
    """Its 18 bytes of a part are ours and what it counts beside them: gradients in 16 bits as well as in 32.

    In bf16 ours are in fp32 only (the 16 bits are the bucket's); in fp16 the fp32 ones exist in the step alone, so we
    count them in the step's phase.
    """
    count, nodes = BASE.parameters(), -(-ranks // 8)
    _, device = estimate_zero2_model_states_mem_needs(count, ranks // nodes, nodes, cpu_offload=False)
    work = replace(WORK, ranks=ranks)
    assert device == pytest.approx(forecast(work).model_states + 2 * work.share, abs=18)
    half = replace(work, precision="fp16")
    assert device == pytest.approx(forecast(half).model_states + 4 * work.share, abs=18)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_deepspeed_estimates_the_same_for_stage_3_beside_a_gathered_layer(ranks: int) -> None:
    """Its 18 bytes are ours: 2 of weights, 4 of gradients, 12 of the optimizer. It adds weights and gradients of the
    largest layer, 4 bytes each; we count what our settings gather, in the buckets."""
    count, nodes, largest = BASE.parameters(), -(-ranks // 8), BASE.largest_parameter()
    _, device, layer = estimate_zero3_model_states_mem_needs(
        count, largest, ranks // nodes, nodes, cpu_offload=False, cpu_offload_params=False
    )
    assert layer == 4 * largest
    assert device - layer == pytest.approx(forecast(replace(WORK, stage=3, ranks=ranks)).model_states, abs=18)


def check(case: Case) -> None:
    row = compare(case)
    assert abs(row["states error %"]) <= 10.0, row
    assert abs(row["total error %"]) <= 20.0, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("small", 8192, 2, "fp32", 2, 4),
        Case("mini", 8192, 0, "fp32", 1, 4, 512, architecture="modernbert", dropout=0.0),
    ],
    ids=lambda case: case.name,
)
def test_real_ranks_allocate_what_was_forecast(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_of_the_benchmark_allocates_what_was_forecast(case: Case) -> None:
    check(case)


def test_the_forecasts_chunk_is_the_certificates() -> None:
    assert chunk_on(torch.device("cuda")) == DEVICE_CHUNK
