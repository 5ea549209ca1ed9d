"""Mistakes with teachers: one line that names field, value and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import DistilConfig, RegulariseConfig
from engine.errors import UserError
from launch.configure.options import parse_options
from tests.tasks.distilled.plain import LARGER, save_teacher
from tests.tasks.regularised.plain import make

LABELLED = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.jsonl"]
TAUGHT = "--distil.teachers=one,two"
MISTAKES: list[tuple[list[str], str]] = [
    (["--distil.teachers= , "], "distil.teachers: ' , ' is not allowed; give a folder, or null"),
    (["--distil.hidden=1"], "distil.hidden: 1.0 is not allowed; it needs distil.teachers"),
    (["--distil.texts=more.jsonl"], "distil.texts: 'more.jsonl' is not allowed; it needs distil.teachers"),
    ([TAUGHT, "--distil.hard=-1"], "distil.hard: -1.0 is not allowed; give 0 or more"),
    ([TAUGHT, "--distil.soft=nan"], "distil.soft: 'nan' is not allowed"),
    ([TAUGHT, "--distil.soft=0"], "distil.soft: 0.0 is not allowed; nothing is learned from distil.teachers"),
    ([TAUGHT, "--distil.temperature=0"], "distil.temperature: 0.0 is not allowed; give a positive number"),
    (
        [TAUGHT, "--distil.soft=0", "--distil.hidden=1", "--distil.temperature=3"],
        "distil.temperature: 3.0 is not allowed; it needs distil.soft above 0",
    ),
    ([TAUGHT, "--distil.relation_heads=4"], "distil.relation_heads: 4 is not allowed; it needs distil.relations above"),
    ([TAUGHT, "--distil.relations=1", "--distil.relation_heads=0"], "distil.relation_heads: 0 is not allowed; give a"),
    ([TAUGHT, "--distil.relations=1", "--distil.relation_layer=-1"], "distil.relation_layer: -1 is not allowed; give"),
    ([TAUGHT, "--regularise.mixup=0.4"], "regularise.mixup: 0.4 is not allowed; regularise.mixup mixes predictions"),
    (
        [TAUGHT, "--distil.hidden=1", "--regularise.r_drop=1"],
        "distil.hidden: 1.0 is not allowed; regularise.r_drop makes several passes, and states are compared of one",
    ),
    (
        [TAUGHT, "--distil.texts=more.jsonl", "--labelled.augment=characters"],
        "distil.texts: 'more.jsonl' is not allowed; labelled.augment changes the labelled texts alone",
    ),
    (
        [TAUGHT, "--distil.texts=more.jsonl", "--task=multiple_choice"],
        "distil.texts: 'more.jsonl' is not allowed; task multiple_choice can't learn from them; leave it out",
    ),
    (
        ["--model.init_layers=0,1", "--adapter.method=lora"],
        "model.init_layers: '0,1' is not allowed; adapters and frozen weights are told by those of all layers",
    ),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_mistake_is_one_line(options: list[str], said: str) -> None:
    with pytest.raises(UserError) as found:
        parse_options([*LABELLED, *options])
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    words = (folder / "vocab.txt").read_text().split("\n")
    (folder / "vocab.txt").write_text("\n".join([*words[:5], "other", *words[6:]]))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


TEACHERS: list[tuple[Callable[[Path], None], dict[str, object], str]] = [
    (lambda folder: folder.rename(folder.with_name("gone")), {}, "TEACHER' is no folder; give that of a trained model"),
    (other_tokenizer, {}, "its tokenizer is another than the run's, so that its tokens are others; give another"),
    (
        lambda folder: change_config(folder, id2label={"0": "2", "1": "1", "2": "0"}),
        {},
        "its labels are 2, 1, 0, and the run's 0, 1, 2; give another teacher",
    ),
    (
        lambda folder: change_config(folder, problem_type="multi_label_classification"),
        {},
        "its problem_type is 'multi_label_classification', and the run's 'single_label_classification'",
    ),
    (no_weights, {}, "it holds no weights; add model.safetensors"),
    (
        lambda folder: change_config(folder, num_hidden_layers=2),
        {"hidden": 1.0, "relations": 1.0, "relation_layer": 2},
        "distil.relation_layer: 2 is not allowed; TEACHER has layers 0 to 1",
    ),
    (
        lambda folder: None,
        {"relations": 1.0, "relation_heads": 3},
        "distil.relation_heads: 3 is not allowed; it must divide the widths of both models, 16 and 24",
    ),
]


@pytest.mark.parametrize(("change", "distil", "said"), TEACHERS, ids=[said[:30] for *_, said in TEACHERS])
def test_a_teacher_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Path], None], distil: dict[str, object], said: str
) -> None:
    folder = save_teacher(make(tmp_path, "sequence_classification", RegulariseConfig()), tmp_path / "t", 1, **LARGER)
    change(folder)
    options = DistilConfig(teachers=str(folder), **distil)  # type: ignore[arg-type]
    task = make(tmp_path, "sequence_classification", RegulariseConfig(), distil=options)
    with pytest.raises(UserError) as caught:
        task.build_model()
    assert said.replace("TEACHER", str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_needs_a_head_with_weights_where_predictions_are_learned(tmp_path: Path) -> None:
    """The student's own start has none: it teaches hidden states alone."""
    task = make(tmp_path, "sequence_classification", RegulariseConfig())
    change_config(tmp_path / "bert", id2label=dict(enumerate(task.names or ())))
    for soft, hidden in ((0.0, 1.0), (1.0, 0.0)):
        options = DistilConfig(teachers=str(tmp_path / "bert"), soft=soft, hidden=hidden)
        taught = type(task)(replace(task.config, distil=options))
        if hidden:
            taught.build_model()
            continue
        with pytest.raises(UserError, match=r"it has no weights of classifier\.weight, a part of its head"):
            taught.build_model()
