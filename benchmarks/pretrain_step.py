"""Pre-training steps against transformers' Trainer with BertForPreTraining: tokens a second, memory, share of the peak.

    python -m benchmarks.pretrain_step --peer-python PEER/bin/python [--data STORE] [--sizes mini small medium base]
    python -m benchmarks.pretrain_step --architecture modernbert --lengths 128 1024 4096 --sizes mini base [...]

Both train MLM + NSP in bf16 on the same 128-token samples, with the same vocabulary, dropout, clipping, AdamW and
threads: zerobert by `launch/train.py` (bf16 weights, fp32 copies in the optimizer; its loader makes the samples), the
rival by Trainer (autocast over fp32 weights, as `bf16=True` means, torch's fused AdamW, samples made beforehand and
padded, a loader process). Of the rival's variants and batches, tried for a few steps, the fastest is taken; memory is
compared with that of its leanest trial at our batch.

With `--architecture modernbert` both train MLM alone at a rate of 30 %, without dropout: ours on samples of exactly the
length, in which documents lie end to end; the rival, ModernBertForMaskedLM (sdpa, with its sparse prediction and
without), on the same pieces of documents, one a row, padded to the longest of their batch.

Runs alternate. A step's time is the median distance of the lines that a run prints, clocked from outside, after those
in which it compiles or warms up. Tokens count without padding. Memory is the largest sum over a run's processes of
what isn't mapped from files. The GEMM peak is measured between the runs, so its share moves with the machine's load.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.kernels_in_training import prepare
from benchmarks.pretrain_peer import Job, command
from benchmarks.pretrain_samples import LENGTH, MODERNBERT_RATE, SAMPLES, make_pieces, make_samples
from benchmarks.startup import end_session

#: what each size is held to: times the rival's tokens/s, share of the GEMM peak, share of the rival's memory
Bounds = tuple[float | None, float | None, float | None]
GOALS: dict[str, Bounds] = {
    "mini": (4.0, 0.60, 0.6),
    "small": (2.5, None, None),
    "medium": (1.8, None, None),
    "base": (1.4, 0.75, 0.8),
}
GOALS_OF: dict[str, dict[str, Bounds]] = {
    "bert": GOALS,
    "modernbert": {"mini": (3.0, None, None), "base": (1.8, None, None)},
}
#: tokens of a step of ModernBERT
MODERNBERT_TOKENS = 8192
MICRO_BATCH = {"tiny": 64, "mini": 64, "small": 32, "medium": 32, "base": 32}
#: batches that the rival tries beside ours
RIVAL_BATCHES = (8, 32)
VARIANTS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compiled": True}}
#: of ModernBERT each with its sparse prediction too
VARIANTS_OF = {
    "bert": VARIANTS,
    "modernbert": VARIANTS | {f"{name}, sparse": {**more, "masked_head": True} for name, more in VARIANTS.items()},
}
POLL_S = 1.0


@dataclass(frozen=True)
class Run:
    """One run as seen from outside."""

    times: list[float]
    """when each step ended, seconds"""
    peak_bytes: int
    printed: list[str]

    def step_s(self, unmeasured: int) -> float:
        """Median seconds of a step after the unmeasured ones."""
        return statistics.median(last - first for first, last in pairwise(self.times[unmeasured:]))


def proportional_bytes(session: int) -> int:
    """Memory of all processes of a session, shared pages by their share; without pages of mapped files, which the
    kernel takes back when it needs them."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if os.getsid(int(folder.name)) == session:
                found = re.findall(
                    r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE
                )
                total += sum(map(int, found)) * 1024
        except (OSError, ProcessLookupError):
            continue
    return total


