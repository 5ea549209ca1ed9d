"""`zerobert compress`: a trained model as a small and fast graph that keeps its score."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.compress.road import BATCHES, Candidate, Wish, chosen, parse_wish
from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output, split_at_dashes
from launch.compress.options import CompressConfig
from launch.scored import check_data, is_run, scored_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.compress.quantise.latency import Latency
    from engine.compress.score import Score
    from engine.predict.model import ModelFolder
    from engine.tasks.finetune import FineTuning
    from launch.compress.roads import Made

DESCRIPTION = """Try the roads to a smaller and faster model, and write the best graph that keeps the target.

  zerobert compress runs/sst2 --target "latency 3x, accuracy -1.0" --output fast
  zerobert compress runs/sst2 --target "latency 4x, accuracy -1.5" --students 4,3 --output fast -- --train.epochs=5
  zerobert compress my-export --data reviews.csv --target "size 20MB" --output fast -- --labelled.text=review

Tried are the model as it is, pruned without training, and students of fewer layers distilled from it, each as an ONNX
graph in fp32 and in int8. All are scored on the same examples and timed in turn on this machine against the model in
torch. What follows -- are options of `zerobert train` about the data, and for students. OUTPUT.candidates keeps what
was made, with report.md, report.json and front.png; the same command goes on there. Exit status 1: target missed."""


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `CompressConfig`."""
    parser = CommandParser(
        prog="zerobert compress",
        usage="zerobert compress MODEL --target WISH --output DIR [options] [-- TRAINING]",
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("model", type=str, help="a run, an exported or a Hugging Face folder with a task's head")
    add("--target", type=str, required=True, help='bounds, such as "latency 3x, accuracy -1.0, size 30MB"')
    add("--output", type=str, required=True, help="folder to write")
    add("--data", type=str | None, default=None, help="the run that trained it, or a labelled file; by default MODEL")
    parser.add_class_arguments(CompressConfig)
    return parser


def main(arguments: list[str]) -> int:
    """Make, score, time and choose; the exit status.

    Raises:
        UserError: what is wrong with model, options or data.
    """
    own, training = split_at_dashes(arguments)
    values = build_parser().parse_args(own).as_dict()
    given, target, output, data = (values.pop(name) for name in ("model", "target", "output", "data"))
    config, wish = CompressConfig(**values), parse_wish(target)
    config.validate()
    check_output(output, Path(given))
    check_data(given, data)
    if config.students and not is_run(given):
        raise UserError(f"students: {config.students!r} need the run that trained {given!r}; give its folder as MODEL")
    silence_libraries()
    met, text = compress(given, Path(output), data, config, wish, training)
    print(f"\n{text}written {output}", flush=True)
    return 0 if met else 1


def compress(
    given: str, output: Path, data: str | None, config: CompressConfig, wish: Wish, training: list[str]
) -> tuple[bool, str]:
    """Write the chosen graph to `output`; whether it keeps the target, and the report.

    Raises:
        UserError: what is wrong with the model or the data.
    """
    import torch

    from engine.compress.quantise.machine import processor
    from engine.compress.score import score
    from engine.predict.model import open_folder
    from launch.compress.report import write_report
    from launch.compress.roads import Roads

    torch.set_num_threads(config.threads)
    model = open_folder(given)
    if model.is_onnx:
        raise UserError(f"model: {given!r} is an ONNX folder already; give the model that it was made from")
    task = scored_task(given, model, data, training)
    for layers in config.distilled:
        if layers >= model.config.num_hidden_layers:
            raise UserError(f"students: {layers} layers are not fewer than the model's; give fewer")
    room = output.with_name(f"{output.name}.candidates")
    roads = Roads(given, model, task, config, wish, room, training, lambda line: print(line, flush=True))
    before = score(task, model.load(torch.device("cpu"), "fp32"))
    print(f"model: {before.metric} {before.value:.4f} on {len(before.outcomes)} examples", flush=True)
    made = list(roads.make(before))
    whole, candidates, tokens = _timed(model, task, made, before, config)
    best = chosen(candidates, wish, whole[BATCHES[0]].median)
    _copy(best.folder, output)
    told: dict[str, Any] = {
        "metric": before.metric, "score": before.value, "examples": len(before.outcomes), "threads": config.threads,
        "tokens": tokens, "processor": processor(), "left_out": roads.left_out,
    }  # fmt: skip
    text = write_report(room, candidates, whole, best, wish, told)
    return wish.kept(best, whole[BATCHES[0]].median), text


def _timed(
    model: ModelFolder, task: FineTuning, made: Sequence[Made], before: Score, config: CompressConfig
) -> tuple[Mapping[int, Latency], list[Candidate], int]:
    """Times of the model in torch, candidates with theirs, and the tokens of a sequence that was timed."""
    import torch

    from engine.compress.quantise.graph import prepared
    from engine.compress.quantise.latency import timed, typical
    from engine.compress.quantise.options import QuantiseConfig
    from engine.compress.quantise.quantise import samples_of
    from engine.compress.score import change
    from engine.model.pretrained import ONNX_FILE
    from engine.onnx.module import open_session
    from engine.predict.model import open_folder

    first = made[0].folder
    options = QuantiseConfig(samples=config.calibration, threads=config.threads)
    feeds = samples_of(task, open_folder(str(first)), prepared(first / ONNX_FILE), options)
    feed = typical(feeds)
    sessions: dict[str, Any] = {
        each.name: open_session(each.folder / ONNX_FILE, torch.device("cpu"), config.threads) for each in made
    }
    whole = "fp32 in torch"
    sessions[whole] = TorchSession(model)
    times = timed(sessions, feed)
    candidates = [
        Candidate(
            each.name, each.folder, each.score.value, change(before, each.score),
            (each.folder / ONNX_FILE).stat().st_size, {batch: times[batch][each.name] for batch in BATCHES},
        )
        for each in made
    ]  # fmt: skip
    return {batch: times[batch][whole] for batch in BATCHES}, candidates, int(feed["input_ids"].shape[-1])


class TorchSession:
    """transformers' model of a folder, in fp32, under the interface of a session."""

    def __init__(self, model: ModelFolder) -> None:
        from engine.export import source_of
        from engine.onnx.folder import transformers_model

        self._model = transformers_model(source_of(model)).eval()

    def run(self, _: object, feed: Mapping[str, Any]) -> object:
        import torch

        with torch.inference_mode():
            return self._model(**{name: torch.from_numpy(values) for name, values in feed.items()})


def _copy(folder: Path, output: Path) -> None:
    from engine.onnx.folder import onnx_folder

    with onnx_folder(output) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
