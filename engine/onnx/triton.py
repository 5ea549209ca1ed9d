"""A graph as a model of Triton's repository: config.pbtxt beside the folder of its first version.

Triton puts requests of one batch together where they have the same length (dynamic batching), so clients pad.
The format: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.durable import write_durably

CONFIG = "config.pbtxt"
#: the graph of the first version
GRAPH = "1/model.onnx"
#: requests that are computed together at most, and how long the first of them waits for others
BATCH, WAIT_US = 64, 500


def write_triton(folder: Path, proto: Any) -> None:
    """Write config.pbtxt for a graph, whose first dimension is the batch."""
    write_durably(folder / CONFIG, triton_config(proto).encode())


def triton_config(proto: Any) -> str:
    """The content of config.pbtxt; the model has the name of its folder, which Triton takes where none is given."""
    inputs = ",\n".join(_value(each) for each in proto.graph.input)
    outputs = ",\n".join(_value(each) for each in proto.graph.output)
    return (
        'backend: "onnxruntime"\n'
        f"max_batch_size: {BATCH}\n"
        f"input [\n{inputs}\n]\n"
        f"output [\n{outputs}\n]\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {WAIT_US} }}\n"
    )


def _value(value: Any) -> str:
    """An input or output, without the batch; -1 of any size."""
    kind = {1: "TYPE_FP32", 7: "TYPE_INT64"}[value.type.tensor_type.elem_type]
    sizes = [size.dim_value or -1 for size in value.type.tensor_type.shape.dim[1:]]
    return f'  {{ name: "{value.name}" data_type: {kind} dims: [ {", ".join(map(str, sizes))} ] }}'
