"""Steps of transformers' Trainer with BertForPreTraining, on the same device, samples and batch as ours.

The peer is that of `benchmarks.pretrain_step`: bf16 autocast, torch's fused AdamW, clipping, default dropout, padded
samples that are made beforehand. It also runs with its MLM head on masked tokens alone, as ours has it, and compiled.
Steps are clocked from outside by the lines that a run prints.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.all import last_line
from benchmarks.common import ROOT
from benchmarks.pretrain_peer import Job
from benchmarks.pretrain_peer import command as peer_command
from benchmarks.pretrain_samples import make_samples
from benchmarks.proof import materials
from benchmarks.proof.runs import command as our_command
from benchmarks.proof.runs import environment
from benchmarks.proof.speed import Case
from benchmarks.proof.stage import Report, Setting, SkippedError
from engine.data.store.store import open_store

OURS = "ours"
FULL = Case("base", 128, 128, steps=60, every=10)
TOY = Case("tiny", 32, 8, steps=12, every=3, toy=True)
#: steps at a run's start that don't count, in which allocations and compilation happen
UNMEASURED = 20
SAMPLES = 2048


def clocked(arguments: Sequence[str], device: str, unmeasured: int) -> dict[str, Any]:
    """Run a command; seconds of a step after the unmeasured ones, and the memory that it prints."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    marks: list[tuple[int, float]] = []
    printed: list[str] = []
    for line in process.stdout or ():
        printed.append(line)
        if match := re.match(r"step (\d+)", line):
            marks.append((int(match[1]), time.perf_counter()))
    if code := process.wait():
        print("".join(printed[-15:]), flush=True)
        return {"failed": f"exit code {code}: {last_line(''.join(printed))}"}
    found: dict[str, Any] = {"step ms": 1e3 * seconds_of_a_step(marks, unmeasured)}
    memory = [line.split()[1] for line in printed if line.startswith("memory ")]
    return found | ({"memory GB": int(memory[-1]) / 1e9} if memory else {})


def seconds_of_a_step(marks: Sequence[tuple[int, float]], unmeasured: int) -> float:
    """Mean seconds of a step between the first mark that counts and the last; marks are (steps done, time)."""
    kept = [mark for mark in marks if mark[0] >= unmeasured]
    (first, start), (last, end) = kept[0], kept[-1]
    return (end - start) / (last - first)


def jobs(job: Job, toy: bool) -> dict[str, Job]:
    """The peer's variants, the strongest first."""
    masked = replace(job, masked_head=True)
    found = {"Trainer, head on masked tokens": masked, "Trainer": job}
    return found if toy else found | {"Trainer, head on masked tokens, compiled": replace(masked, compiled=True)}


def run(setting: Setting, report: Report) -> None:
    if find_spec("accelerate") is None:
        raise SkippedError("transformers' Trainer needs accelerate, which is not installed")
    case, store, scratch = (
        TOY if setting.toy else FULL,
        Path(setting.materials) / materials.STORE,
        Path(setting.scratch),
    )
    samples = scratch / "samples.npz"
    tokens, _ = make_samples(store, SAMPLES, samples, length=case.length)
    hidden, layers, heads, intermediate = case.model().dimensions()
    vocabulary = open_store(store).tokenizer.vocab_size
    job = Job(
        str(samples), hidden, layers, heads, intermediate, vocabulary, case.batch, case.steps, threads=1,
        workers=1 if setting.toy else 4, device=setting.device,
    )  # fmt: skip
    plain = [option for option in case.options(store) if "profile" not in option]
    commands = {OURS: our_command([f"--output={scratch / 'ours'}", *plain])}
    commands |= {name: peer_command(sys.executable, own) for name, own in jobs(job, setting.toy).items()}
    unmeasured = case.every if setting.toy else UNMEASURED
    rivals: dict[str, dict[str, Any]] = {}
    for name, arguments in commands.items():
        found = clocked(arguments, setting.device, unmeasured)
        if "step ms" in found:
            found = {"sequences/s": 1e3 * case.batch / found["step ms"], **found}
            if "step ms" in rivals.get(OURS, {}):
                found["x ours"] = found["step ms"] / rivals[OURS]["step ms"]
        rivals[name] = found
        title = f"steps of {case.size}, bf16, batch {case.batch} x {case.length} ({tokens:.0f} tokens a sequence)"
        report.put({"title": title, "rivals": rivals})
