"""The suites that come with the package: that each can be planned on data of its form."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.suite.glue import GLUE
from launch.suite.plan import Suite, plan_suite
from launch.suite.reading import read_suite
from tests.conftest import ROOT
from tests.launch.suite.files import write_rows

RECIPES = ROOT / "launch" / "recipes" / "suites"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in the form of each task."""
    folder = tmp_path_factory.mktemp("data")
    for task in GLUE.values():
        row = dict.fromkeys((column for column in task.columns[0] if column), "1")
        write_rows(folder / task.folder / "train.jsonl", [row])
        write_rows(folder / task.folder / f"{task.dev[0]}.jsonl", [row])
    for name in ("wnut17/train.jsonl", "wnut17/dev.jsonl", "wnut17/test.jsonl", "squad/train.json", "squad/dev.json"):
        write_rows(folder / name, [{}])
    return folder


def planned(name: str, data: Path) -> Suite:
    return plan_suite(read_suite(str(RECIPES / name)), data / "out", data, [f"bert={data}"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tasks", "settings"), [
    ("glue_bert.yaml", 8, 4), ("glue_small_data.yaml", 3, 2), ("glue_modernbert.yaml", 8, 1), ("ner_qa.yaml", 2, 3),
])  # fmt: skip
def test_a_recipe_can_be_planned(name: str, tasks: int, settings: int, data: Path) -> None:
    cells = planned(name, data).cells
    assert len({cell.task for cell in cells}) == tasks
    assert len(cells) == tasks * settings
    assert all(cell.record.options["labelled.train"].startswith(str(data)) for cell in cells)


def test_every_recipe_is_tested() -> None:
    assert sorted(path.name for path in RECIPES.iterdir()) == [
        "glue_bert.yaml",
        "glue_modernbert.yaml",
        "glue_small_data.yaml",
        "ner_qa.yaml",
    ]


def test_modernberts_tasks_have_their_own_rates(data: Path) -> None:
    rates = {cell.task: cell.record.options for cell in planned("glue_modernbert.yaml", data).cells}
    assert (rates["rte"]["optim.learning_rate"], rates["rte"]["train.epochs"]) == (5e-5, 3.0)
    assert (rates["cola"]["optim.weight_decay"], rates["cola"]["train.epochs"]) == (1e-6, 5.0)
    assert {options["train.global_batch"] for options in rates.values()} == {64}
