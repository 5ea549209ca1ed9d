"""`zerobert plan`: which ZeRO stage and micro-batch fit these GPUs, what a step costs, and why this choice.

Nothing is run: memory, communication and time are computed (`launch.forecast.memory`, `launch.forecast.step_time`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import DEFAULT_ARCHITECTURE, MODEL_SIZES, OPTIMIZERS, OptimConfig
from engine.errors import UserError
from launch.cli import CommandParser
from launch.forecast.hardware import GPUS, Hardware, described_hardware, parse_bytes, this_machine
from launch.forecast.planner import Candidate, Request, as_json, candidates, choose, recipe_candidate, resolution
from launch.forecast.request import request_of, settled_precision, wanted_run
from launch.forecast.view import plot, render

if TYPE_CHECKING:
    from launch.forecast.advice import Advice

DESCRIPTION = """Which ZeRO stage, micro-batch and accumulation fit, and what a step costs, before anything is run.

  zerobert plan --model bert-large --gpus 64 --gpus-per-node 8 --gpu-memory 80GiB --sequence-length 512 \\
      --global-batch 32768
  zerobert plan --config launch/recipes/pretrain_base_phase1.yaml --gpus 8 --gpu h100 --plot plan.png
  zerobert plan --config launch/recipes/finetune.yaml --model bert-base --gpus 1 --gpu t4 --precision fp16
  zerobert plan --model bert-base                       this machine
  zerobert plan --compute 1e20 --laws fit.json --gpus 8 --gpu h100     the size that fitted laws advise

With --config the plan is of that recipe, fine-tuning too: its model or the folder that it starts from, its batch,
length, steps, precision, optimizer, recomputation and offload. What is given beside it is planned in its place. The
choice may differ from the recipe's own stage, micro-batch and offload, whose fit and cost are told beside it.
"""


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert plan", description=DESCRIPTION)
    parser.add_argument("--model", type=str, default=None, help=f"{', '.join(MODEL_SIZES[DEFAULT_ARCHITECTURE])}; "
                        "with an architecture before it, such as modernbert-base, of that one")  # fmt: skip
    parser.add_argument("--config", type=str, default=None, help="a recipe")
    parser.add_argument("--vocabulary", type=int, default=None, help="tokens of the vocabulary; that of the recipe's "
                        "store or folder if it is there, else 30522")  # fmt: skip
    parser.add_argument("--sequence-length", type=int, default=None, help="tokens of a sequence; 128 without a recipe")
    parser.add_argument("--global-batch", type=int, default=None, help="sequences of a step; 256 without a recipe")
    parser.add_argument("--precision", type=str, default=None, help="bf16, fp16 or fp32; without a recipe bf16, and "
                        "fp16 on GPUs that don't compute in bf16")  # fmt: skip
    parser.add_argument("--optimizer", type=str, default=None, help=f"{', '.join(OPTIMIZERS.names)}; "
                        f"{OptimConfig.name} without a recipe")  # fmt: skip
    parser.add_argument("--activation-checkpointing", type=str, default=None, help="auto (the faster one), on or off; "
                        "as a recipe says, auto without one")  # fmt: skip
    parser.add_argument("--attention", type=str, default="flash", help="flash, or plain where scores are kept")
    parser.add_argument("--steps", type=float, default=None, help="steps of the whole training; the recipe's")
    parser.add_argument("--tokens", type=float, default=None, help="the same in tokens; without a recipe BERT's own, "
                        "4.26e10")  # fmt: skip
    parser.add_argument("--compute", type=float | None, default=None, help="FLOPs of the whole training; --laws then "
                        "say the size and the tokens")  # fmt: skip
    parser.add_argument("--laws", type=str | None, default=None, help="fit.json of zerobert scaling fit")
    parser.add_argument("--gpus", type=int, default=None, help="of all nodes; without it this machine is looked at")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--gpu", type=str, default=None, help=f"{', '.join(GPUS)}; else the one nearest in memory")
    parser.add_argument("--gpu-memory", type=str, default=None, help="of a GPU, such as 80GiB; a plain 80 is 80GiB")
    parser.add_argument("--host-memory", type=str, default=None, help="of a node, for offload; 512GiB if not given")
    parser.add_argument("--peak-tflops", type=float, default=None, help="dense TFLOP/s of a GPU in the precision")
    parser.add_argument("--link-bandwidth", type=float, default=None, help="GB/s of a GPU to others of its node")
    parser.add_argument("--network-bandwidth", type=float, default=None, help="GB/s of a node to others; 25 by default")
    parser.add_argument("--utilisation", type=float, default=None, help="share of the peak that passes reach, in place "
                        "of what follows from the roofline; on a CPU 0.45 by default")  # fmt: skip
    parser.add_argument("--plot", type=str, default=None, help="write stacked bars of the memory to this picture")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, the DeepSpeed dict in it")
    parser.add_argument("--output", type=str, default=None, help="write the chosen DeepSpeed JSON to this file")
    return parser


def check(options: Any) -> None:
    """Refuse values outside of their choices or not positive.

    Raises:
        UserError: names the option.
    """
    choices = {
        "precision": ("bf16", "fp16", "fp32"),
        "optimizer": OPTIMIZERS.names,
        "activation_checkpointing": ("auto", "on", "off"),
        "attention": ("flash", "plain"),
    }
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            shown = name.replace("_", "-")
            raise UserError(f"{shown}: {value!r} is not allowed; choose one of {', '.join(allowed)}")
    names = (
        "compute",
        "sequence_length",
        "global_batch",
        "vocabulary",
        "tokens",
        "steps",
        "gpus",
        "gpus_per_node",
        "peak_tflops",
    )
    for name in (*names, "link_bandwidth", "network_bandwidth", "utilisation"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name.replace('_', '-')}: {value!r} is not allowed; give a positive number")
    if options.utilisation is not None and options.utilisation > 1:
        raise UserError(f"utilisation: {options.utilisation!r} is not allowed; give a share of the peak in (0, 1]")
    if options.tokens is not None and options.steps is not None:
        raise UserError(f"tokens: {options.tokens!r} and steps {options.steps!r} exclude each other; give one of them")


def hardware_of(options: Any, precision: str) -> Hardware:
    """The hardware that the options describe, or this machine's, with its rates in a precision."""
    memory = None if options.gpu_memory is None else parse_bytes(options.gpu_memory, "gpu-memory")
    if options.gpus is None and options.gpu is None and memory is None:
        hardware = this_machine(precision)
    else:
        hardware = described_hardware(options.gpu, options.gpus or 1, options.gpus_per_node, memory, precision)
    given = {
        "host_memory": options.host_memory and parse_bytes(options.host_memory, "host-memory"),
        "peak_flops": options.peak_tflops and options.peak_tflops * 1e12,
        "link_bandwidth": options.link_bandwidth and options.link_bandwidth * 1e9,
        "network_bandwidth": options.network_bandwidth and options.network_bandwidth * 1e9,
        "utilisation": options.utilisation,
    }
    return replace(hardware, **{name: value for name, value in given.items() if value is not None})


