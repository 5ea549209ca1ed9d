"""Time to the held-out MLM loss that transformers' Trainer reaches with BERT's standard recipe in a fixed time.

    python -m benchmarks.time_to_loss --data STORE --peer-python PEER/bin/python [--minutes 20 --seeds 3 --ablate]

The rival is BertForPreTraining under Trainer: dropout 0.1, AdamW at 1e-4 with weight decay 0.01, 10 % warm-up and
linear decay to 0 over exactly the steps that fit into the time (Devlin et al. 2019 but for the length of the run),
compiled or not, with the batch that gives it the most tokens/s (--variant, --batch; see benchmarks.pretrain_step).
zerobert trains on the same store with a recipe of its own (`RECIPE` below) for a share of the time. Both are scored on
the same held-out samples, with the same masks.

Times are steps times the median time of a step, without start-up, compilation and evaluation. Both are measured in
trials, right after each other and before the long runs: let the machine be idle then. Later, other work stretches the
runs and not their curves. `--ablate` takes each part of the recipe away in turn.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import add_unjudged, finish, goal
from benchmarks.pretrain_peer import Job, command
from benchmarks.pretrain_samples import LENGTH, make_samples
from benchmarks.pretrain_step import VARIANTS, Run, observe, zerobert

#: what our recipe does differently, and the standard that an ablation goes back to
RECIPE = {
    "learning rate 5e-4": ("--optim.learning_rate=5e-4", "--optim.learning_rate=1e-4"),
    "linear decay": ("--optim.schedule=linear", "--optim.schedule=constant"),
    "no dropout": ("--model.hidden_dropout=0.0", "--model.hidden_dropout=0.1"),
    "no attention dropout": ("--model.attention_dropout=0.0", "--model.attention_dropout=0.1"),
    "second moment 0.98": ("--optim.betas=[0.9,0.98]", "--optim.betas=[0.9,0.999]"),
    "warm-up 5 %": ("--optim.warmup=0.05", "--optim.warmup=0.1"),
}
#: share of the rival's time in which each seed is to reach its loss
GOAL = 0.25
SMALL_BATCH = "small batch"
#: sequences a step in BERT's recipe
STANDARD_BATCH = 256
LEARNING_RATE = 1e-4
TRIAL_STEPS = 40
UNMEASURED = 10
#: made for the rival beforehand; more than it trains on
SAMPLES = 60_000
Curve = list[list[float]]


def evaluations(run: Run) -> list[tuple[int, float]]:
    """Step and held-out MLM loss of each evaluation of our run."""
    found = (re.match(r"evaluation at step (\d+): .*?mlm_loss ([\d.]+)", line) for line in run.printed)
    return [(int(one[1]), float(one[2])) for one in found if one]


def time_to(curve: Curve, loss: float) -> float | None:
    """Seconds until the curve first reaches a loss, between two evaluations by a straight line; None if it doesn't."""
    before = None
    for seconds, value in curve:
        if value <= loss:
            if before is None or before[1] <= value:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None


def reached(run: Run) -> float:
    """The rival's held-out loss at the end."""
    return next(float(line.split()[1]) for line in run.printed if line.startswith("held-out "))


