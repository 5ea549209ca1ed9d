"""The roofline of a pre-training step on A100 and H100, on paper: computed, not measured. No GPU is needed or used.

    python -m benchmarks.roofline                          base and large, 128 and 512 tokens
    python -m benchmarks.roofline --sizes large --gpus a100 --fill 0.8

Each kernel takes the longer of its FLOPs at the card's peak and its bytes at the card's memory bandwidth (Williams et
al. 2009); peaks and bandwidths are those of NVIDIA's data sheets (launch/forecast/hardware.py), the counts those of
benchmarks/step_kernels.py. A step takes at least the sum of its kernels, and at least as long as its launches take the
host (`--launch-us`, an assumption). So times are lower bounds and throughputs upper bounds that no run reaches: matrix
products stay below the peak, and passes below the bandwidth. `% of peak` counts the FLOPs that the tokens need.

plain torch computes logits of all tokens with an fp32 softmax, computes padding, makes each element-wise operation a
pass, and clips and casts in passes of the optimizer's step; ours is what this repository runs on GPUs; the third
variant would also fuse dropout, residual sum and LayerNorm there, as the CPU kernels do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import emit
from benchmarks.step_kernels import OURS, PARTS, PLAIN, VARIANTS, Kernel, Step, Variant, backward, forward, kernels
from engine.config import ModelConfig
from launch.forecast.hardware import GPUS, Hardware, described_hardware
from launch.forecast.step_time import communicated, exposed, transfer_seconds
from launch.forecast.workload import Workload, shape_of

VOCABULARY = 30522
#: of the host a kernel, in torch's eager mode: an assumption
LAUNCH_US = 5.0
COMPUTED = "computed, not measured"
MICRO_BATCHES = {128: (8, 32, 128), 512: (2, 8, 32)}
#: size, card, length, micro-batch (assumed), sequences/s a GPU that others measured, source, whether all sequences had
#: that length. MLPerf's figures are left out: the mean length of its unpadded sequences isn't published with them
PUBLISHED = (
    ("large", "a100", 128, 64, 580.0, "NVIDIA DeepLearningExamples, phase 1, one A100-80", True),
    ("large", "a100", 512, 16, 210.0, "NVIDIA DeepLearningExamples, phase 2, one A100-80, binned by length", False),
    ("large", "v100", 128, 64, 272.0, "DeepSpeed bing_bert, one V100-32, fp16", True),
    ("large", "v100", 512, 16, 52.0, "DeepSpeed bing_bert, one V100-32, fp16", True),
)


@dataclass(frozen=True)
class Bound:
    """Kernels on a card."""

    flops: float
    bytes: float
    launches: float
    compute_seconds: float
    memory_seconds: float
    device_seconds: float
    """sum of the longer of both, a kernel"""

    @property
    def limit(self) -> str:
        """What takes longer in all: products at the peak, or moving bytes in kernels that are bound by it."""
        return "compute" if 2 * self.compute_seconds >= self.device_seconds else "memory"

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0


def bound(found: Iterable[Kernel], card: Hardware) -> Bound:
    """Sums over kernels."""
    flops = moved = launches = compute = memory = device = 0.0
    for kernel in found:
        at_peak, at_bandwidth = kernel.flops / card.peak_flops, kernel.bytes / card.memory_bandwidth
        flops, moved, launches = flops + kernel.flops, moved + kernel.bytes, launches + kernel.launches
        compute += at_peak if at_peak >= at_bandwidth else 0.0
        memory += at_bandwidth if at_bandwidth > at_peak else 0.0
        device += max(at_peak, at_bandwidth)
    return Bound(flops, moved, launches, compute, memory, device)


def step_seconds(step: Step, variant: Variant, card: Hardware, launch_us: float) -> float:
    """The longer of device and host, without communication."""
    whole = bound(kernels(step, variant), card)
    return max(whole.device_seconds, whole.launches * launch_us / 1e6)


def parts_table(step: Step, variant: Variant, card: Hardware) -> dict[str, dict[str, float | str]]:
    """Each part of a step, forward and backward together, and the sum."""
    found = kernels(step, variant)
    total = bound(found, card)
    rows = {part: bound((kernel for kernel in found if kernel.part == part), card) for part in PARTS}
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
    """Each variant with each micro-batch."""
    table: dict[str, dict[str, float | str]] = {}
    for step in steps:
        plain = step_seconds(step, PLAIN, card, launch_us)
        for variant in VARIANTS:
            whole, seconds = bound(kernels(step, variant), card), step_seconds(step, variant, card, launch_us)
            by_host = seconds > whole.device_seconds
            table[f"{variant.name}, micro-batch {step.micro_batch}"] = {
                "TFLOP": whole.flops / 1e12,
                "GB": whole.bytes / 1e9,
                "FLOP/byte": whole.intensity,
                "launches": whole.launches,
                "ms": seconds * 1e3,
                "bound": "launches" if by_host else whole.limit,
                "% of peak": 100 * step.needed_flops() / seconds / card.peak_flops,
                "sequences/s": step.micro_batch * step.accumulation / seconds,
                "x plain torch": plain / seconds,
            }
    return table


def stages_table(step: Step, gpu: str, ranks: int, launch_us: float) -> dict[str, dict[str, float | str]]:
    """ZeRO stages 0 to 3 of our variant: what travels, how long, and what of it nothing hides."""
    card = described_hardware(gpu, ranks, 8, None)
    table: dict[str, dict[str, float | str]] = {}
    for stage in range(4):
        own = replace(step, stage=stage, ranks=ranks)
        work = Workload(step.shape, step.length, step.micro_batch, stage, ranks, card.ranks_per_node, "bf16")
        passes = bound([*forward(own, OURS), *backward(own, OURS)] * own.accumulation, card).device_seconds
        sent = sum(communicated(work, own.accumulation))
        late = exposed(work, own.accumulation, passes, card)
        seconds = step_seconds(own, OURS, card, launch_us) + late
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
    return Step(shape, length, micro_batch, fill=fill, optimizer=optimizer)


def published_table(launch_us: float) -> dict[str, dict[str, float | str]]:
    """What others measured as a share of the bound; 8 micro-batches a step, or the optimizer would count too much."""
    table: dict[str, dict[str, float | str]] = {}
    for size, gpu, length, micro_batch, measured, source, full in PUBLISHED:
        step, card = replace(step_of(size, length, micro_batch), accumulation=8), described_hardware(gpu, 1, 1, None)
        sequences = step.micro_batch * step.accumulation
        ours, plain = (sequences / step_seconds(step, variant, card, launch_us) for variant in (OURS, PLAIN))
        share = 100 * measured / ours
        table[f"{size}, {length} tokens, {gpu}"] = {
            "measured by others": measured,
            "bound of ours": ours,
            "% of it": share if full else f"below {share:.0f}: shorter sequences",
            "bound of plain torch": plain,
            "source": source,
        }
    return table


def rows_of(size: str, gpu: str, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts of the largest micro-batch, and all variants."""
    card = described_hardware(gpu, 1, 1, None)
    batches = args.micro_batches or MICRO_BATCHES.get(length, (8,))
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
    parser.add_argument("--gpus", nargs="+", default=["a100", "h100"], choices=list(GPUS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], choices=[128, 256, 512], metavar="TOKENS")
    parser.add_argument("--micro-batches", type=int, nargs="+", help="sequences; default: by length")
    parser.add_argument("--fill", type=float, default=1.0, help="share of padded batches that tokens fill (default 1)")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "lamb"])
    parser.add_argument(
        "--launch-us", type=float, default=LAUNCH_US, help=f"microseconds of the host a kernel, assumed ({LAUNCH_US:g})"
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
        for gpu in args.gpus:
            rows += [row for length in args.lengths for row in rows_of(size, gpu, length, args)]
            rows += zero_rows(size, gpu, args)
    title = f"sequences/s a GPU, measured by others, against the bound; the bound is {COMPUTED}"
    rows.append({"title": title, "rivals": published_table(args.launch_us)})
    emit(rows, args.json)


if __name__ == "__main__":
    main()
