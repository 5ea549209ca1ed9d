"""int8 against fp32 in onnxruntime: speed of two shapes, and what fine-tuned models lose.

    python -m benchmarks.quantise [--threads 1] [--repeats 9] [--runs runs/sst2 runs/mrpc]

Speed is that of graphs of random weights, MiniLM-L6's shape (width 384) and BERT-base's (768), at batches of 1 and 32
sequences of 32 and 128 tokens, fp32 and int8 (dynamic, and static by ranges of a few samples) in turn. Wall clock;
`processor` is the ratio of the processor's time, which other programs disturb less. The goals are those that published
lists reach on processors with VNNI; the title says whether this one has it.

`--runs` are fine-tuned runs with examples of a test: each goes through `zerobert quantise` as it is, and the table
tells its metric before and after with the interval of the difference, and its bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import add_unjudged, finish, goal, options, spread
from engine.compress.quantise.calibrate import Ranges
from engine.compress.quantise.convert import Converter
from engine.compress.quantise.graph import Feed, layers_of, prepared, session_of
from engine.compress.quantise.machine import processor, saturates
from engine.model.folder import INT8_REPORT
from engine.onnx.graph import to_onnx

#: layers, heads and the least times that int8 is as fast, by width
SHAPES = {384: (6, 12, 1.8), 768: (12, 12, 2.2)}
BATCHES, LENGTHS = (1, 32), (32, 128)
WORDS = 30_522


def graph_of(width: int, folder: Path) -> Any:
    """A classifier of BERT's with random weights, as a graph that can be quantised."""
    import onnx
    from transformers import BertConfig, BertForSequenceClassification

    layers, heads, _ = SHAPES[width]
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    onnx.save(to_onnx(BertForSequenceClassification(config), "sequence_classification"), folder / "model.onnx")
    return prepared(folder / "model.onnx")


def feed(batch: int, length: int, seed: int = 0) -> Feed:
    """Random ids, nothing padded."""
    ids = np.random.default_rng(seed).integers(1000, WORDS, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def in_turn(sessions: Mapping[str, Any], given: Feed, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall-clock and processor seconds of each run, after one that doesn't count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for count in range(repeats + 1):
        for name, session in sessions.items():
            wall, own = time.perf_counter(), time.process_time()
            session.run(None, given)
            if count:
                found[name].append((time.perf_counter() - wall, time.process_time() - own))
    return found


def speed(width: int, threads: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and length."""
    with tempfile.TemporaryDirectory() as folder:
        model = graph_of(width, Path(folder))
    layers = layers_of(model)
    samples = [feed(1, 48, seed) for seed in range(8)]
    converter = Converter(model, layers, saturates(), Ranges(model, layers, samples, threads))
    models = {"fp32": model, "dynamic": converter.whole("dynamic"), "static": converter.whole("minmax")}
    sessions = {name: session_of(each, threads) for name, each in models.items()}
    sizes = {name: len(each.SerializeToString()) / 1e6 for name, each in models.items()}
    rows = []
    for batch, length in product(given.batches, given.lengths):
        times = in_turn(sessions, feed(batch, length), given.repeats * (4 if batch == 1 else 1))
        rivals = {}
        for name, runs in times.items():
            walls, owns = zip(*runs, strict=True)
            ratios = [before / own for (_, before), own in zip(times["fp32"], owns, strict=True)]
            rivals[name] = {
                "p50_ms": 1e3 * statistics.median(walls), "p95_ms": 1e3 * float(np.quantile(walls, 0.95)),
                "spread": spread(walls), "times_as_fast": statistics.median(w for w, _ in times["fp32"])
                / statistics.median(walls), "processor": statistics.median(ratios), "MB": sizes[name],
            }  # fmt: skip
        best = max(rivals[name]["processor"] for name in ("dynamic", "static"))
        figure = f"int8 over fp32, width {width}, {batch} x {length} tokens, by the processor's time,"
        rows.append(
            {
                "title": f"width {width}, batch {batch}, {length} tokens, {threads} thread(s); {machine_told()}",
                "rivals": rivals,
                "goals": [goal(figure, best, at_least=SHAPES[width][2], judged=not given.unjudged)],
            }
        )
    return rows


def machine_told() -> str:
    """The processor, and whether it multiplies bytes without overflow."""
    return f"{processor()}, {'no VNNI: weights of 7 bits' if saturates() else 'bytes add up exactly'}"


def accuracy(run: Path, threads: int, judged: bool) -> dict[str, Any]:
    """What `zerobert quantise` makes of a run."""
    from launch.__main__ import dispatch

    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "int8"
        dispatch(["quantise", str(run), f"--output={folder}", f"--threads={threads}"])
        told = json.loads((folder / INT8_REPORT).read_text(encoding="utf-8"))
    low, high = (100 * end for end in told["change"]["interval_95"])
    row = {
        "before": told["before"]["value"], "after": told["after"]["value"], "points": 100 * told["change"]["value"],
        "low": low, "high": high, "examples": told["examples"], "activations": told["activations"],
        "float_layers": len(told["float_layers"]), "MB_fp32": told["bytes"]["fp32"] / 1e6,
        "MB_int8": told["bytes"]["int8"] / 1e6,
    }  # fmt: skip
    lost = goal(f"{told['metric']} lost by {run.name}, points", -row["points"], at_most=1.0, judged=judged)
    return {"title": f"{run.name}: {told['metric']}", "rivals": {run.name: row}, "goals": [lost]}


def main() -> int:
    """Measure, and print the tables; 1 if a goal is missed."""
    parser = options(__doc__ or "")
    parser.set_defaults(threads=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sequences of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="fine-tuned runs to quantise")
    add_unjudged(parser)
    given = parser.parse_args()
    if given.repeats < 5:
        parser.error("--repeats: give at least 5")
    rows = [row for width in given.widths for threads in given.threads
            for row in speed(width, threads, given)]  # fmt: skip
    rows += [accuracy(run, given.threads[0], not given.unjudged) for run in given.runs]
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
