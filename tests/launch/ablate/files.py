"""An ablation's file and data for tests; its runs are the suite's stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launch.ablate.command import main
from tests.launch.suite.files import STAND_IN, write_rows

ROWS = [{"sentence": f"text {index}", "label": index % 2} for index in range(60)]
#: one task x one size x (base + two switches) x three seeds
ABLATION: dict[str, Any] = {
    "data": "data",
    "base": {"model": {"init_from": "bert"}, "train.epochs": 4},
    "tasks": {"own": {"task": "sequence_classification", "labelled": {"train": "own.jsonl", "test": "own.jsonl"}}},
    "switches": {"smooth": {"labelled.label_smoothing": 0.1}, "short": {"train.epochs": 2}},
    "sizes": [20],
    "seeds": [1, 2, 3],
}


def write_ablation(folder: Path, **changed: Any) -> Path:
    """An ablation's file beside its data and its model; a key that is changed to None is left out."""
    write_rows(folder / "data" / "own.jsonl", ROWS)
    (folder / "bert").mkdir(exist_ok=True)
    values = {key: value for key, value in (ABLATION | changed).items() if value is not None}
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def ablate(path: Path, *options: str) -> int:
    """The command with the stand-in for training, into the folder `out` beside the file."""
    return main([str(path), f"--output={path.parent / 'out'}", f"--launcher={STAND_IN}", *options])
