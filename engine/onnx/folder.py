"""Write an ONNX folder: a graph with what opens it, once it computes what the model computes.

Heads and neurons that are zeros, as pruning leaves them, are not in the graph.

model.onnx      the graph with its weights, see `engine.onnx.graph`; its metadata tell head, labels and precision
config.json, tokenizer, zerobert.json, modules.json   as of any export
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engine
from engine.config import architecture_of
from engine.durable import sync_folder, write_durably
from engine.errors import UserError
from engine.model.folder import ROUND_TRIP, WEIGHTS_HASH, described, whole_folder, write_description, write_origin
from engine.model.pretrained import ONNX_FILE
from engine.model.pruning.slim import slim
from engine.model.roundtrip import Sample, random_samples
from engine.onnx.check import BOUNDS, GraphCheck, GraphPrecision, compare
from engine.onnx.graph import to_onnx
from engine.onnx.module import INSTALL, OnnxModule, open_session
from engine.onnx.triton import GRAPH, write_triton
from engine.precision import DTYPES

#: in zerobert.json, what the graph is and was compared with; see `GraphCheck`
GRAPH_FACTS = "onnx"


@dataclass(frozen=True)
class Source:
    """The model that a graph is made from, and what comes beside the graph."""

    model: nn.Module
    """ours, with a head of a task, in fp32 and evaluation mode"""
    head: str
    """one of `Architecture.export_classes`"""
    tokenizer: Mapping[str, bytes]
    """the content of its files by their names"""
    origin: Mapping[str, Any]
    """what zerobert.json tells of the weights; empty of a folder that isn't ours"""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config


@dataclass(frozen=True)
class GraphWish:
    """How a user wants a graph."""

    precision: GraphPrecision = "fp32"
    samples: Sequence[Sample] | None = None
    """to compare it on; None: random ids"""
    check: bool = True
    """compare it with the model, and write nothing that differs"""
    triton: bool = False
    """write it as a model of a Triton repository"""


def export_graph(source: Source, output: Path, wish: GraphWish) -> GraphCheck:
    """Write a model as an ONNX folder, which appears whole and compared or not at all; replaces an earlier export.

    Raises:
        UserError: a package is missing, `output` exists and is no export, weights that don't fit the precision, or a
            graph that computes something else.
    """
    with onnx_folder(output) as partial:
        proto = to_onnx(slim(transformers_model(source)), source.head, DTYPES[wish.precision])
        describe_graph(proto, source, wish.precision)
        return complete_folder(partial, proto, source, wish)


def complete_folder(folder: Path, proto: Any, source: Source, wish: GraphWish) -> GraphCheck:
    """Write a graph and all that is beside it, and compare it with its source."""
    path = folder / (GRAPH if wish.triton else ONNX_FILE)
    path.parent.mkdir(exist_ok=True)
    content = proto.SerializeToString()
    write_durably(path, content)
    config = described(source.config, architecture_of(source.config).class_for(source.head))
    config.dtype = torch.float32
    write_description(folder, config, source.tokenizer)
    if wish.triton:
        write_triton(folder, proto)
    opset = next(each.version for each in proto.opset_import if not each.domain)
    held = sum(each.numel() * 4 for each in source.model.parameters())
    told = GraphCheck(wish.precision, opset, len(content), held, BOUNDS[wish.precision])
    if wish.check:
        told = compared(path, source, wish.samples, told)
    origin = {name: value for name, value in source.origin.items() if name not in (WEIGHTS_HASH, ROUND_TRIP)}
    write_origin(folder, {**origin, GRAPH_FACTS: told.record()}, None, path)
    return told


def compared(path: Path, source: Source, samples: Sequence[Sample] | None, told: GraphCheck) -> GraphCheck:
    """Compare a written graph with its source.

    Args:
        told: of the graph, to be completed.

    Raises:
        UserError: the graph computes something else.
    """
    chosen = random_samples(source.config) if samples is None else samples
    graph = OnnxModule(open_session(path, torch.device("cpu")), source.head, source.config)
    differences, computed = compare(source.model, graph, chosen, told.bound)
    tokens = sum(len(sample.ids) for sample in chosen)
    return replace(
        told,
        samples=len(chosen),
        tokens=tokens,
        batches=computed,
        of_data=samples is not None,
        differences=differences,
    )


@contextmanager
def onnx_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, see `whole_folder`, whose content is on the disk before it gets its name.

    Raises:
        UserError: a package is missing, or `output` exists and is no export.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"format: a graph needs the package {error.name}, which is not installed; {INSTALL}") from error
    with whole_folder(output) as partial:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                _sync(Path(folder) / name)
            sync_folder(Path(folder))
    sync_folder(output.parent)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def describe_graph(proto: Any, source: Source, precision: str) -> None:
    """Write into a graph who made it and of what; metadata are texts, the labels JSON."""
    config = source.config
    proto.producer_name, proto.producer_version = "zerobert", engine.__version__
    told = {"head": source.head, "precision": precision, "model_type": config.model_type}
    if source.head in ("sequence_classification", "token_classification"):
        told["labels"] = json.dumps([config.id2label[index] for index in range(config.num_labels)], ensure_ascii=False)
        told["problem_type"] = config.problem_type or ""
    del proto.metadata_props[:]
    for name, value in told.items():
        proto.metadata_props.add(key=name, value=value)


def transformers_model(source: Source) -> nn.Module:
    """transformers' model with the weights of ours, whose parameters have the same names."""
    architecture = architecture_of(source.config)
    config = deepcopy(source.config)  # the export changes its attention
    model: nn.Module = architecture.export_class(architecture.class_for(source.head))(config)
    told = model.load_state_dict(source.model.state_dict(), strict=False)
    assert not told.missing_keys, f"transformers' class has {told.missing_keys[0]} and our modules don't"
    assert not told.unexpected_keys, f"our modules have {told.unexpected_keys[0]} and transformers' class doesn't"
    return model
