"""How training speed and memory grow: tokens/s against sequence length, micro-batch, layers and ranks.

    python -m benchmarks.scaling            some five minutes
    python -m benchmarks.scaling --quick    two points a curve, a minute: a look, no figure to quote

Real runs of `launch/train.py` on CPU ranks of one thread each, in bf16, loading in the training process. The text is
what ships with Python, its short documents joined into long ones, and no pair is shortened on purpose, so that samples
have the length that is asked for; `tokens a sample` is what they really had, and tokens/s counts real tokens only.
All points run one after the other in every round. A figure is the median over the points of the training curve of all
rounds, without the first third of each; the spread is half the distance between the quartiles, as a share of it.
`peak_MB` is the most resident memory of rank 0, libraries included. `GFLOP/s` are those that the model needs
(`engine.model.flops`). With `ranks` the global batch stays the same: 100 % efficiency would be as many times the
tokens/s. Corpus sizes are in `python -m benchmarks.prepare`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, emit, spread
from engine.config import Shape
from engine.model.flops import training_flops
from launch.curves import Curve, read_curves

SPEED, STEP_TIME, MEMORY = "train/tokens_per_second", "train/step_time", "train/memory_bytes"
MASKED = 0.15
#: words of a joined document: many times the longest sequence
DOCUMENT_WORDS = 20_000
#: seconds after which a run counts as hung
LIMIT_S = 900


@dataclass(frozen=True)
class Setting:
    """One run."""

    length: int = 128
    micro_batch: int = 16
    layers: int = 4
    ranks: int = 1
    global_batch: int | None = None
    """sequences; None takes a micro-batch a rank"""
    hidden: int = 256
    heads: int = 4
    steps: int = 36

    @property
    def batch(self) -> int:
        return self.global_batch or self.micro_batch * self.ranks

    def flops_per_token(self, length: float, vocabulary: int) -> float:
        """FLOPs that forward and backward pass need for a token of a sequence of `length` tokens."""
        shape = Shape(self.hidden, self.layers, self.heads, 4 * self.hidden, vocabulary)
        return training_flops(shape, [round(length)], MASKED * length) / length


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in one thing."""

    name: str
    settings: Mapping[int, Setting]