def observe(arguments: list[str], threads: int, undisturbed: range = range(0)) -> Run:
    """Run a command, and note when it prints "step N" and the most memory that it takes.

    Args:
        undisturbed: how many steps are done while memory isn't looked at, which takes a core for tens of milliseconds.

    Raises:
        RuntimeError: it fails; with the end of what it printed.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    peaks, over = [0], threading.Event()
    times: list[float] = []
    printed: list[str] = []

    def watch() -> None:
        while not over.wait(POLL_S):
            if len(times) not in undisturbed:
                peaks.append(proportional_bytes(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for line in process.stdout or ():
            printed.append(line)
            if re.match(r"step (\d+)", line):
                times.append(time.perf_counter())
        code = process.wait()
    finally:
        over.set()
        end_session(process)
        watcher.join()
    if code:
        raise RuntimeError(f"exit code {code}\n" + "".join(printed[-20:]))
    return Run(times, max(peaks), printed)


def zerobert(size: str, job: Job, store: Path, output: Path, more: list[str]) -> list[str]:
    """The command of our run."""
    pairs = ["--data.short_sequence_probability=0"]
    alone = [
        "--model.architecture=modernbert", f"--model.max_positions={max(512, job.length)}", "--data.objective=mlm",
        f"--data.mask_probability={MODERNBERT_RATE}",
    ]  # fmt: skip
    objective = pairs if job.architecture == "bert" else alone
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--model.size={size}", f"--data.path={store}",
        f"--output={output}", f"--data.sequence_length={job.length}", *objective,
        f"--data.workers={job.workers}", f"--train.global_batch={job.batch}", f"--train.micro_batch={job.batch}",
        f"--train.steps={job.steps}", f"--train.threads={job.threads}", f"--train.precision={job.precision}",
        "--train.zero_stage=0", "--train.log_interval=1", "--train.eval_samples=32", "--train.save_interval=null",
        f"--optim.learning_rate={job.learning_rate}", "--train.verify_update=0", "--monitor.tensorboard=false", *more,
    ]  # fmt: skip


def gemm_peak(threads: int, precision: str) -> float:
    """FLOP/s of the fastest product now."""
    import torch

    from engine.kernels.gemm import measure_peak
    from engine.precision import DTYPES

    torch.set_num_threads(threads)
    return measure_peak(DTYPES[precision], torch.device("cpu")).flops


def rival_batches(job: Job, given: argparse.Namespace) -> list[int]:
    """What the rival tries; ModernBERT's batches are of as many tokens as ours, and of a quarter."""
    if given.same_batch:
        return [job.batch]
    more = RIVAL_BATCHES if job.architecture == "bert" else (max(1, job.batch // 4),)
    return sorted({*more, job.batch})


def fastest_variant(job: Job, given: argparse.Namespace) -> tuple[str, int, dict[str, float], float]:
    """The rival's variant and batch with the highest throughput in a short run, samples/s of all tried, and the bytes
    of the leanest at our batch."""
    rates: dict[tuple[str, int], float] = {}
    peaks = []
    for batch in rival_batches(job, given):
        for name, more in VARIANTS_OF[job.architecture].items():
            short = replace(job, steps=given.variant_steps, batch=batch, **more)
            try:
                run = observe(command(given.peer_python, short), job.threads)
                rates[name, batch] = batch / run.step_s(given.variant_steps // 2)
                peaks += [run.peak_bytes] if batch == job.batch else []
            except RuntimeError as error:
                print(f"left out: {name}, batch {batch}: {str(error).splitlines()[-1]}", file=sys.stderr)
    if not rates:
        raise RuntimeError("no variant of transformers' Trainer runs; see above")
    name, batch = max(rates, key=lambda key: rates[key])
    tried = {f"{name}, batch {batch}": rate for (name, batch), rate in rates.items()}
    return name, batch, tried, min(peaks, default=0)


@dataclass(frozen=True)
class Work:
    """What both are given of one size and length."""

    ours: Job
    rival: Job
    """with the batch that corresponds to ours"""
    tokens: tuple[float, float]
    """of one of our samples, and of one of the rival's"""
    flops: float
    """that training on a token needs"""


def work(size: str, length: int, given: argparse.Namespace, samples: Path) -> Work:
    """Write the rival's samples; see `Work`."""
    from engine.config import ARCHITECTURES, ModelConfig
    from engine.data.store.store import open_store
    from engine.model.flops import training_flops

    model = ModelConfig(size=size, architecture=given.architecture)
    vocabulary = open_store(given.data).tokenizer.vocab_size
    shape = ARCHITECTURES.get(given.architecture).shape(model, vocabulary)
    if given.architecture == "bert":
        batch, rows = given.batch or MICRO_BATCH[size], 0
        tokens, masked = make_samples(given.data, SAMPLES, samples, length=length)
        flops, held = training_flops(shape, [round(tokens)], masked) / tokens, (tokens, tokens)
    else:
        pieces = make_pieces(given.data, samples, length)
        total, batch = sum(pieces), given.batch or max(1, MODERNBERT_TOKENS // length)
        flops = training_flops(replace(shape, pooler=False), pieces, MODERNBERT_RATE * total) / total
        held = float(length), total / len(pieces)
        rows = max(1, round(batch * held[0] / held[1]))
    job = Job(
        str(samples), *model.dimensions(), vocabulary, batch, given.steps, given.threads[-1],
        architecture=given.architecture, length=length, precision=given.precision,
    )  # fmt: skip
    return Work(job, replace(job, batch=rows or batch), held, flops)


def compare(size: str, length: int, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Alternate runs of both at one size and length."""
    both = work(size, length, given, scratch / "samples.npz")
    job = both.ours
    variant, peer_batch, tried, same_batch_bytes = fastest_variant(both.rival, given)
    rival = replace(job, batch=peer_batch, **VARIANTS_OF[job.architecture][variant])
    rates: dict[str, list[float]] = {"zerobert": [], "Trainer": []}
    memory: dict[str, list[float]] = {name: [] for name in rates}
    shares = []
    measured = range(given.unmeasured, given.steps)
    for index in range(given.repeats):
        before = gemm_peak(job.threads, job.precision)
        output = scratch / f"{size}-{length}-{index}"
        ours = observe(zerobert(size, job, given.data, output, given.zerobert), job.threads, measured)
        peak = statistics.mean((before, gemm_peak(job.threads, job.precision)))
        theirs = observe(command(given.peer_python, rival), job.threads, measured)
        steps = (("zerobert", ours, job), ("Trainer", theirs, rival))
        for (name, run, own), tokens in zip(steps, both.tokens, strict=True):
            rates[name].append(own.batch * tokens / run.step_s(given.unmeasured))
            memory[name].append(run.peak_bytes / 1e6)
        shares.append(rates["zerobert"][-1] * both.flops / peak)
    table = row(size, rates, memory, shares, f"{variant}, batch {peer_batch}", tried, job)
    if same_batch_bytes:
        table["rivals"]["ratio"]["memory"] = max(memory["zerobert"]) * 1e6 / same_batch_bytes
        table["rivals"]["Trainer"]["MB at our batch"] = same_batch_bytes / 1e6
    return table | {
        "goals": goals(size, table["rivals"], judged=not given.unjudged, held_to=GOALS_OF[given.architecture])
    }


def goals(
    size: str, table: dict[str, dict[str, Any]], judged: bool, held_to: Mapping[str, Bounds] = GOALS
) -> list[dict[str, Any]]:
    """What the figures of a size are held to."""
    ratio, share, memory = held_to.get(size, (None, None, None))
    found = []
    if ratio is not None:
        found.append(goal("tokens/s, times the rival's", table["ratio"]["tokens/s"], at_least=ratio, judged=judged))
    if share is not None:
        peak = table["zerobert"]["share of GEMM peak"]
        found.append(goal("share of the GEMM peak", peak, at_least=share, judged=judged))
    if memory is not None:
        own = table["ratio"].get("memory")
        found.append(goal("memory, times the rival's at our batch", own, at_most=memory, judged=judged))
    return found


def row(
    size: str,
    rates: dict[str, list[float]],
    memory: dict[str, list[float]],
    shares: list[float],
    variant: str,
    tried: dict[str, float],
    job: Job,
) -> dict[str, Any]:
    """The table of a size."""
    found: dict[str, dict[str, Any]] = {
        name: {"tokens/s": statistics.median(rates[name]), "spread": spread(rates[name]), "MB": max(memory[name])}
        for name in rates
    }
    found["zerobert"]["share of GEMM peak"] = statistics.median(shares)
    found["Trainer"]["variant"] = variant
    ratios = [a / b for a, b in zip(rates["zerobert"], rates["Trainer"], strict=True)]
    found["ratio"] = {
        "tokens/s": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    found["Trainer's variants, samples/s"] = dict(tried)
    name = size if job.architecture == "bert" else f"{job.architecture}-{size}"
    title = f"{name}, {job.precision}, batch {job.batch} x {job.length}, {job.threads} thread(s)"
    return {
        "title": f"{title}, vocabulary {job.vocabulary}, {len(ratios)} runs of {job.steps} steps each",
        "rivals": found,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, help="a prepared store (default: the embedded corpus)")
    add("--sizes", nargs="+", default=["mini", "small", "medium", "base"], choices=list(MICRO_BATCH))
    add("--architecture", default="bert", choices=list(VARIANTS_OF))
    add("--lengths", type=int, nargs="+", default=[LENGTH], help="tokens of a sequence")
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="of both")
    add("--peer-python", default=sys.executable, help="interpreter with transformers and accelerate")
    add("--repeats", type=int, default=3, help="alternating runs of each")
    add("--steps", type=int, default=30, help="steps of a run")
    add("--unmeasured", type=int, default=10, help="steps at a run's start that don't count")
    add("--variant-steps", type=int, default=12, help="steps of the rival's trials")
    add("--same-batch", action="store_true", help="let the rival try our batch only")
    add("--batch", type=int, help="sequences of a step (default by size)")
    add("--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], help="CPU threads, the last counts")
    add("--zerobert", nargs="*", default=[], help="further options of launch/train.py")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args()
    if given.variant_steps < 3 or given.steps < given.unmeasured + 2:
        parser.error("a step's time takes two lines: give --variant-steps 3 or more, --steps 2 more than --unmeasured")
    return given


def main() -> int:
    given = parse()
    imports = [given.peer_python, "-c", "import accelerate, transformers"]
    if subprocess.run(imports, capture_output=True).returncode:
        sys.exit(f"skipped: {given.peer_python} lacks transformers' Trainer: pip install accelerate, or --peer-python")
    with tempfile.TemporaryDirectory() as folder:
        given.data = given.data or prepare(Path(folder))
        pairs = product(given.sizes, given.lengths)
        return finish([compare(size, length, given, Path(folder)) for size, length in pairs], given.json)


if __name__ == "__main__":
    sys.exit(main())