def train(options: list[str], job: Job, steps: int, given: argparse.Namespace, output: Path) -> Run:
    """One run of ours on as many sequences as `steps` steps of our batch take, with `given.evaluations` evaluations."""
    steps = max(1, steps * given.our_batch // job.batch)
    more = [
        *options, f"--train.eval_interval={max(1, steps // given.evaluations)}", f"--seed={job.seed}",
        f"--train.eval_samples={given.held_out}", *given.zerobert,
        f"--train.micro_batch={min(job.batch, given.our_batch)}",
    ]  # fmt: skip
    return observe(zerobert(given.size, replace(job, steps=steps), given.data, output, more), job.threads)


def steps_in(seconds: float, step_s: float) -> int:
    """Steps of `step_s` seconds that fit into a time."""
    return max(1, round(seconds / step_s))


def compare(given: argparse.Namespace, job: Job, scratch: Path) -> list[dict[str, Any]]:
    """Both for each seed in turn, then the ablation."""
    rival = replace(job, batch=given.batch, **VARIANTS[given.variant])
    trial = observe(command(given.peer_python, replace(rival, steps=TRIAL_STEPS, held_out=None)), job.threads)
    recipe = [ours for ours, _ in RECIPE.values()]
    own = observe(
        zerobert(
            given.size, replace(job, steps=TRIAL_STEPS, batch=given.our_batch), given.data, scratch / "trial", recipe
        ),
        job.threads,
    )
    step_s, our_step_s = trial.step_s(UNMEASURED), own.step_s(UNMEASURED)
    steps, our_steps = steps_in(given.minutes * 60, step_s), steps_in(given.minutes * 60 * given.share, our_step_s)
    print(f"{steps} steps of {step_s:.3f} s against {our_steps} of {our_step_s:.3f} s", file=sys.stderr, flush=True)
    table: dict[str, dict[str, Any]] = {}
    curves: dict[str, Curve] = {}
    ratios = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        make_samples(given.data, given.held_out, Path(str(job.held_out)), split="validation", seed=seed)
        theirs = observe(
            command(given.peer_python, replace(rival, steps=steps, warmup=steps // 10, seed=seed)), job.threads
        )
        ours = train(recipe, replace(job, seed=seed, batch=given.our_batch), our_steps, given, scratch / f"seed-{seed}")
        loss, seconds = reached(theirs), step_s * steps
        curve = [[step * our_step_s, value] for step, value in evaluations(ours)]
        curves |= {f"zerobert, seed {seed}": curve, f"Trainer, seed {seed}": [[seconds, loss]]}
        taken = time_to(curve, loss)
        ratios.append((taken or float("inf")) / seconds)
        table[f"seed {seed}"] = {
            "Trainer's loss": loss, "its seconds": seconds, "its steps": steps,
            "our seconds to it": taken if taken is not None else "not reached", "share": ratios[-1],
            "our last loss": curve[-1][1], "our steps": our_steps,
        }  # fmt: skip
        print(f"seed {seed}: {table[f'seed {seed}']}, curve {curve}", file=sys.stderr, flush=True)
    if ratios:
        table["all seeds"] = {"share, median": statistics.median(ratios), "highest": max(ratios)}
    rival_is = f"Trainer {given.variant}, batch {given.batch}, {given.minutes:g} minutes"
    title = f"{given.size}, {job.threads} thread(s), {rival_is}"
    held_to = goals(ratios, judged=not given.unjudged)
    rows: list[dict[str, Any]] = (
        [{"title": title, "rivals": table, "curves": curves, "goals": held_to}] if ratios else []
    )
    return rows + ([ablation(given, job, our_steps, scratch)] if given.ablate else [])


def goals(shares: list[float], judged: bool) -> list[dict[str, Any]]:
    """What the seeds are held to; a share is infinite where the loss wasn't reached."""
    return [goal("share of the rival's time, the highest of all seeds", max(shares), at_most=GOAL, judged=judged)]


def ablation(given: argparse.Namespace, job: Job, steps: int, scratch: Path) -> dict[str, Any]:
    """The last held-out loss of the recipe without one part at a time, after equal steps."""
    found: dict[str, dict[str, Any]] = {}
    for left_out in (None, *RECIPE, SMALL_BATCH):
        options = [standard if name == left_out else ours for name, (ours, standard) in RECIPE.items()]
        name = f"without {left_out}" if left_out else "whole recipe"
        batch = STANDARD_BATCH if left_out == SMALL_BATCH else given.our_batch
        run = train(options, replace(job, batch=batch), steps, given, scratch / f"ablation-{len(found)}")
        found[name] = {"held-out MLM loss": evaluations(run)[-1][1]}
        found[name]["worse by"] = found[name]["held-out MLM loss"] - found["whole recipe"]["held-out MLM loss"]
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return {"title": f"ablation, {steps * given.our_batch} sequences", "rivals": found}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, help="a prepared store with a validation split")
    add("--size", default="mini")
    add("--peer-python", default=sys.executable, help="interpreter with transformers and accelerate")
    add("--minutes", type=float, default=20.0, help="the rival's time")
    add("--share", type=float, default=0.25, help="ours, as a share of it")
    add("--seeds", type=int, default=3, help="runs of each; each prints its result when it is done")
    add("--first-seed", type=int, default=1, help="seed of the first, to go on with where another call ended")
    add("--variant", default="compiled", choices=list(VARIANTS), help="of the rival")
    add("--batch", type=int, default=8, help="the rival's sequences a step")
    add("--our-batch", type=int, default=16, help="our sequences a step")
    add("--held-out", type=int, default=512, help="held-out samples")
    add("--evaluations", type=int, default=12, help="points of our curve")
    add("--ablate", action="store_true", help="also train without each part of the recipe")
    add("--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], help="CPU threads, the last counts")
    add("--zerobert", nargs="*", default=[], help="further options of launch/train.py")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    return parser.parse_args()


def main() -> int:
    given = parse()
    if given.data is None or not given.data.is_dir():
        sys.exit(
            f"skipped: no prepared store at {given.data}: make one by zerobert prepare --source TEXT --output STORE"
        )
    imports = [given.peer_python, "-c", "import accelerate, transformers"]
    if subprocess.run(imports, capture_output=True).returncode:
        sys.exit(f"skipped: {given.peer_python} lacks transformers' Trainer: pip install accelerate, or --peer-python")
    from engine.config import ModelConfig
    from engine.data.store.store import open_store

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        samples, held_out = scratch / "samples.npz", scratch / "held-out.npz"
        make_samples(given.data, SAMPLES, samples)
        vocabulary = open_store(given.data).tokenizer.vocab_size
        hidden, layers, heads, intermediate = ModelConfig(size=given.size).dimensions()
        job = Job(
            str(samples), hidden, layers, heads, intermediate, vocabulary, given.batch, TRIAL_STEPS, given.threads[-1],
            learning_rate=LEARNING_RATE, held_out=str(held_out),
        )  # fmt: skip
        assert np.load(samples)["input_ids"].shape[1] == LENGTH
        return finish(compare(given, job, scratch), given.json)


if __name__ == "__main__":
    sys.exit(main())
