"""Training with the fused loss and optimizer against plain torch: tokens/s and the loss curves.

    python -m benchmarks.kernels_in_training --data data/english

Real runs of `launch/train.py`, in turn, the same but for `train.kernels`. Rounding differs, so the curves part slowly:
the table gives the largest relative difference of the training loss up to a step, and of the held-out MLM loss at the
end. Without --data, the text that ships with Python is prepared first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, emit, options
from launch.curves import Curve, read_curves

LOSS, HELD_OUT, SPEED = "train/loss", "eval/mlm_loss", "train/tokens_per_second"
KERNELS = ("auto", "reference")
Curves = dict[str, Curve]


def prepare(folder: Path) -> Path:
    """A store of the embedded corpus."""
    store = folder / "store"
    command = [sys.executable, "-m", "launch", "prepare", "--source", "embedded", "--output", str(store)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return store


def train(kernels: str, output: Path, args: argparse.Namespace) -> Curves:
    """One run and its curves."""
    choices = {
        "data.path": args.data,
        "output": output,
        "train.steps": args.steps,
        "train.precision": args.precision,
        "train.global_batch": args.batch,
        "train.micro_batch": args.batch,
        "train.kernels": kernels,
        "train.threads": args.threads[-1],
        "train.log_interval": 1,
        "train.save_interval": "null",
        "optim.name": args.optimizer,
    }
    flags = [f"--{name}={value}" for name, value in choices.items()]
    recipe = ROOT / "launch" / "recipes" / f"pretrain_{args.size}.yaml"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(recipe), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return read_curves(output, [LOSS, HELD_OUT, SPEED])


def apart(ours: Curve, theirs: Curve, steps: int) -> float:
    """Largest relative difference up to a step."""
    pairs = zip(ours[:steps], theirs[:steps], strict=True)
    return max(abs(a - b) / b for (_, a), (_, b) in pairs)


def speed(curves: Curves) -> float:
    """Median tokens/s after the first tenth of a run."""
    values = [value for _, value in curves[SPEED]]
    return statistics.median(values[len(values) // 10 :])


def compare(runs: dict[str, list[Curves]], args: argparse.Namespace) -> dict[str, Any]:
    rivals: dict[str, dict[str, float]] = {}
    plain = runs["reference"]
    for name, found in runs.items():
        ratios = [speed(a) / speed(b) for a, b in zip(found, plain, strict=True)]
        rivals[name] = {
            "tokens/s": statistics.median(map(speed, found)),
            "x plain torch": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "last held-out loss": found[0][HELD_OUT][-1][1],
        }
    ours, theirs = runs["auto"][0], plain[0]
    for steps in sorted({10, 100, args.steps} - {n for n in (10, 100) if n > args.steps}):
        rivals["auto"][f"loss apart by step {steps}"] = apart(ours[LOSS], theirs[LOSS], steps)
    rivals["auto"]["held-out loss apart"] = apart(ours[HELD_OUT][-1:], theirs[HELD_OUT][-1:], 1)
    where = f"{args.size}, {args.precision}, {args.optimizer}, batch {args.batch}, {args.threads[-1]} thread(s)"
    return {"title": f"{where}, {args.steps} steps, {args.repeats} runs each", "rivals": rivals}


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(repeats=5, threads=[2])
    parser.add_argument("--data", help="a prepared store (default: the embedded corpus)")
    parser.add_argument("--size", default="mini", choices=["tiny", "mini", "small"], help="recipe")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the first pair; further pairs take a tenth")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "lamb"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.data = args.data or prepare(Path(folder))
        runs: dict[str, list[Curves]] = {name: [] for name in KERNELS}
        whole = args.steps
        for index in range(args.repeats):
            args.steps = whole if index == 0 else max(20, whole // 10)
            for name in KERNELS:
                runs[name].append(train(name, Path(folder) / f"{name}-{index}", args))
        args.steps = whole
        emit([compare(runs, args)], args.json)


if __name__ == "__main__":
    main()
