"""A suite's file, data and model for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from launch.suite.command import main

STAND_IN = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
ROWS = [{"sentence1": "a b", "sentence2": "b a", "label": index % 2} for index in range(4)]
#: two tasks x two settings x two seeds
SUITE: dict[str, Any] = {
    "data": "data",
    "base": {"model": {"init_from": "bert"}, "labelled.max_length": 16},
    "tasks": {
        "rte": {"glue": "rte"},
        "own": {"task": "sequence_classification", "labelled": {"train": "own.jsonl", "test": "own.jsonl"}},
    },
    "grid": {"train.epochs": [2, 4]},
    "seeds": 2,
}


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_suite(folder: Path, **changed: Any) -> Path:
    """A suite's file beside its data and its model; a key that is changed to None is left out."""
    for name in ("RTE/train", "RTE/dev", "own"):
        write_rows(folder / "data" / f"{name}.jsonl")
    (folder / "bert").mkdir(exist_ok=True)
    values = {key: value for key, value in (SUITE | changed).items() if value is not None}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run_suite(path: Path, *options: str) -> int:
    """The command with the stand-in for training, into the folder `out` beside the file."""
    return main([str(path), f"--output={path.parent / 'out'}", f"--launcher={STAND_IN}", *options])


def starts(output: Path, run: str) -> list[dict[str, str]]:
    path = output / f"{run}.starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def told(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return found
