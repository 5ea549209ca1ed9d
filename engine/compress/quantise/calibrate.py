"""Ranges of activations on a user's samples, for static int8."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from engine.compress.quantise.graph import Feed, Layer, session_of

#: how a range is chosen from what was seen: all of it; by least divergence of the quantised from the seen distribution
#: (Migacz 2017); or without the outermost share
Calibration = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Calibration, ...] = ("minmax", "entropy", "percentile")
PERCENTILE = 99.99
#: bins of the histograms that percentiles and divergences are computed from, and levels that bytes have on each side
BINS = {"percentile": 2048, "entropy": 128}
LEVELS = 128


class Ranges:
    """The ranges of the inputs of a model's products, by each method, from one pass over the samples.

    Args:
        model: the fp32 ONNX model.
        layers: whose inputs are looked at.
        feeds: samples, one in each, so that no padding is in them.
        threads: of the pass.
    """

    def __init__(self, model: Any, layers: Sequence[Layer], feeds: Sequence[Feed], threads: int) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        nodes = {node.name: node for node in model.graph.node}
        given = {each.name for each in model.graph.input}
        names = [nodes[layer.node].input[0] for layer in layers if not layer.table]
        self._names = [name for name in dict.fromkeys(names) if name not in given]
        self._collectors = {
            method: HistogramCollector(method, False, bins, LEVELS, PERCENTILE, None) for method, bins in BINS.items()
        }
        session = session_of(model, threads, self._names)
        for feed in feeds:
            found = session.run(self._names, feed)
            for collector in self._collectors.values():
                collector.collect_value(dict(zip(self._names, found, strict=True)))

    def of(self, method: Calibration) -> Any:
        """The ranges as onnxruntime.quantization takes them."""
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

        if method == "minmax":
            found = {name: seen[2:4] for name, seen in self._collectors["percentile"].histogram_dict.items()}
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells of its steps
                computed = getattr(self._collectors[method], f"compute_{method}")()
            found = {name: ends[:2] for name, ends in computed.items()}
        data = {
            name: TensorData(lowest=np.asarray(low, np.float32), highest=np.asarray(high, np.float32))
            for name, (low, high) in found.items()
        }
        return TensorsData(CalibrationMethod.MinMax, data)
