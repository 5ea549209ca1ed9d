"""Rows of the tasks on texts, whose words tell the labels, and these tasks on a tiny BERT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import TASKS, LabelledConfig, ModelConfig, RunConfig
from engine.tasks.finetune import FineTuning
from tests.tasks.tiny import WORDS, tiny_bert

Row = dict[str, Any]


def texts(count: int, seed: int) -> list[list[str]]:
    """Words of random number."""
    generator = np.random.default_rng(seed)
    return [generator.choice(WORDS[5:], size=generator.integers(1, 8)).tolist() for _ in range(count)]


def numbered(count: int, seed: int) -> list[Row]:
    """The number is that of "good" less that of "bad"."""
    return [{"sentence": " ".join(t), "label": t.count("good") - t.count("bad") / 2} for t in texts(count, seed)]


def labelled(count: int, seed: int) -> list[Row]:
    """Labels are the telling words of a text; some texts have none."""
    return [{"sentence": " ".join(t), "label": sorted({"good", "bad", "film"} & {*t})} for t in texts(count, seed)]


def questions(count: int, seed: int) -> list[Row]:
    """Two to four options, of which one says "good" and the others "bad"."""
    generator, rows = np.random.default_rng(seed), []
    for words in texts(count, seed):
        options = [f"{word} bad" for word in generator.choice(["film", "the", "was"], size=generator.integers(2, 5))]
        right = int(generator.integers(len(options)))
        options[right] = options[right].replace("bad", "good")
        rows.append({"sentence": " ".join(words[:3]), "options": options, "label": right})
    return rows


def graded(count: int, seed: int) -> list[Row]:
    """Classes 0 to 3, far from even: how often "good" is there."""
    return [{"sentence": " ".join(t), "label": min(t.count("good"), 3)} for t in texts(count, seed)]


ROWS: dict[str, Callable[[int, int], list[Row]]] = {
    "regression": numbered,
    "multi_label_classification": labelled,
    "multiple_choice": questions,
    "sequence_classification": graded,
}


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MakeTask = Callable[..., Any]
SIZES = {"train": (90, 1), "validation": (31, 2)}


def maker(folder: Path) -> MakeTask:
    """What makes a task by its name, from files in a folder, with fields of labelled as they are given."""
    bert = tiny_bert(folder / "bert")

    def make(task: str, **changes: Any) -> FineTuning:
        files = {name: write(folder / f"{name}.jsonl", ROWS[task](*of)) for name, of in SIZES.items()}
        values: dict[str, Any] = {**files, "max_length": 14} | changes
        model = ModelConfig(init_from=str(bert), hidden_dropout=0.0, attention_dropout=0.0)
        config = RunConfig(task=task, model=model, labelled=LabelledConfig(**values))
        config.validate()
        config.monitor.tensorboard = False
        made: FineTuning = TASKS.get(task).load()(config)
        return made

    return make
