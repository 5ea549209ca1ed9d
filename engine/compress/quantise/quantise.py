"""From an fp32 ONNX folder to an int8 one that is certified on a task's examples, on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from engine.compress.quantise.calibrate import Ranges
from engine.compress.quantise.convert import Activations, Converter
from engine.compress.quantise.graph import Feed, layers_of, prepared, session_of
from engine.compress.quantise.latency import timed, typical
from engine.compress.quantise.machine import processor, saturates
from engine.compress.quantise.options import QuantiseConfig
from engine.compress.quantise.report import FLOAT, INT8, Report
from engine.compress.quantise.search import Budget, Search
from engine.compress.score import Score, change, check_classes, score
from engine.data.loading.loader import evaluation_batches
from engine.errors import UserError
from engine.model.folder import INT8_REPORT, ROUND_TRIP, WEIGHTS_HASH, read_origin, write_origin
from engine.model.pretrained import ONNX_FILE
from engine.onnx.folder import GRAPH_FACTS, onnx_folder
from engine.onnx.module import OnnxModule, open_session
from engine.predict.model import ModelFolder
from engine.tasks.finetune import model_inputs
from engine.tasks.task import Task

#: of the metadata of a graph
PRECISION = "precision"


def quantise(
    model: ModelFolder,
    output: Path,
    task: Task,
    config: QuantiseConfig,
    tell: Callable[[str], None],
    before: Score | None = None,
) -> Report:
    """Write an int8 ONNX folder, which appears whole and within the budget; replaces an earlier export.

    Args:
        model: an fp32 ONNX folder.
        task: its examples score the model, and its training samples calibrate ranges; labels of these aren't read.
        tell: told of each step.
        before: the model's score on the task's examples, where it is known.

    Raises:
        UserError: the model is no fp32 graph or of other classes, too few examples to tell the budget's loss from none,
            or `output` exists and is no export.
    """
    check_classes(getattr(task, "names", None), model.config)
    with onnx_folder(output) as partial:
        graph = prepared(_fp32(model))
        layers = [layer for layer in layers_of(graph) if config.embeddings or not layer.table]
        reduced = saturates() if config.reduce_range is None else config.reduce_range
        if before is None:
            before = score(task, _module(open_session(_fp32(model), torch.device("cpu"), config.threads), model))
        budget = Budget(config.budget, config.certain)
        _check_enough(before, budget)
        samples = samples_of(task, model, graph, config)
        feeds, probes = samples[: config.samples], samples[config.samples :]
        methods = cast(Sequence[Activations], config.tried)
        ranges = None if set(methods) == {"dynamic"} else Ranges(graph, layers, feeds, config.threads)
        converter = Converter(graph, layers, reduced, ranges)
        search = Search(
            converter,
            probes,
            config.threads,
            lambda session: score(task, _module(session, model)),
            before,
            budget,
            tell,
        )
        chosen = search.run(methods)
        _write(partial, model, converter.mixed(chosen.activations, chosen.kept))
        sizes = {FLOAT: _fp32(model).stat().st_size, INT8: (partial / ONNX_FILE).stat().st_size}
        feed = typical(probes)
        cpu = torch.device("cpu")
        sessions = {
            name: open_session(folder / ONNX_FILE, cpu, config.threads)
            for name, folder in ((FLOAT, model.folder), (INT8, partial))
        }
        report = Report(
            search, chosen, budget, processor(), saturates(), sizes,
            timed(sessions, feed), feed["input_ids"].shape[-1],
        )  # fmt: skip
        text = json.dumps(report.record(), indent=1, ensure_ascii=False) + "\n"
        (partial / INT8_REPORT).write_text(text, encoding="utf-8")
    return report


@dataclass
class _Recorder:
    """A session that keeps what it is asked."""

    session: Any
    feeds: list[Feed] = field(default_factory=list)

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def run(self, names: Sequence[str], feed: dict[str, NDArray[np.int64]]) -> Any:
        self.feeds.append(feed)
        return self.session.run(names, feed)


@torch.no_grad()
def samples_of(task: Task, model: ModelFolder, graph: Any, config: QuantiseConfig) -> list[Feed]:
    """Training samples as a graph takes them, one in each, in an order of their own: for ranges, and a quarter more."""
    recorder = _Recorder(session_of(graph, config.threads))
    module = _module(recorder, model)
    count = config.samples + max(1, config.samples // 4)
    for batch in evaluation_batches(task.train_source(), 0, 1, 1, count):
        module(**model_inputs(batch))
    order = np.random.default_rng(count).permutation(len(recorder.feeds))  # they came in falling length
    return [recorder.feeds[index] for index in order]


def _module(session: Any, model: ModelFolder) -> OnnxModule:
    return OnnxModule(session, model.head, model.config)


def _fp32(model: ModelFolder) -> Path:
    """The graph of a model.

    Raises:
        UserError: it isn't one, or not in fp32.
    """
    import onnx

    path = model.folder / ONNX_FILE
    facts = {each.key: each.value for each in onnx.load(path, load_external_data=False).metadata_props}
    if facts.get(PRECISION, "fp32") != "fp32":
        raise UserError(f"model: {str(model.folder)!r} is of precision {facts[PRECISION]}; give the fp32 model")
    return path


def _check_enough(before: Score, budget: Budget) -> None:
    """Refuse a certainty that so few examples can't give, whatever the model: not even that of no difference at all."""
    if not budget.holds(change(before, before)):
        raise UserError(
            f"budget: {budget.points:g} is not allowed; {len(before.outcomes)} examples can't tell a loss of so little "
            "from none; give more examples, a larger budget, or --certain false"
        )


def _write(folder: Path, model: ModelFolder, graph: Any) -> None:
    """Write the graph with all that was beside the float one."""
    for name in (path.name for path in model.folder.iterdir()):
        source = model.folder / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif name != ONNX_FILE:
            shutil.copyfile(source, folder / name)
    for each in graph.metadata_props:
        each.value = "int8" if each.key == PRECISION else each.value
    (folder / ONNX_FILE).write_bytes(graph.SerializeToString())
    origin = {name: value for name, value in (read_origin(folder) or {}).items() if name not in _OF_WEIGHTS}
    write_origin(folder, {**origin, GRAPH_FACTS: {PRECISION: "int8", "report": INT8_REPORT}}, None)


#: in zerobert.json, what isn't true of other weights
_OF_WEIGHTS = (WEIGHTS_HASH, ROUND_TRIP)
