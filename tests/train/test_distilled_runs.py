"""Runs with teachers: on every layout alike, resumed with the same teachers alone, and exported without projections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.config import RegulariseConfig
from engine.model.folder import PROJECTIONS
from engine.model.pretrained import load_config
from tests.tasks.distilled.plain import LARGER, save_teacher
from tests.tasks.labels import ROWS, write
from tests.tasks.regularised.plain import make
from tests.tasks.tiny import tiny_bert, tiny_teacher
from tests.train.runs import losses, run
from tests.train.test_label_runs import BOUND, STEPS, train
from tests.train.test_layouts import largest_difference

CLASSES = "sequence_classification"
#: by two teachers, through a projection for the second
ALL = ("--distil.hidden=0.5", "--distil.relations=0.5", "--distil.relation_heads=2", "--distil.hard=0.5")


def prepare(folder: Path, task: str) -> tuple[str, ...]:
    """The data, the student and its teachers; the options of all of these."""
    made = make(folder, task, RegulariseConfig())
    sizes: tuple[dict[str, int], ...] = ({}, LARGER)
    teachers = [save_teacher(made, folder / f"teacher-{seed}", seed, **each) for seed, each in enumerate(sizes)]
    return (f"--distil.teachers={','.join(map(str, teachers))}", *ALL)


@pytest.mark.parametrize(
    ("task", "stage"),
    [
        ("sequence_classification", 3),
        pytest.param("sequence_classification", 2, marks=pytest.mark.slow),
        pytest.param("sequence_classification", 1, marks=pytest.mark.slow),
        pytest.param("multiple_choice", 0, marks=pytest.mark.slow),
        pytest.param("regression", 3, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_from_teachers_what_one_learns(tmp_path: Path, task: str, stage: int) -> None:
    options = prepare(tmp_path, task)
    train(tmp_path, tmp_path / "one", task, 1, 0, 1, *options)
    recomputed = "--model.activation_checkpointing=true"
    together, _ = train(tmp_path, tmp_path / "two", task, 2, stage, 2, *options, recomputed)
    assert len(together) == STEPS
    for name in ("train/loss", "train/soft_loss", "train/hidden_loss", "train/relation_loss"):
        worst = largest_difference(losses(tmp_path / "two", name), losses(tmp_path / "one", name))
        print(f"{task}, 2 ranks, ZeRO-{stage}, accumulation 2: {name} differs by up to {worst:.1e}")
        assert worst < BOUND


def test_a_run_goes_on_with_its_own_teachers_and_exports_no_projections(tmp_path: Path) -> None:
    """Another teacher's weights are refused, as is a teacher that isn't there, on whichever rank."""
    tiny_bert(tmp_path / "bert")
    teacher, data = tiny_teacher(tmp_path / "teacher", "0123"), write(tmp_path / "train.jsonl", ROWS[CLASSES](60, 1))
    given = [f"--task={CLASSES}", f"--model.init_from={tmp_path / 'bert'}", f"--labelled.train={data}"]
    given += ["--labelled.max_length=14", "--train.save_interval=2", "--distil.hidden=1"]
    output, taught = tmp_path / "run", f"--distil.teachers={teacher}"
    told = run(output, *given, taught, "--train.steps=2")
    assert f"teacher {teacher}: 2 layers, 24 wide, " in told
    assert "hidden states of layer 0 from 1" in told
    parts = json.loads((output / "trained.json").read_text())["parts"]
    assert parts["projections"] == 24 * (load_config(tmp_path / "bert").hidden_size + 1)
    assert "adapters" not in parts
    names = load_file(output / "export" / "model.safetensors").keys()
    assert names
    assert not [name for name in names if PROJECTIONS in name]
    again = [*given, "--train.steps=4", "--resume=auto"]
    missing = run(output, *again, "--distil.teachers=nowhere", ranks=2, code=2)
    assert "distil.teachers: 'nowhere' is no folder; give that of a trained model, or of a run" in missing
    other = run(output, *again, f"--distil.teachers={output}", code=2)
    assert "distil.teachers: the teachers' weights of this run (sha256" in other
    assert "distil.hidden: 2.0 differs from 1.0 in" in run(output, *again, taught, "--distil.hidden=2", code=2)
    assert "resumed" in run(output, *again, taught)