def sweeps(quick: bool) -> list[Sweep]:
    """The curves; `quick` keeps the first and last point of each, and a third of the steps."""
    base, tokens = Setting(), 2048
    lengths = {length: replace(base, length=length, micro_batch=tokens // length) for length in (128, 256, 512, 1024)}
    batches = {
        size: replace(base, micro_batch=size, steps=base.steps * 2 // (1 + size // 16)) for size in (1, 4, 16, 64)
    }
    layers = {count: replace(base, layers=count) for count in (1, 2, 4, 8)}
    ranks = {count: replace(base, ranks=count, global_batch=64, steps=18) for count in (1, 2)}
    found = [
        Sweep("tokens of a sequence, 2048 tokens a micro-batch", lengths),
        Sweep("sequences of a micro-batch", batches),
        Sweep("layers", layers),
        Sweep("ranks of one thread, 64 sequences a step", ranks),
    ]
    return [shortened(sweep) for sweep in found] if quick else found


def shortened(sweep: Sweep) -> Sweep:
    """The first and the last point, with a third of the steps, at least six."""
    ends = [min(sweep.settings), max(sweep.settings)]
    return Sweep(sweep.name, {x: replace(sweep.settings[x], steps=max(6, sweep.settings[x].steps // 3)) for x in ends})


def joined(documents: Iterable[str], words: int = DOCUMENT_WORDS) -> Iterator[str]:
    """Documents of at least so many words, each out of several that follow one another; a rest joins none."""
    parts: list[str] = []
    count = 0
    for document in documents:
        parts.append(document)
        count += len(document.split())
        if count >= words:
            yield "\n\n".join(parts)
            parts, count = [], 0


def prepare_store(folder: Path) -> tuple[Path, int]:
    """A store of long documents of the embedded corpus, and its vocabulary size."""
    from engine.data.store.prepare import PrepareConfig, prepare
    from engine.data.text.embedded import embedded_documents
    from engine.data.tokenizer.wordpiece import load_tokenizer

    source, store = folder / "long.jsonl", folder / "store"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined(embedded_documents())))
    prepare(PrepareConfig(source=[str(source)], output=str(store), validation_fraction=0.2, workers=0))
    return store, load_tokenizer(store / "tokenizer").vocab_size


def command(setting: Setting, data: Path, output: Path, precision: str) -> list[str]:
    """The command of a run that trains and does as little else as it can."""
    choices = {
        "data.path": data,
        "output": output,
        "data.sequence_length": setting.length,
        "data.short_sequence_probability": 0,
        "data.mask_probability": MASKED,
        "data.workers": 0,
        "model.hidden_size": setting.hidden,
        "model.heads": setting.heads,
        "model.layers": setting.layers,
        "model.max_positions": max(512, setting.length),
        "train.precision": precision,
        "train.global_batch": setting.batch,
        "train.micro_batch": setting.micro_batch,
        "train.steps": setting.steps,
        "train.log_interval": 1,
        "train.eval_samples": 2 * setting.ranks,
        "train.save_interval": "null",
        "train.verify_update": 0,
        "train.threads": 1,
        "monitor.norm_interval": 0,
    }
    launcher = [sys.executable]
    if setting.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setting.ranks}"]
    return [*launcher, str(ROOT / "launch" / "train.py"), *(f"--{name}={value}" for name, value in choices.items())]


def run(setting: Setting, data: Path, output: Path, precision: str) -> dict[str, Curve]:
    """Train, and read the curves back.

    Raises:
        RuntimeError: with what was printed, if the run failed.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = command(setting, data, output, precision)
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{setting}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return read_curves(output, [SPEED, STEP_TIME, MEMORY])


def steady(curve: Curve) -> list[float]:
    """Values without the first third: first calls compile, allocate and fill caches."""
    values = [value for _, value in curve]
    return values[len(values) // 3 :]


def point(x: int, setting: Setting, rounds: list[dict[str, Curve]], vocabulary: int) -> dict[str, float]:
    """What the rounds of a run come to."""
    speeds = [value for curves in rounds for value in steady(curves[SPEED])]
    seconds = [value for curves in rounds for value in steady(curves[STEP_TIME])]
    length = sum(a * b for a, b in zip(speeds, seconds, strict=True)) / len(speeds) / setting.batch
    speed = median(speeds)
    return {
        "x": x,
        "tokens/s": speed,
        "spread": spread(speeds),
        "GFLOP/s": speed * setting.flops_per_token(length, vocabulary) / 1e9,
        "tokens a sample": length,
        "peak_MB": max(curves[MEMORY][-1][1] for curves in rounds) / 1e6,
    }


def row(sweep: Sweep, points: list[dict[str, float]], where: str) -> dict[str, Any]:
    """A curve as a table and as points; of ranks also the efficiency."""
    first = points[0]
    if sweep.name.startswith("ranks"):
        points = [one | {"efficiency %": 100 * one["tokens/s"] / first["tokens/s"] / one["x"]} for one in points]
    rivals = {f"{one['x']:g}": {key: value for key, value in one.items() if key != "x"} for one in points}
    return {"title": f"tokens/s against {sweep.name}; {where}", "x": sweep.name, "points": points, "rivals": rivals}


def measure(chosen: list[Sweep], folder: Path, rounds: int, precision: str) -> list[dict[str, Any]]:
    """All points of all curves in every round; a setting that two curves share runs once a round."""
    data, vocabulary = prepare_store(folder)
    settings = list(dict.fromkeys(setting for sweep in chosen for setting in sweep.settings.values()))
    found: dict[Setting, list[dict[str, Curve]]] = {setting: [] for setting in settings}
    for number in range(rounds):
        for index, setting in enumerate(settings):
            print(f"round {number + 1}/{rounds}, run {index + 1}/{len(settings)}: {setting}", file=sys.stderr)
            found[setting].append(run(setting, data, folder / f"run-{number}-{index}", precision))
    base = Setting()
    usual = f"{base.layers} layers, {base.micro_batch} sequences of {base.length} tokens, 1 rank"
    where = f"unless said otherwise {usual}; width {base.hidden}, {precision}, vocabulary {vocabulary}"
    return [
        row(sweep, [point(x, setting, found[setting], vocabulary) for x, setting in sweep.settings.items()], where)
        for sweep in chosen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each point (default 2)")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="two points a curve, one short run of each")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not a number of at least 1")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(sweeps(args.quick), Path(folder), 1 if args.quick else args.rounds, args.precision)
    emit(rows, args.json)


if __name__ == "__main__":
    main()