def check_shares(global_batch: int, ranks: int) -> None:
    """Refuse a global batch that the ranks can't share.

    Raises:
        UserError: names the nearest ones that they can.
    """
    if global_batch % ranks:
        below = global_batch // ranks * ranks
        nearest = f"{below} or {below + ranks}" if below else str(ranks)
        raise UserError(f"global-batch: {global_batch} is not a multiple of {ranks} GPUs; give {nearest}")


def own_candidate(request: Request, hardware: Hardware) -> tuple[Request, Candidate | None]:
    """What the recipe itself chooses; where that can't be trained here, a note says why."""
    try:
        return request, recipe_candidate(request, hardware)
    except UserError as error:
        return replace(request, notes=(*request.notes, f"the recipe can't be trained as it is: {error}")), None


def main(arguments: list[str]) -> int:
    """The command: plan, print, and write what was asked for."""
    options = build_parser().parse_args(arguments)
    check(options)
    advice = advised(options)
    wanted = wanted_run(options, None if advice is None else advice.run)
    hardware = hardware_of(options, wanted.precision or "bf16")
    request = request_of(options, wanted, settled_precision(wanted, hardware))
    check_shares(request.global_batch, hardware.ranks)
    rows = candidates(request, hardware)
    request, own = own_candidate(request, hardware)
    chosen = choose(rows) or (own if own is not None and own.fits else None)
    if options.json:
        told = {} if advice is None else {"advice": advice.as_json(request)}
        print(json.dumps(told | as_json(request, hardware, rows, chosen, own), indent=1))
    else:
        if advice is not None:
            print("\n".join([*advice.lines(request), ""]))
        print(render(request, hardware, rows, chosen, own, options.config))
    if options.plot is not None:
        plot(request, hardware, rows if own is None else [*rows, own], chosen, Path(options.plot))
    if options.output is not None and chosen is not None:
        values = resolution(request, chosen, hardware).values
        write(Path(options.output), json.dumps(values, indent=2) + "\n")
    return 0 if chosen is not None else 1


def advised(options: Any) -> Advice | None:
    """The advice of the laws that the options name, whose tokens are then planned; None where they name none."""
    if options.compute is None and options.laws is None:
        return None
    from launch.forecast.advice import advice_of

    advice = advice_of(options)
    options.tokens = advice.best.tokens.value
    return advice


def write(path: Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        UserError: it can't be written there.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"output: {str(path)!r} can't be written ({error.strerror}); give another file") from error
