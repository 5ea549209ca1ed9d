"""`zerobert plan`: which ZeRO stage and micro-batch fit these GPUs, what a step costs, and why this choice.

Nothing is run: memory, communication and time are computed (`launch.memory`, `launch.step_time`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import MODEL_SIZES, ModelConfig, RunConfig, TrainConfig
from engine.errors import UserError
from launch.cli import CommandParser
from launch.hardware import GPUS, Hardware, described_hardware, parse_bytes, this_machine
from launch.plan_view import plot, render
from launch.planner import Request, as_json, candidates, choose, resolution

DESCRIPTION = """Which ZeRO stage, micro-batch and accumulation fit, and what a step costs, before anything is run.

  zerobert plan --model bert-large --gpus 64 --gpus-per-node 8 --gpu-memory 80GiB --sequence-length 512 \\
      --global-batch 32768
  zerobert plan --config launch/recipes/pretrain_base_phase1.yaml --gpus 8 --gpu h100 --plot plan.png
  zerobert plan --model bert-base                       this machine
"""
#: Devlin et al. 2019: 1M steps of 256 sequences, nine tenths with 128 tokens and one tenth with 512
BERT_TOKENS = 256 * (900_000 * 128 + 100_000 * 512)


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert plan", description=DESCRIPTION)
    parser.add_argument("--model", type=str, default=None, help=f"{', '.join(MODEL_SIZES)}; bert-large means large")
    parser.add_argument("--config", type=str, default=None, help="a recipe: its model, lengths, batch and precision")
    parser.add_argument("--vocabulary", type=int, default=30522, help="tokens of the vocabulary")
    parser.add_argument("--sequence-length", type=int, default=None, help="tokens of a sequence; 128 without a recipe")
    parser.add_argument("--global-batch", type=int, default=None, help="sequences of a step; 256 without a recipe")
    parser.add_argument("--precision", type=str, default=None, help="bf16, fp16 or fp32; bf16 without a recipe")
    parser.add_argument("--optimizer", type=str, default=None, help="adamw or lamb")
    parser.add_argument("--activation-checkpointing", type=str, default="auto", help="auto, on or off")
    parser.add_argument("--attention", type=str, default="flash", help="flash, or plain where scores are kept")
    parser.add_argument("--tokens", type=float, default=float(BERT_TOKENS), help="tokens of the whole training")
    parser.add_argument("--gpus", type=int, default=None, help="of all nodes; without it this machine is looked at")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--gpu", type=str, default=None, help=f"{', '.join(GPUS)}; else the one nearest in memory")
    parser.add_argument("--gpu-memory", type=str, default=None, help="of a GPU, such as 80GiB")
    parser.add_argument("--host-memory", type=str, default=None, help="of a node, for offload; 512GiB if not given")
    parser.add_argument("--peak-tflops", type=float, default=None, help="dense TFLOP/s of a GPU in the precision")
    parser.add_argument("--link-bandwidth", type=float, default=None, help="GB/s of a GPU to others of its node")
    parser.add_argument("--network-bandwidth", type=float, default=None, help="GB/s of a node to others; 25 by default")
    parser.add_argument("--utilisation", type=float, default=None, help="share of the peak assumed; 0.45 by default")
    parser.add_argument("--plot", type=str, default=None, help="write stacked bars of the memory to this picture")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, the DeepSpeed dict in it")
    parser.add_argument("--output", type=str, default=None, help="write the chosen DeepSpeed JSON to this file")
    return parser


def request_of(options: Any) -> Request:
    """What the options ask to train.

    Raises:
        UserError: names the option that is wrong.
    """
    base = RunConfig(train=TrainConfig(global_batch=256, precision="bf16"))
    if options.config is not None:
        from launch.train import parse

        base = parse(["--config", options.config])
    model = base.model
    if options.model is not None:
        size = options.model.lower().removeprefix("bert-")
        if size not in MODEL_SIZES:
            raise UserError(f"model: {options.model!r} is unknown; choose one of {', '.join(MODEL_SIZES)}")
        model = ModelConfig(size=size)
    elif options.config is None:
        raise UserError("model: not given; give --model bert-base or --config RECIPE")
    length = options.sequence_length or base.data.sequence_length
    model = replace(model, max_positions=max(model.max_positions, length))
    request = Request(
        model=model,
        vocabulary=options.vocabulary,
        sequence_length=length,
        global_batch=options.global_batch or base.train.global_batch,
        precision=options.precision or base.train.precision,
        optimizer=options.optimizer or base.optim.name,
        checkpointing=options.activation_checkpointing,
        attention=options.attention,
        mask_probability=base.data.mask_probability,
        tokens=options.tokens,
    )
    check(options, request)
    return request


def check(options: Any, request: Request) -> None:
    """Refuse values outside of their choices or not positive."""
    choices = {
        "precision": (request.precision, ("bf16", "fp16", "fp32")),
        "optimizer": (request.optimizer, ("adamw", "lamb")),
        "activation-checkpointing": (request.checkpointing, ("auto", "on", "off")),
        "attention": (request.attention, ("flash", "plain")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{name}: {value!r} is not allowed; choose one of {', '.join(allowed)}")
    names = ("sequence_length", "global_batch", "vocabulary", "tokens", "gpus", "gpus_per_node", "peak_tflops")
    for name in (*names, "link_bandwidth", "network_bandwidth", "utilisation"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name.replace('_', '-')}: {value!r} is not allowed; give a positive number")
    if options.utilisation is not None and options.utilisation > 1:
        raise UserError(f"utilisation: {options.utilisation!r} is not allowed; give a share of the peak in (0, 1]")


def hardware_of(options: Any, request: Request) -> Hardware:
    """The hardware that the options describe, or this machine's."""
    memory = None if options.gpu_memory is None else parse_bytes(options.gpu_memory, "gpu-memory")
    if options.gpus is None and options.gpu is None and memory is None:
        found = this_machine(request.precision)
    else:
        found = described_hardware(options.gpu, options.gpus or 1, options.gpus_per_node, memory)
    given = {
        "host_memory": options.host_memory and parse_bytes(options.host_memory, "host-memory"),
        "peak_flops": options.peak_tflops and options.peak_tflops * 1e12,
        "link_bandwidth": options.link_bandwidth and options.link_bandwidth * 1e9,
        "network_bandwidth": options.network_bandwidth and options.network_bandwidth * 1e9,
        "utilisation": options.utilisation,
    }
    found = replace(found, **{name: value for name, value in given.items() if value is not None})
    if request.global_batch % found.ranks:
        below = request.global_batch // found.ranks * found.ranks
        nearest = f"{below} or {below + found.ranks}" if below else str(found.ranks)
        raise UserError(f"global-batch: {request.global_batch} is not a multiple of {found.ranks} GPUs; give {nearest}")
    return found


def main(arguments: list[str]) -> int:
    """The command: plan, print, and write what was asked for."""
    options = build_parser().parse_args(arguments)
    request = request_of(options)
    hardware = hardware_of(options, request)
    rows = candidates(request, hardware)
    chosen = choose(rows)
    if options.json:
        print(json.dumps(as_json(request, hardware, rows, chosen), indent=1))
    else:
        print(render(request, hardware, rows, chosen))
    if options.plot is not None:
        plot(request, hardware, rows, chosen, Path(options.plot))
    if options.output is not None and chosen is not None:
        values = resolution(request, chosen, hardware).values
        write(Path(options.output), json.dumps(values, indent=2) + "\n")
    return 0 if chosen is not None else 1


def write(path: Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        UserError: it can't be written there.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"output: {str(path)!r} can't be written ({error.strerror}); give another file") from error
