"""Preparation: text to store against `tokenizers` and `datasets` alone, memory and time of growing corpora, the loader.

    python -m benchmarks.prepare                                      minutes; text that ships with Python
    python -m benchmarks.prepare --text wiki.jsonl.xz books.jsonl.xz --sizes 10 30 100 1000
    python -m benchmarks.prepare --quick                              a look, no figure to quote

1. `zerobert prepare` with a given vocabulary, the whole command: the start of Python and of its workers, reading,
   sentences, word pieces, shards written. Peers run in turn with it, on the same text and the same two cores; of them
   only the work is timed, see `benchmarks.prepare_peers`. `ours is x` is the median over the rounds of our speed over
   that peer's; `MB/cpu_s` counts the processor time of whole programs, imports and reading included.
2. The same command on corpora of `--sizes`: `peak_MB` is the greatest sum of the resident memory of all its processes,
   looked at every 20 ms; pages that they share count more than once.
3. `training_batches` over the store of the largest corpus, sequences of 128 in micro-batches of 32, with and without
   loader processes, and the plan of an epoch. `host_ms` is processor time of the training process a micro-batch.

A corpus that is larger than the text holds it several times. In repetitions one word in 25, at least one a document,
has its letters shuffled: the rate at which Wikipedia still brings new words after 40 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.common import ROOT, emit, options, spread
from benchmarks.prepare_peers import names
from engine.data.text.corpus import CorpusConfig, list_sources, read_documents
from engine.data.tokenizer.wordpiece import train_wordpiece

MEGABYTE = 1_000_000
CORES = 2
OURS = "zerobert prepare"
VOCABULARY = 30522
#: megabytes from the start of the text that the vocabulary is learned from
LEARNED_FROM = 10
NEW_WORDS = 1 / 25
SAMPLING_SECONDS = 0.02
LENGTH, MICRO_BATCH, BATCHES = 128, 32, 600


@dataclass(frozen=True)
class Run:
    """One run of a program."""

    seconds: float
    cpu_seconds: float
    """processor time of all its processes, imports included"""
    peak_bytes: int
    printed: str


def altered(text: str, seed: str) -> str:
    """The text with some of its words shuffled."""
    generator, words = random.Random(seed), text.split(" ")
    for _ in range(max(1, int(len(words) * NEW_WORDS))):
        place = generator.randrange(len(words))
        words[place] = "".join(generator.sample(words[place], len(words[place])))
    return " ".join(words)


def endless(sources: Sequence[str]) -> Iterator[str]:
    """The documents of the text again and again, altered from the second time on."""
    config = CorpusConfig(source=list(sources))
    for repetition in count():
        for ordinal, text in enumerate(read_documents(config, list_sources(config))):
            yield altered(text, f"{repetition}:{ordinal}") if repetition else text


def write_corpus(sources: Sequence[str], megabytes: float, path: Path) -> float:
    """Write JSON lines with at least so much text; the megabytes of UTF-8 that they hold."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in endless(sources):
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= megabytes * MEGABYTE:
                return size / MEGABYTE
    raise AssertionError("the text is endless")


def learn_vocabulary(sources: Sequence[str], folder: Path, size: int) -> None:
    """A WordPiece vocabulary of the start of the text."""
    documents, size_so_far = [], 0
    for text in endless(sources):
        documents.append(text)
        size_so_far += len(text)
        if size_so_far >= LEARNED_FROM * MEGABYTE:
            break
    train_wordpiece(documents, folder, size)


def resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and all below it."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:  # one ended meanwhile
        return 0
    return total


