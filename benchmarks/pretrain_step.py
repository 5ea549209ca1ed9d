"""Pre-training steps against transformers' Trainer with BertForPreTraining: tokens a second, memory, share of the peak.

    python -m benchmarks.pretrain_step --peer-python PEER/bin/python [--data STORE] [--sizes mini small medium base]

Both train MLM + NSP in bf16 on the same 128-token samples, with the same vocabulary, dropout, clipping, AdamW and
threads: zerobert by `launch/train.py` (bf16 weights, fp32 copies in the optimizer; its loader makes the samples), the
rival by Trainer (autocast over fp32 weights, as `bf16=True` means, torch's fused AdamW, samples made beforehand and
padded, a loader process). Of the rival's variants and batches, tried for a few steps, the fastest is taken; memory is
compared with that of its leanest trial at our batch.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.kernels_in_training import prepare
from benchmarks.pretrain_peer import Job, command
from benchmarks.startup import end_session

#: what each size is held to: times the rival's tokens/s, share of the GEMM peak, share of the rival's memory
GOALS = {"mini": (4.0, 0.60, 0.6), "small": (2.5, None, None), "medium": (1.8, None, None), "base": (1.4, 0.75, 0.8)}
MICRO_BATCH = {"tiny": 64, "mini": 64, "small": 32, "medium": 32, "base": 32}
#: batches that the rival tries beside ours
RIVAL_BATCHES = (8, 32)
VARIANTS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compiled": True}}
LENGTH = 128
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
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--model.size={size}", f"--data.path={store}",
        f"--output={output}", f"--data.sequence_length={LENGTH}", "--data.short_sequence_probability=0",
        f"--data.workers={job.workers}", f"--train.global_batch={job.batch}", f"--train.micro_batch={job.batch}",
        f"--train.steps={job.steps}", f"--train.threads={job.threads}", "--train.precision=bf16",
        "--train.zero_stage=0", "--train.log_interval=1", "--train.eval_samples=32", "--train.save_interval=null",
        f"--optim.learning_rate={job.learning_rate}", "--train.verify_update=0", "--monitor.tensorboard=false", *more,
    ]  # fmt: skip


def make_samples(
    store: Path, count: int, path: Path, split: str = "train", seed: int = 1, length: int = LENGTH
) -> tuple[float, float]:
    """Write padded samples of a split of a store for the rival, the first `count` at most; mean tokens and masked
    tokens of one."""
    from engine.config import DataConfig, RunConfig
    from engine.tasks.pretrain import Pretraining

    data = DataConfig(path=str(store), sequence_length=length, short_sequence_probability=0.0)
    task = Pretraining(RunConfig(data=data, seed=seed))
    source = task.train_source() if split == "train" else task.evaluation_source(split)
    assert source is not None, "no text was held out"
    count = min(count, source.epoch_size(0))
    inputs = source.collate(source.describe(0, np.arange(count)))
    lengths, ids = inputs["lengths"].numpy(), inputs["input_ids"].numpy()
    filled = np.arange(length) < lengths[:, None]
    arrays = {name: np.zeros((count, length), np.int32) for name in ("input_ids", "token_type_ids", "attention_mask")}
    arrays["input_ids"][filled] = ids
    arrays["token_type_ids"][filled] = inputs["token_type_ids"].numpy()
    arrays["attention_mask"][filled] = 1
    labels = np.full(len(ids), -100, np.int32)
    labels[inputs["mlm_positions"].numpy()] = inputs["mlm_labels"].numpy()
    arrays["labels"] = np.full((count, length), -100, np.int32)
    arrays["labels"][filled] = labels
    arrays["next_sentence_label"] = inputs["nsp_labels"].numpy()
    np.savez(path, **arrays)
    return float(lengths.mean()), len(inputs["mlm_positions"]) / count


def gemm_peak(threads: int) -> float:
    """FLOP/s of the fastest bf16 product now."""
    import torch

    from engine.kernels.gemm import measure_peak

    torch.set_num_threads(threads)
    return measure_peak(torch.bfloat16, torch.device("cpu")).flops


def fastest_variant(job: Job, given: argparse.Namespace) -> tuple[str, int, dict[str, float], float]:
    """The rival's variant and batch with the highest throughput in a short run, samples/s of all tried, and the bytes
    of the leanest at our batch."""
    rates: dict[tuple[str, int], float] = {}
    peaks = []
    for batch in sorted({job.batch} if given.same_batch else {*RIVAL_BATCHES, job.batch}):
        for name, more in VARIANTS.items():
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


def flops_of_a_sample(job: Job, tokens: float, masked: float) -> float:
    """FLOPs that training on a sample of `tokens` tokens, `masked` of them masked, needs."""
    from engine.config import Shape
    from engine.model.flops import training_flops

    shape = Shape(job.hidden, job.layers, job.heads, job.intermediate, job.vocabulary)
    return training_flops(shape, [round(tokens)], masked)


def compare(size: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Alternate runs of both at one size."""
    from engine.config import ModelConfig
    from engine.data.store.store import open_store

    hidden, layers, heads, intermediate = ModelConfig(size=size).dimensions()
    batch = given.batch or MICRO_BATCH[size]
    samples = scratch / "samples.npz"
    tokens, masked = make_samples(given.data, 2048, samples)
    vocabulary = open_store(given.data).tokenizer.vocab_size
    job = Job(str(samples), hidden, layers, heads, intermediate, vocabulary, batch, given.steps, given.threads[-1])
    variant, peer_batch, tried, same_batch_bytes = fastest_variant(job, given)
    rival = replace(job, batch=peer_batch, **VARIANTS[variant])
    rates: dict[str, list[float]] = {"zerobert": [], "Trainer": []}
    memory: dict[str, list[float]] = {name: [] for name in rates}
    shares = []
    measured = range(given.unmeasured, given.steps)
    for index in range(given.repeats):
        before = gemm_peak(job.threads)
        output = scratch / f"{size}-{index}"
        ours = observe(zerobert(size, job, given.data, output, given.zerobert), job.threads, measured)
        peak = statistics.mean((before, gemm_peak(job.threads)))
        theirs = observe(command(given.peer_python, rival), job.threads, measured)
        for name, run, own in (("zerobert", ours, job), ("Trainer", theirs, rival)):
            rates[name].append(own.batch * tokens / run.step_s(given.unmeasured))
            memory[name].append(run.peak_bytes / 1e6)
        shares.append(rates["zerobert"][-1] / tokens * flops_of_a_sample(job, tokens, masked) / peak)
    table = row(size, rates, memory, shares, f"{variant}, batch {peer_batch}", tried, job)
    if same_batch_bytes:
        table["rivals"]["ratio"]["memory"] = max(memory["zerobert"]) * 1e6 / same_batch_bytes
        table["rivals"]["Trainer"]["MB at our batch"] = same_batch_bytes / 1e6
    return table | {"goals": goals(size, table["rivals"], judged=not given.unjudged)}


def goals(size: str, table: dict[str, dict[str, Any]], judged: bool) -> list[dict[str, Any]]:
    """What the figures of a size are held to."""
    ratio, share, memory = GOALS.get(size, (None, None, None))
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
    title = f"{size}, bf16, batch {job.batch} x {LENGTH}, {job.threads} thread(s), vocabulary {job.vocabulary}"
    return {"title": f"{title}, {len(ratios)} runs of {job.steps} steps each", "rivals": found}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, help="a prepared store (default: the embedded corpus)")
    add("--sizes", nargs="+", default=["mini", "small", "medium", "base"], choices=list(MICRO_BATCH))
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
    return parser.parse_args()


def main() -> int:
    given = parse()
    imports = [given.peer_python, "-c", "import accelerate, transformers"]
    if subprocess.run(imports, capture_output=True).returncode:
        sys.exit(f"skipped: {given.peer_python} lacks transformers' Trainer: pip install accelerate, or --peer-python")
    with tempfile.TemporaryDirectory() as folder:
        given.data = given.data or prepare(Path(folder))
        return finish([compare(size, given, Path(folder)) for size in given.sizes], given.json)


if __name__ == "__main__":
    sys.exit(main())
