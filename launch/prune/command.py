"""`zerobert prune`: a trained model without the heads, neurons and layers that matter least."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output, split_at_dashes

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import nn

    from engine.compress.folder import Source
    from engine.compress.prune.prune import Options
    from engine.compress.score import Score
    from engine.tasks.finetune import FineTuning

DESCRIPTION = """Take out of a trained model what matters least, without training it again, or drop layers.

  zerobert prune runs/sst2 --target "speed 2x" --output small          faster by so much on this machine
  zerobert prune runs/sst2 --target "flops 0.5" --even --output small  equally many units in each layer
  zerobert prune my-export --data train.csv --target "heads 0.5, neurons 0.4" --output small -- --labelled.text=review
  zerobert prune bert-base --keep_layers 6 --output half               every second layer, to be trained again
  zerobert prune runs/pruned --output small                            only take out zeros that are there

What follows -- are options of `zerobert train` about the data. Heads and neurons are scored by the Fisher information
of the run's own loss on its training examples (Kwon et al. 2022), and what stays is fitted to the whole model. The
folder opens in transformers; layers that differ hold zeros there, which exports to ONNX take out."""


def build_parser() -> CommandParser:
    """The parser of the command's own options."""
    parser = CommandParser(
        prog="zerobert prune",
        usage="zerobert prune MODEL --output DIR [options] [-- DATA OPTIONS]",
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("model", type=str, help="a run's folder, an exported one, or a Hugging Face folder of our architectures")
    add("--output", type=str, required=True, help="folder to write")
    add("--data", type=str | None, default=None, help="the run that trained it, or a labelled file; by default MODEL")
    add(
        "--target",
        type=str | None,
        default=None,
        help='"speed 2x" measured on this machine, "flops 0.5" of the encoder\'s layers, "size 30MB" of the weights '
        'without zeros, "heads 0.5, neurons 0.4"; by default nothing is pruned',
    )
    add("--layers", type=str | None, default=None, help="numbers of the layers to keep, from 0, such as 0,2,4")
    add("--keep_layers", type=int | None, default=None, help="how many layers to keep, spread evenly")
    add(
        "--even", action="store_true", help="keep equally many heads and neurons in each layer: the folder gets smaller"
    )
    add("--samples", type=int, default=1024, help="training examples to look at")
    add(
        "--tune",
        choices=("matrix", "mask", "none"),
        default="matrix",
        help="how to fit what stays: whole output matrices, a factor for each unit, or nothing",
    )
    add("--latency_batch", type=int, default=1, help="sequences of a batch whose time is measured")
    add("--latency_length", type=int, default=128, help="their tokens; also those that FLOPs are counted for")
    add("--threads", type=int, default=1, help="CPU threads of the measurement")
    add("--runtime", choices=("onnx", "torch"), help="what is measured; by default onnx, if its packages are installed")
    return parser


def main(arguments: list[str]) -> int:
    """Prune, write, and tell what it cost."""
    own, more = split_at_dashes(arguments)
    values = build_parser().parse_args(own)
    silence_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for line in run(values, more):
        print(line, flush=True)
    return 0


def run(values: Namespace, more: list[str]) -> list[str]:
    """Do what the options say; what was done, in words.

    Raises:
        UserError: what is wrong with them, the model or the data.
    """
    check_output(values.output)
    options = _options(values)
    from engine.compress.folder import open_source
    from engine.compress.prune.compact import compact, zeros
    from engine.compress.score import score
    from launch.scored import is_run, scored_task

    source, output = open_source(values.model), Path(values.output)
    check_output(values.output, source.folder)
    kept = _kept_layers(values, source.config.num_hidden_layers)
    has_data = options is not None or values.data is not None or is_run(values.model)
    if more and not has_data:
        raise UserError(f"{more[0]}: without --data or --target no data are read; leave it out")
    task = scored_task(values.model, source, values.data, more) if has_data else None
    model = source.load()
    before = None if task is None else score(task, model)
    model, told, lines = _smaller(model, source, kept, task, options)
    width = compact(model)
    empty = [f"{number} of {count} {kind}" for kind, (count, number) in zeros(model).items() if number]
    lines.append(f"folder: {width} neurons a layer; zeros that exports to ONNX take out: {', '.join(empty) or 'none'}")
    if task is not None and before is not None:
        after = score(task, model)
        lines.append(_told_scores(before, after))
        told |= {"metric": after.metric, "before": before.value, "after": after.value}
    compared = source.write(model, output, {"pruned": told})
    return [*lines, f"wrote {output}", f"checked: {compared}"]


def _smaller(
    model: nn.Module, source: Source, kept: list[int] | None, task: FineTuning | None, options: Options | None
) -> tuple[nn.Module, dict[str, object], list[str]]:
    """The model without layers and units; what zerobert.json and the user are told of it."""
    from engine.compress.prune.layers import with_layers
    from engine.compress.prune.prune import prune

    told: dict[str, object] = {}
    lines: list[str] = []
    if kept is not None:
        model = with_layers(model, source.head, kept)
        lines.append(f"layers: {', '.join(map(str, kept))} of {source.config.num_hidden_layers} kept")
        told["layers"] = kept
    if task is not None and options is not None:
        pruned = prune(task, model, options)
        model = pruned.model
        lines += [*pruned.lines(), pruned.cost_line(options)]
        told |= {"target": str(options.target), "kept": [list(each) for each in pruned.kept]}
    return model, told, lines


def _told_scores(before: Score, after: Score) -> str:
    """Both, and their difference with its interval."""
    from engine.compress.score import change

    found, examples = change(before, after), len(after.outcomes)
    apart = f"{found.value:+.4f}, 95 % between {found.low:+.4f} and {found.high:+.4f}"
    return f"{after.metric}: {before.value:.4f} -> {after.value:.4f} ({apart}; {examples} examples)"


def _options(values: Namespace) -> Options | None:
    """How to prune; None where only layers are dropped, or zeros taken out."""
    from engine.compress.prune.latency import Load, installed_runtime
    from engine.compress.prune.prune import Options
    from engine.compress.prune.target import parse_target

    load = Load(values.latency_batch, values.latency_length, values.threads, values.runtime or installed_runtime())
    if values.target is not None:
        options = Options(parse_target(values.target), values.samples, values.tune, values.even, load)
        options.validate()
        return options
    parser = build_parser()
    for name in ("even", "samples", "tune", "latency_batch", "latency_length", "threads", "runtime"):
        if getattr(values, name) != parser.get_default(name):
            raise UserError(
                f"{name}: {getattr(values, name)!r} has no effect without --target; give one, or leave it out"
            )
    return None


def _kept_layers(values: Namespace, layers: int) -> list[int] | None:
    """Numbers of the layers to keep; None for all."""
    from engine.compress.prune.layers import checked, spread

    if values.layers is not None and values.keep_layers is not None:
        raise UserError(f"keep_layers: {values.keep_layers} is given beside layers; give one of them")
    if values.keep_layers is not None:
        if not 1 <= values.keep_layers <= layers:
            raise UserError(
                f"keep_layers: {values.keep_layers} is not allowed; the model has {layers}: give 1 to {layers}"
            )
        return spread(values.keep_layers, layers)
    if values.layers is None:
        return None
    try:
        wanted = [int(number) for number in str(values.layers).split(",")]
    except ValueError as error:
        raise UserError(f"layers: {values.layers!r} is not allowed; give numbers such as 0,2,4") from error
    return checked(wanted, layers)
