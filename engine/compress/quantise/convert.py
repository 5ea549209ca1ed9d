"""An fp32 ONNX model as an int8 one, through onnxruntime.quantization, and any mixture of both."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from engine.compress.quantise.calibrate import METHODS, Calibration, Ranges
from engine.compress.quantise.graph import PRODUCTS, Layer, replace_all, with_int8_tables

#: how activations become bytes: by the range of each batch (dynamic), or by one that was calibrated
Activations = Literal["dynamic"] | Calibration
ACTIVATIONS: tuple[Activations, ...] = ("dynamic", *METHODS)


@dataclass(frozen=True, eq=False)
class Converter:
    """Makes int8 models of one fp32 model.

    Weights of products are signed, with a scale for each output; activations are unsigned, with one for a tensor.
    """

    model: Any
    """fp32, as `engine.compress.quantise.graph.prepared` gives it"""
    layers: Sequence[Layer]
    """of it"""
    reduced: bool
    """weights of 7 bits, which add up exactly on processors that `saturates`"""
    ranges: Ranges | None
    """of its activations; dynamic alone needs none"""

    @cache  # noqa: B019  (as long-lived as the model)
    def whole(self, activations: Activations) -> Any:
        """The model with all layers in int8."""
        model = copy.deepcopy(self.model)
        with_int8_tables(model, self.layers)
        products = [layer.node for layer in self.layers if not layer.table]
        if not products:
            return model
        with _quiet():
            if activations == "dynamic":
                return self._dynamic(model, products)
            return self._static(model, products, activations)

    def mixed(self, activations: Activations, kept: Collection[Layer]) -> Any:
        """The model with all layers in int8 but those that are kept as they are."""
        from onnxruntime.quantization.onnx_model import ONNXModel

        model = copy.deepcopy(self.whole(activations))
        graph, nodes = model.graph, {layer.node for layer in kept}
        originals = {node.output[0]: node for node in self.model.graph.node if node.name in nodes}
        weights = {name for node in originals.values() for name in node.input}
        there = {each.name for each in graph.initializer}
        graph.initializer.extend(
            each for each in self.model.graph.initializer if each.name in weights and each.name not in there
        )
        # the output of a layer has the name that it had; what made it becomes what made it before
        replace_all(graph.node, [originals.get(node.output[0], node) for node in graph.node])
        without_unused(graph)
        ONNXModel(model).topological_sort()  # the library's own graphs aren't always in an order
        return model

    def _dynamic(self, model: Any, products: Sequence[str]) -> Any:
        from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
        from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType

        more = {"MatMulConstBOnly": True}
        quantizer = ONNXQuantizer(
            model, True, self.reduced, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None,
            list(products), [], list(PRODUCTS), more,
        )  # fmt: skip
        return quantizer.quantize_model()

    def _static(self, model: Any, products: Sequence[str], method: Calibration) -> Any:
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType

        assert self.ranges is not None
        # what follows a product reads it as it is: its rounding would cost accuracy and save nothing
        more = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}
        quantizer = QDQQuantizer(
            model, True, self.reduced, QuantType.QInt8, QuantType.QUInt8, self.ranges.of(method),
            list(products), [], list(PRODUCTS), more,
        )  # fmt: skip
        return quantizer.quantize_model()


def without_unused(graph: Any) -> None:
    """Remove the nodes and constants that no output of a graph depends on."""
    makers = {name: node for node in graph.node for name in node.output}
    needed: set[str] = set()
    left = [each.name for each in graph.output]
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += makers[name].input if name in makers else []
    replace_all(graph.node, [node for node in graph.node if needed.intersection(node.output)])
    replace_all(graph.initializer, [each for each in graph.initializer if each.name in needed])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice to do what `engine.onnx` has done to the graph."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
