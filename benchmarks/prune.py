"""The front of accuracy against measured speed: pruning without training, and gradual pruning while fine-tuning.

    python -m benchmarks.prune --run runs/sst2 --output build/prune               speeds 1.5, 2 and 3 without training
    python -m benchmarks.prune --run runs/sst2 --gradual runs/gradual-* --output build/prune

`--run` is a fine-tuned model's run. `--gradual` are runs of the same task with the section `prune` (heads, neurons).
Each model is scored on the run's test examples, or its validation ones, and timed in ONNX Runtime (fp32, one thread,
batch 1, 128 tokens) after its zeros are taken out. All models take turns, and medians of processor time count. The
table has the published trade of nn_pruning (SQuAD, GPU) and CoFi (MNLI, GPU) beside: other tasks, models and machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import machine, spread
from engine.compress.folder import Source, open_source
from engine.compress.prune.latency import Load, prepared
from engine.compress.prune.prune import Options, examine, prune
from engine.compress.prune.target import parse_target
from engine.compress.score import change, score
from engine.config import architecture_of
from engine.model.pruning.slim import slim
from engine.tasks.finetune import FineTuning
from launch.scored import scored_task

ROUNDS = 41
LOAD = Load(batch=1, length=128, threads=1, runtime="onnx")
PUBLISHED = {
    "nn_pruning, BERT-base, SQuAD F1": {"1.84x": "+0.22", "2.44x": "-0.79"},
    "CoFi, BERT-base, MNLI": {"2.1x": "85.3 of 84.8", "12.1x": "80.6 of 84.8"},
}


def main() -> None:
    """Print a row a model as JSON, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--gradual", type=Path, nargs="*", default=[])
    parser.add_argument("--speeds", type=float, nargs="*", default=[1.5, 2.0, 3.0])
    parser.add_argument("--tunes", nargs="*", default=["matrix"], help="matrix, mask, none")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(str(given.run))
    task = scored_task(str(given.run), source, None)
    whole = source.load()
    models: dict[str, nn.Module] = {"whole": whole}
    evidence = None
    for speed, tune in product(given.speeds, given.tunes):
        options = Options(parse_target(f"speed {speed:g}x"), given.samples, tune, load=LOAD)
        evidence = evidence or examine(task, whole, options)
        found = prune(task, whole, options, evidence)
        models[f"{speed:g}x, {tune}"] = found.model
        print(json.dumps({"model": f"{speed:g}x, {tune}", "kept": found.lines()}), flush=True)
    for run in given.gradual:
        models[run.name] = open_source(str(run)).load()
    rows = table(task, source, models)
    given.output.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine(), "rows": rows, "published": PUBLISHED}
    (given.output / "prune.json").write_text(json.dumps(told, indent=1) + "\n")


def table(task: FineTuning, source: Source, models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Score and time of each model, the first being the whole one."""
    scores = {name: score(task, model) for name, model in models.items()}
    sessions = {name: session(source, model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(ROUNDS):
        for name, run in sessions.items():
            begun = time.process_time()
            run()
            if number:
                times[name].append(1e3 * (time.process_time() - begun))
    first = next(iter(models))
    rows = []
    for name in models:
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        found = change(scores[first], scores[name])
        row = {
            "model": name, scores[name].metric: round(scores[name].value, 4), "change": round(found.value, 4),
            "low": round(found.low, 4), "high": round(found.high, 4), "speed": round(statistics.median(ratios), 2),
            "ms": round(statistics.median(times[name]), 2), "spread": round(spread(times[name]), 3),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def session(source: Source, model: nn.Module) -> Callable[[], object]:
    """The model, as transformers has it and without zeros, in ONNX Runtime."""
    config: Any = model.config
    architecture = architecture_of(config)
    theirs = architecture.export_class(architecture.class_for(source.head))(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    return prepared(slim(theirs), source.head, LOAD)


if __name__ == "__main__":
    main()
