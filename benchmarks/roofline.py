"""The roofline of a pre-training step on A100, H100 and H200, on paper: computed, not measured. No GPU is used.

    python -m benchmarks.roofline                          base and large, 128 and 512 tokens
    python -m benchmarks.roofline --sizes large --gpus a100 --fill 0.8

Each kernel takes the longer of its FLOPs at the card's peak and its bytes at the card's memory bandwidth (Williams et
al. 2009); peaks and bandwidths are those of NVIDIA's data sheets (launch/forecast/gpus.py), the counts those of
launch/forecast/kernels. A step takes at least the sum of its kernels, and at least as long as its launches take the
host (`--launch-us`, an assumption). So times are lower bounds and throughputs upper bounds that no run reaches: matrix
products stay below the peak, and passes below the bandwidth. `% of peak` counts the FLOPs that the tokens need;
`forecast %` is that share at the rates that are assumed to be attainable (launch/forecast/kernels/bound.py), on which
`zerobert plan` stands, and the last table holds these against what others measured.

plain torch computes logits of all tokens with an fp32 softmax, computes padding, makes each element-wise operation a
pass, and clips and casts in passes of the optimizer's step; ours is what this repository runs on GPUs; the third
variant would also multiply queries, keys and values at once, and launch graphs instead of kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import emit
from engine.config import ModelConfig
from launch.forecast.activations import layer_bytes
from launch.forecast.hardware import GPUS, Hardware, described_hardware
from launch.forecast.kernels.bound import (
    ATTAINABLE_BANDWIDTH,
    ATTAINABLE_FLOPS,
    LAUNCH_SECONDS,
    Bound,
    attainable,
    bound,
)
from launch.forecast.kernels.counting import OURS, PARTS, Step, Variant
from launch.forecast.kernels.layer import layer_backward, layer_forward
from launch.forecast.kernels.step import kernels, passes
from launch.forecast.step_time import communicated, exposed, transfer_seconds
from launch.forecast.workload import Workload, shape_of

VOCABULARY = 30522
COMPUTED = "computed, not measured"
#: of micro-batches; the last is the least that train.micro_batch takes on a GPU where nothing else is said
TOKENS = (1024, 4096, 16384)
PLAIN = Variant("plain torch", packed=False, read_rows=False, fused=False)
#: not written
JOINT = Variant("ours, QKV at once, graphs", joint=True)
VARIANTS = (PLAIN, OURS, JOINT)
#: with scores in fp16, and masked rows alone in the head; apex has LayerNorm and LAMB, the rest are torch's passes
NVIDIA = Variant("NVIDIA's", packed=False, fused=False, score_bytes=2)
#: likewise, with DeepSpeed's Transformer kernel
DEEPSPEED = Variant("DeepSpeed's", packed=False, score_bytes=2)


@dataclass(frozen=True)
class Published:
    """What others measured of BERT-large on one GPU, LAMB, fp16."""

    gpu: str
    length: int
    micro_batch: int
    """assumed"""
    sequences: float
    """a second"""
    variant: Variant
    source: str
    full: bool = True
    """whether all sequences had that length"""


#: MLPerf's figures are left out: the mean length of its unpadded sequences isn't published with them
PUBLISHED = (
    Published("a100", 128, 64, 580.0, NVIDIA, "NVIDIA DeepLearningExamples, phase 1, one A100-80"),
    Published("a100", 512, 16, 210.0, NVIDIA, "the same, phase 2, binned by length", full=False),
    Published("v100", 128, 64, 272.0, DEEPSPEED, "DeepSpeed bing_bert, one V100-32"),
    Published("v100", 512, 16, 52.0, DEEPSPEED, "DeepSpeed bing_bert, one V100-32"),
)


def step_bound(step: Step, variant: Variant, card: Hardware, launch_us: float) -> Bound:
    """Of an optimizer step without communication."""
    return bound(kernels(step, variant), card, 0.0 if variant.joint else launch_us / 1e6)


def parts_table(step: Step, variant: Variant, card: Hardware) -> dict[str, dict[str, float | str]]:
    """Each part of a step, forward and backward together, and the sum; on the device alone."""
    found = kernels(step, variant)
    total = bound(found, card, 0.0)
    rows = {part: bound((kernel for kernel in found if kernel.part == part), card, 0.0) for part in PARTS}
    return {
        name: {
            "GFLOP": one.flops / 1e9,
            "GB": one.bytes / 1e9,
            "FLOP/byte": one.intensity,
            "launches": one.launches,
            "ms": one.device_seconds * 1e3,
            "bound": one.limit,
            "% of step": 100 * one.device_seconds / total.device_seconds,
        }
        for name, one in (rows | {"step": total}).items()
    }


def variants_table(steps: Iterable[Step], card: Hardware, launch_us: float) -> dict[str, dict[str, float | str]]:
    """Each variant with each micro-batch: its bound, and the share of the peak at the rates that are attainable."""
    table: dict[str, dict[str, float | str]] = {}
    for step in steps:
        plain = step_bound(step, PLAIN, card, launch_us).seconds
        for variant in VARIANTS:
            least = step_bound(step, variant, card, launch_us)
            forecast = step_bound(step, variant, attainable(card), launch_us)
            table[f"{variant.name}, micro-batch {step.work.micro_batch}"] = {
                "TFLOP": least.flops / 1e12,
                "GB": least.bytes / 1e9,
                "FLOP/byte": least.intensity,
                "launches": least.launches,
                "ms": least.seconds * 1e3,
                "bound": least.limit,
                "% of peak": 100 * step.needed_flops() / least.seconds / card.peak_flops,
                "forecast %": 100 * step.needed_flops() / forecast.seconds / card.peak_flops,
                "forecast's bound": forecast.limit,
                "sequences/s": step.work.micro_batch * step.accumulation / least.seconds,
                "x plain torch": plain / least.seconds,
            }
    return table


def layer_table(step: Step) -> dict[str, dict[str, float | str]]:
    """Launches of one layer, and bytes a token that it moves, against the least that what it keeps allows.

    The least is that each activation which the backward pass needs is written once, read once in either pass, and so is
    its gradient in the backward pass; nothing else, and no weight.
    """
    tokens = step.tokens(OURS)
    kept = layer_bytes(replace(step.work, dropout=0.0)) / step.work.tokens
    least = 5 * kept
    table: dict[str, dict[str, float | str]] = {}
    for variant in VARIANTS:
        ahead, back = (found(step, step.tokens(variant), variant) for found in (layer_forward, layer_backward))
        moved = [sum(kernel.bytes for kernel in found) / tokens for found in (ahead, back)]
        table[variant.name] = {
            "x the least": sum(moved) / least,
            "kB a token forward": moved[0] / 1e3,
            "kB a token backward": moved[1] / 1e3,
            "launches forward": sum(kernel.launches for kernel in ahead),
            "launches backward": sum(kernel.launches for kernel in back),
        }
    table["the least"] = {
        "x the least": 1.0,
        "kB a token forward": 2 * kept / 1e3,
        "kB a token backward": 3 * kept / 1e3,
    }
    return table


def stages_table(step: Step, gpu: str, ranks: int, launch_us: float) -> dict[str, dict[str, float | str]]:
    """ZeRO stages 0 to 3 of our variant: what travels, how long, and what of it nothing hides."""
    card = described_hardware(gpu, ranks, 8, None)
    table: dict[str, dict[str, float | str]] = {}
    for stage in range(4):
        work = replace(step.work, stage=stage, ranks=ranks, ranks_per_node=card.ranks_per_node)
        own = replace(step, work=work)
        sent = sum(communicated(work, own.accumulation))
        late = exposed(work, own.accumulation, bound(passes(own), card).device_seconds, card)
        seconds = step_bound(own, OURS, card, launch_us).seconds + late
        table[f"stage {stage}"] = {
            "GB sent": sent / 1e9,
            "ms NVLink": 1e3 * sent / card.link_bandwidth,
            "ms slowest link": 1e3 * transfer_seconds(sent, card),
            "ms exposed": 1e3 * late,
            "ms step": 1e3 * seconds,
            "% of peak": 100 * own.needed_flops() / seconds / card.peak_flops,
        }
    return table


def step_of(size: str, length: int, micro_batch: int, fill: float = 1.0, optimizer: str = "adamw") -> Step:
    """A step of one of our models, of one micro-batch on one card."""
    shape = shape_of(ModelConfig(size=size), VOCABULARY)
    return Step(Workload(shape, length, micro_batch, 2, 1, 1, "bf16", optimizer=optimizer), fill=fill)


def published_table(launch_us: float) -> dict[str, dict[str, float | str]]:
    """What others measured against the forecast of their kernels at the rates that are attainable, and ours with it.

    8 micro-batches a step, or the optimizer would count too much.
    """
    table: dict[str, dict[str, float | str]] = {}
    for known in PUBLISHED:
        ours = replace(step_of("large", known.length, known.micro_batch, optimizer="lamb"), accumulation=8)
        theirs = replace(ours, work=replace(ours.work, attention="plain"))
        card, sequences = described_hardware(known.gpu, 1, 1, None), 8 * known.micro_batch
        forecast = sequences / step_bound(theirs, known.variant, attainable(card), launch_us).seconds
        table[f"large, {known.length} tokens, {known.gpu}"] = {
            "measured by others": known.sequences,
            "forecast of theirs": forecast,
            "error %": 100 * (forecast / known.sequences - 1) if known.full else "none: shorter sequences",
            "bound of theirs": sequences / step_bound(theirs, known.variant, card, launch_us).seconds,
            "forecast of ours": sequences / step_bound(ours, OURS, attainable(card), launch_us).seconds,
            "source": known.source,
        }
    return table


def rows_of(size: str, gpu: str, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts of the largest micro-batch, and all variants."""
    card = described_hardware(gpu, 1, 1, None)
    batches = args.micro_batches or [tokens // length for tokens in TOKENS]
    steps = [step_of(size, length, batch, args.fill, args.optimizer) for batch in batches]
    where = f"{size}, {length} tokens, {gpu}, bf16, {args.optimizer}"
    if args.fill < 1:
        where += f", {args.fill:.0%} of the grid are tokens"
    roof = {"peak_flops": card.peak_flops, "memory_bandwidth": card.memory_bandwidth}
    parts = {"title": f"{where}, micro-batch {batches[-1]}: parts of ours; {COMPUTED}", "roofline": roof}
    return [
        {**parts, "rivals": parts_table(steps[-1], OURS, card)},
        {"title": f"{where}: a step; {COMPUTED}", "rivals": variants_table(steps, card, args.launch_us)},
    ]


def layer_rows(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A layer of a model at each length."""
    return [
        {
            "title": f"a layer of {size}, {length} tokens, {TOKENS[-1]} in a micro-batch, bf16; {COMPUTED}",
            "rivals": layer_table(step_of(size, length, TOKENS[-1] // length, args.fill)),
        }
        for length in args.lengths
    ]


def zero_rows(size: str, gpu: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """ZeRO stages on one node of 8 and on two."""
    step = step_of(size, 128, 32, args.fill, args.optimizer)
    where = f"{size}, 128 tokens, micro-batch 32 a rank, {gpu}, 8 GPUs a node"
    return [
        {
            "title": f"ZeRO, {where}, {ranks} ranks: gradient reduction and gathering; {COMPUTED}",
            "rivals": stages_table(step, gpu, ranks, args.launch_us),
        }
        for ranks in (8, 16)
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["base", "large"], choices=["base", "large"])
    parser.add_argument("--gpus", nargs="+", default=["a100", "h100", "h200"], choices=list(GPUS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], choices=[128, 256, 512], metavar="TOKENS")
    parser.add_argument("--micro-batches", type=int, nargs="+", help="sequences; default: by length")
    parser.add_argument("--fill", type=float, default=1.0, help="share of padded batches that tokens fill (default 1)")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "lamb"])
    assumed = LAUNCH_SECONDS * 1e6
    parser.add_argument(
        "--launch-us", type=float, default=assumed, help=f"microseconds of the host a kernel, assumed ({assumed:g})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    args = parser.parse_args(arguments)
    if not 0 < args.fill <= 1:
        parser.error(f"--fill: {args.fill} is not a share in (0, 1]")
    if args.launch_us < 0:
        parser.error(f"--launch-us: {args.launch_us} is negative")
    if args.micro_batches and min(args.micro_batches) < 1:
        parser.error(f"--micro-batches: {min(args.micro_batches)} is not at least 1")
    return args


def main() -> None:
    args = parse()
    rows = []
    for size in args.sizes:
        rows += layer_rows(size, args)
        for gpu in args.gpus:
            rows += [row for length in args.lengths for row in rows_of(size, gpu, length, args)]
            rows += zero_rows(size, gpu, args)
    rates = f"{ATTAINABLE_FLOPS:.0%} of the peak, {ATTAINABLE_BANDWIDTH:.0%} of the bandwidth"
    title = f"sequences/s a GPU, measured by others, against the forecast at {rates}; it is {COMPUTED}"
    rows.append({"title": title, "rivals": published_table(args.launch_us)})
    emit(rows, args.json)


if __name__ == "__main__":
    main()