def run(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a program to its end and watch it.

    Raises:
        RuntimeError: with what it printed, if it failed.
    """
    before = sum(os.times()[2:4])
    start, peak = time.perf_counter(), 0
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=pipe, stderr=errors, text=True
        ) as program,
    ):
        watched = psutil.Process(program.pid)
        while program.poll() is None:
            peak = max(peak, resident(watched))
            time.sleep(SAMPLING_SECONDS)
        seconds = time.perf_counter() - start
        assert program.stdout is not None
        printed = program.stdout.read()
        if program.returncode:
            errors.seek(0)
            raise RuntimeError(printed + errors.read())
    return Run(seconds, sum(os.times()[2:4]) - before, peak, printed)


def prepare(corpus: Path, tokenizer: Path, output: Path) -> Run:
    """Our command, into a new store."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["--source", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output)]
    return run([sys.executable, "-m", "launch", "prepare", "--workers", str(CORES), *arguments])


def peer(name: str, corpus: Path, tokenizer: Path) -> Run:
    """One of the peers; `seconds` are those of its work."""
    done = run([sys.executable, "-m", "benchmarks.prepare_peers", name, str(corpus), str(tokenizer)])
    for cache in corpus.parent.glob("cache-*"):
        shutil.rmtree(cache)
    seconds = json.loads(done.printed.splitlines()[-1])["seconds"]
    return Run(seconds, done.cpu_seconds, done.peak_bytes, "")


def compare(corpus: Path, megabytes: float, tokenizer: Path, output: Path, rounds: int) -> dict[str, Any]:
    """Ours and the peers in turn."""
    runs: dict[str, list[Run]] = {OURS: [], **{name: [] for name in names()}}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(prepare(corpus, tokenizer, output) if name == OURS else peer(name, corpus, tokenizer))
    return {"title": f"{megabytes:.0f} MB of text to word pieces, {CORES} cores", "rivals": rivals(runs, megabytes)}


def rivals(runs: dict[str, list[Run]], megabytes: float) -> dict[str, dict[str, float]]:
    """Speeds of all, and how many times each peer's ours is."""
    table: dict[str, dict[str, float]] = {}
    for name, found in runs.items():
        seconds = [one.seconds for one in found]
        table[name] = {
            "MB/s": megabytes / median(seconds),
            "spread": spread(seconds),
            "MB/cpu_s": megabytes / median(one.cpu_seconds for one in found),
            "peak_MB": max(one.peak_bytes for one in found) / MEGABYTE,
        }
        if name != OURS:
            ratios = [one.seconds / ours.seconds for one, ours in zip(found, runs[OURS], strict=True)]
            table[name] |= {"ours is x": median(ratios), "spread of x": spread(ratios)}
    return table


def growth(sources: Sequence[str], sizes: Sequence[float], tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Time and memory of corpora of several sizes; the last one's store stays in folder / "store"."""
    points = []
    for size in sizes:
        corpus = folder / "corpus.jsonl"
        megabytes = write_corpus(sources, size, corpus)
        done = prepare(corpus, tokenizer, folder / "store")
        point = {"x": megabytes, "seconds": done.seconds, "MB/s": megabytes / done.seconds}
        points.append({**point, "MB/cpu_s": megabytes / done.cpu_seconds, "peak_MB": done.peak_bytes / MEGABYTE})
        corpus.unlink()
    table = {f"{point['x']:.0f} MB": {name: value for name, value in point.items() if name != "x"} for point in points}
    return {"title": f"{OURS}: corpora of several sizes", "x": "MB of text", "points": points, "rivals": table}


def loader(store: Path, batches: int) -> dict[str, Any]:
    """Speed of the loader without a model."""
    import torch

    from engine.data.pretraining.source import PretrainingOptions, PretrainingSource, TokenFacts
    from engine.data.store.store import open_store

    torch.set_num_threads(1)
    opened = open_store(store)
    facts = TokenFacts.of(opened.tokenizer)
    table: dict[str, dict[str, float]] = {}
    for whole_word in (False, True):
        made = PretrainingOptions(LENGTH, 0.1, 0.15, whole_word, seed=1)
        source = PretrainingSource(opened.split("train"), facts, made)
        start = time.process_time()
        pairs = source.epoch_size(0)
        table["the plan of an epoch"] = {"ms a million pairs": (time.process_time() - start) / pairs * 1e9}
        for workers in range(3):
            name = f"{workers} loader processes" + (", whole words" if whole_word else "")
            table[name] = speed(source, workers, batches)
    return {"title": f"loader: sequences of {LENGTH}, micro-batches of {MICRO_BATCH}", "rivals": table}


def speed(source: Any, workers: int, batches: int) -> dict[str, float]:
    """Micro-batches of a rank as fast as they come."""
    from engine.data.loading.loader import BatchLayout, training_batches
    from engine.data.loading.source import Cursor

    stream = training_batches(source, BatchLayout(8 * MICRO_BATCH, MICRO_BATCH), Cursor(), workers)
    next(stream)
    start, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for batch in islice(stream, batches):
        tokens += len(batch.inputs["input_ids"])
    seconds, host = time.perf_counter() - start, time.process_time() - cpu
    stream.close()
    samples = batches * MICRO_BATCH
    return {"samples/s": samples / seconds, "tokens/s": tokens / seconds, "host_ms": host / batches * 1e3}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = options("The speed of preparation and of the loader.")
    parser.set_defaults(repeats=5)
    parser.add_argument("--text", nargs="+", default=["embedded"], help="sources, as `zerobert prepare` takes them")
    parser.add_argument("--sizes", nargs="+", type=float, default=[10, 30, 100], help="MB of the corpora")
    parser.add_argument("--peer-size", type=float, default=30, help="MB of the text of the comparison (default 30)")
    parser.add_argument("--quick", action="store_true", help="1 and 2 MB, one round")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.sizes, chosen.peer_size, chosen.repeats = [1.0, 2.0], 1.0, 1
    if min(*chosen.sizes, chosen.peer_size) <= 0:
        parser.error("--sizes, --peer-size: give more than 0 MB")
    if chosen.repeats < 1:
        parser.error("--repeats: give 1 or more")
    missing = [name for name in chosen.text if name != "embedded" and not Path(name).exists()]
    if missing:
        parser.error(f"--text: {missing[0]} does not exist")
    return chosen


def main() -> None:
    chosen = parse(sys.argv[1:])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, corpus = folder / "tokenizer", folder / "compared.jsonl"
        learn_vocabulary(chosen.text, tokenizer, VOCABULARY)
        megabytes = write_corpus(chosen.text, chosen.peer_size, corpus)
        rows = [compare(corpus, megabytes, tokenizer, folder / "store", chosen.repeats)]
        rows.append(growth(chosen.text, chosen.sizes, tokenizer, folder))
        rows.append(loader(folder / "store", BATCHES // 10 if chosen.quick else BATCHES))
    emit(rows, chosen.json)


if __name__ == "__main__":
    main()
