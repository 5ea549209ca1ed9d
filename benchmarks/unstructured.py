"""Whether anything here runs matrices faster because single weights are zeros (unstructured magnitude pruning).

    python -m benchmarks.unstructured

A feed-forward matrix of a model (3072 x 768 and 1536 x 384) times the states of 128 tokens, fp32, one thread: dense in
torch; of torch's sparse CSR, and BSR with blocks of 4 x 4 that are zeros together, at several shares of zeros; and in
ONNX Runtime with and without the zeros. All take turns. Times are processor time of this process, so that other
programs on the core don't count; a row has the median over the dense product of the same turn: below 1 is faster.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SHAPES, SHARES, TOKENS, ROUNDS = ((1536, 384), (3072, 768)), (0.5, 0.8, 0.9, 0.95), 128, 41


def main() -> None:
    """Print a row for each matrix and share of zeros."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for shape, share in ((shape, share) for shape in SHAPES for share in SHARES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        states = torch.randn(shape[1], TOKENS, generator=torch.Generator().manual_seed(2))
        single, blocks = pruned(weight, share, 1), pruned(weight, share, 4)
        csr, bsr = single.to_sparse_csr(), blocks.to_sparse_bsr((4, 4))
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda weight=weight, states=states: weight @ states,  # type: ignore[misc]
            "torch CSR": lambda csr=csr, states=states: csr @ states,  # type: ignore[misc]
            "torch BSR 4x4": lambda bsr=bsr, states=states: bsr @ states,  # type: ignore[misc]
            "onnxruntime, dense": graph(weight, states),
            "onnxruntime, zeros": graph(single, states),
        }
        print(json.dumps({"matrix": shape, "zeros": share} | measured(runs)), flush=True)


def pruned(weight: Tensor, share: float, block: int) -> Tensor:
    """The matrix with its smallest blocks, a share of all, as zeros."""
    rows, columns = weight.shape
    tiles = weight.view(rows // block, block, columns // block, block)
    sizes = tiles.abs().sum((1, 3), keepdim=True)
    kept = sizes > sizes.flatten().kthvalue(int(share * sizes.numel())).values
    return (tiles * kept).reshape(rows, columns)


def graph(weight: Tensor, states: Tensor) -> Callable[[], object]:
    """The product in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    shapes = {"states": list(states.shape), "product": [len(weight), states.shape[1]]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    node = helper.make_node("MatMul", ["weight", "states"], ["product"])
    constant = numpy_helper.from_array(weight.numpy(), "weight")
    body = helper.make_graph([node], "product", [values["states"]], [values["product"]], [constant])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {"states": np.ascontiguousarray(states.numpy())}
    return lambda: session.run(None, fed)


def measured(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of the first, and of the others the times of it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if number:
                times[name].append(time.process_time() - begun)
    first = next(iter(runs))
    ratios = {
        name: round(statistics.median(b / a for a, b in zip(times[first], own, strict=True)), 2)
        for name, own in times.items()
        if name != first
    }
    return {f"{first}_ms": round(1e3 * statistics.median(times[first]), 3)} | ratios


if __name__ == "__main__":
    main()
