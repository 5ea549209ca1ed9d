"""The whole way on text that ships with Python, in a few minutes on two cores.

  zerobert demo
  zerobert demo --output /tmp/demo --steps 100

Stdlib text -> WordPiece -> MLM + NSP pre-training of a tiny BERT by the `deepspeed` launcher (2 ranks, ZeRO-2)
-> a classifier that tells what part of Python a paragraph documents -> its report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from engine.errors import UserError
from launch.cli import CommandParser
from launch.curves import read_curves
from launch.demo.topics import write_topics

RECIPES = Path(__file__).parent.parent / "recipes"


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert demo", description=__doc__)
    parser.add_argument("--output", type=str, default="runs/demo", help="folder of everything that the demo makes")
    parser.add_argument("--steps", type=int, default=None, help="pre-training steps; the recipe's when not given")
    return parser


def main(arguments: list[str]) -> int:
    """Run the demo in a folder of its own."""
    values = build_parser().parse_args(arguments)
    if values.steps is not None and values.steps < 1:
        raise UserError(f"steps: {values.steps} is not allowed; give a whole number of at least 1")
    start = time.monotonic()
    folder = Path(values.output)
    code = run(folder, values.steps)
    if code == 0:
        print(f"\nDone in {time.monotonic() - start:.0f} s.\n{where_to_look(folder)}")
    return code


def run(folder: Path, steps: int | None) -> int:
    """Prepare, pre-train, fine-tune; the exit code of the first stage that failed."""
    for name in ("pretrain", "finetune"):
        shutil.rmtree(folder / name, ignore_errors=True)
    say(1, "prepare the prose of the Python standard library: WordPiece vocabulary and token shards")
    from launch.prepare import main as prepare

    prepare(["--source", "embedded", "--output", str(folder / "data"), "--vocab_size", "4096"])
    say(2, f"pre-train a tiny BERT (MLM + NSP) with ZeRO-2 on {ranks()} ranks")
    override = [] if steps is None else [f"--train.steps={steps}"]
    code = deepspeed(
        "demo_pretrain.yaml", f"--output={folder / 'pretrain'}", f"--data.path={folder / 'data'}", *override
    )
    if code:
        return code
    print(loss_line(folder / "pretrain"))
    say(3, "fine-tune a classifier from that model: which part of Python does a paragraph document?")
    train, test = write_topics(folder / "topics")
    return deepspeed(
        "demo_finetune.yaml",
        f"--output={folder / 'finetune'}",
        f"--model.init_from={folder / 'pretrain' / 'export'}",
        f"--labelled.train={train}",
        f"--labelled.test={test}",
    )


def say(number: int, what: str) -> None:
    """Announce a stage."""
    print(f"\n[{number}/3] {what}", flush=True)


def ranks() -> int:
    """As many as there are GPUs, else two CPU ranks; so too where DS_ACCELERATOR asks for CPUs."""
    import torch

    return 2 if accelerator() == "cpu" else torch.cuda.device_count() or 2


def accelerator() -> str | None:
    """What DS_ACCELERATOR asks for, else "cpu" where there is no GPU; None leaves it to DeepSpeed."""
    import torch

    return os.environ.get("DS_ACCELERATOR") or (None if torch.cuda.device_count() else "cpu")


def deepspeed(recipe: str, *options: str) -> int:
    """Train a recipe under the `deepspeed` launcher of this Python; its exit code."""
    launcher = Path(sys.executable).parent / "deepspeed"
    script = Path(__file__).parent.parent / "train.py"
    chosen = accelerator()
    environment = dict(os.environ) | ({"DS_ACCELERATOR": chosen} if chosen else {})
    command = [sys.executable, str(launcher), "--quiet", "--num_accelerators", str(ranks()), str(script)]
    return subprocess.run(
        [*command, "--config", str(RECIPES / recipe), *options], env=environment, check=False
    ).returncode


def loss_line(run_folder: Path) -> str:
    """First and last point of the loss, read back from TensorBoard's files."""
    curve = read_curves(run_folder, ["train/loss"])["train/loss"]
    return f"training loss {curve[0][1]:.3f} at step {curve[0][0]} -> {curve[-1][1]:.3f} at step {curve[-1][0]}"


def where_to_look(folder: Path) -> str:
    """What the demo made."""
    return (
        f"curves           {Path(sys.executable).parent / 'tensorboard'} --logdir {folder}\n"
        f"as a picture     zerobert curves {folder / 'pretrain'} --plot {folder / 'loss.png'}\n"
        f"encoder          {folder / 'pretrain' / 'export'}\n"
        f"classifier       {folder / 'finetune' / 'export'} (transformers: "
        "AutoModelForSequenceClassification.from_pretrained)\n"
        f"report           {folder / 'finetune' / 'report'}"
    )
