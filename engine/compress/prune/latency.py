"""How long an encoder takes on this machine by the number of heads and neurons of its layers, measured.

What is timed are models of one layer with some of its heads or of its neurons, without the others (see `slim`), and one
of two whole layers, whose difference to one tells the time of a layer: as graphs in ONNX Runtime, where that is
installed, or transformers' modules in torch. All take turns, so that a busy machine slows them alike, and the shortest
time of each counts, to which others' work adds least. Between measured numbers times are interpolated.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from engine.compress.prune.cost import Costs
from engine.config import architecture_of, require
from engine.model.pruning.slim import slim
from engine.model.pruning.units import Kind, sublayers
from engine.model.sentence import SentenceConfig
from engine.onnx.graph import input_names, to_onnx
from engine.onnx.module import open_session

#: numbers of units that are measured, as shares of all, beside all of them
MEASURED = (0.0, 0.25, 0.5, 0.75)
ROUNDS = 25
#: that of an encoder alone
HEAD = "embeddings"

Runtime = Literal["onnx", "torch"]


def installed_runtime() -> Runtime:
    """ONNX Runtime, where it and the exporter's packages are installed, else torch."""
    wanted = ("onnx", "onnxscript", "onnxruntime")
    return "onnx" if all(importlib.util.find_spec(name) for name in wanted) else "torch"


@dataclass(frozen=True)
class Load:
    """What is computed while it is timed."""

    batch: int = 1
    length: int = 128
    threads: int = 1
    runtime: Runtime = field(default_factory=installed_runtime)
    rounds: int = ROUNDS

    def __str__(self) -> str:
        name = {"onnx": "ONNX Runtime", "torch": "torch"}[self.runtime]
        return f"batch {self.batch}, {self.length} tokens, {self.threads} thread(s), {name}"


def prepared(model: nn.Module, head: str, load: Load) -> Callable[[], object]:
    """What computes a transformers model once, with random ids; the model may change.

    Args:
        head: one of `Architecture.export_classes`.

    Raises:
        UserError: a package that is missing.
    """
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (load.batch, load.length), generator=torch.Generator().manual_seed(1))
    inputs = {name: torch.ones_like(ids) if name == "attention_mask" else ids * 0 for name in input_names(config)}
    inputs["input_ids"] = ids
    if load.runtime == "onnx":
        graph = to_onnx(model, head).SerializeToString()
        session = open_session(graph, torch.device("cpu"), load.threads)
        fed = {name: values.numpy() for name, values in inputs.items()}
        return lambda: session.run(None, fed)

    def run() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return run


def measure(config: Any, load: Load) -> Costs:
    """Seconds of a model of this configuration, by the units of each layer.

    Args:
        config: the transformers configuration of a model as it is.

    Raises:
        UserError: sequences longer than the model takes.
    """
    positions = architecture_of(config).positions(config)
    require(load.length <= positions, "latency_length", load.length, f"the model has {positions} positions; lower it")
    one, two = _encoder(config, 1), _encoder(config, 2)
    counts = {part.kind: part.count for part in sublayers(one)}
    sizes = {kind: sorted({max(1, round(share * count)) for share in MEASURED}) for kind, count in counts.items()}
    runs: dict[tuple[Any, int], Callable[[], object]] = {("layers", 2): prepared(two, HEAD, load)}
    for kind, some in sizes.items():
        runs |= {(kind, size): prepared(_smaller(one, kind, size), HEAD, load) for size in some}
    runs["layers", 1] = prepared(one, HEAD, load)
    times = _times(runs, load)
    layer = max(times["layers", 2] - times["layers", 1], 1e-9)
    saved = {}
    for kind, count in counts.items():
        slowest = np.maximum.accumulate([*(times[kind, size] for size in sizes[kind]), times["layers", 1]])
        saved[kind] = np.interp(np.arange(count + 1), [*sizes[kind], count], slowest - slowest[-1])
    fixed = max(times["layers", 1] - layer, 0.0)
    return Costs(fixed, saved["heads"] + layer, saved["neurons"])


def _encoder(config: Any, layers: int) -> nn.Module:
    """A model without a head, with drawn weights and so many layers."""
    own = deepcopy(config)
    SentenceConfig().put_into(own)
    architecture = architecture_of(config)
    setattr(own, architecture.dimensions["layers"], layers)
    if getattr(own, "layer_types", None) is not None:
        own.layer_types = own.layer_types[-layers:]
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = architecture.export_class(architecture.class_for(HEAD))(own)
    return model.eval()


def _smaller(model: nn.Module, kind: Kind, size: int) -> nn.Module:
    """A copy whose layer has so many units of a kind."""
    copy = deepcopy(model)
    for part in sublayers(copy):
        if part.kind == kind:
            part.zero(torch.arange(part.count) >= size)
    return slim(copy)


def _times(runs: dict[tuple[Any, int], Callable[[], object]], load: Load) -> dict[tuple[Any, int], float]:
    """The least seconds of each; of one thread its processor time, to which other programs add nothing."""
    clock = time.process_time if load.threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(load.threads)
    found: dict[tuple[Any, int], list[float]] = {name: [] for name in runs}
    try:
        for number in range(load.rounds + 2):
            for name, run in runs.items():
                begun = clock()
                run()
                if number > 1:  # the first ones prepare
                    found[name].append(clock() - begun)
    finally:
        torch.set_num_threads(before)
    return {name: min(seconds) for name, seconds in found.items()}
