"""What the processor at hand does with products of bytes, measured and not looked up."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from engine.onnx.module import open_session

#: a row of bytes times a column of them, long enough for every kernel's inner loop
ROWS, INNER, COLUMNS = 4, 128, 32


@cache
def saturates() -> bool:
    """Whether onnxruntime's sums of products of unsigned and signed bytes overflow here.

    Processors without VNNI (or the same of another name) add two such products in 16 bits, which two of 255 x 127
    exceed (onnxruntime #14642). Weights of 7 bits never do.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((INNER, COLUMNS), 127, np.int8), "weights")
    node = helper.make_node("MatMulInteger", ["bytes", "weights"], ["sums"])
    given = helper.make_tensor_value_info("bytes", TensorProto.UINT8, [ROWS, INNER])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [ROWS, COLUMNS])
    graph = helper.make_graph([node], "probe", [given], [sums], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (found,) = open_session(model.SerializeToString(), torch.device("cpu"), 1).run(
        None, {"bytes": np.full((ROWS, INNER), 255, np.uint8)}
    )
    return bool((found != INNER * 255 * 127).any())


def processor() -> str:
    """The processor's name, as Linux tells it, and those of its instructions that matter to int8."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in told.items()}
    flags = set(facts.get("flags", "").split())
    known = [name for name in ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8") if name in flags]
    return f"{facts.get('model name', 'unknown processor')} ({', '.join(known) or 'no AVX2'})"
