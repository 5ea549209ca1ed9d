"""The file of an ablation: what is told of mistakes in it, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from launch.ablate.command import main
from launch.ablate.reading import parts_of, read_ablation
from launch.suite.plan import plan_suite
from tests.conftest import ROOT
from tests.launch.ablate.files import write_ablation
from tests.launch.suite.files import write_rows

OWN = {"task": "sequence_classification", "labelled.train": "own.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"switches": None}, "switches: PATH has none; write such as switches: {r_drop: {regularise.r_drop: 1.0}}"),
        ({"switches": ["a"]}, "switches: names must stand under it"),
        ({"switches": {"base": {"seed": 1}}}, "switches: 'base' is what all are compared with; give another name"),
        ({"switches": {"a/b": {"train.epochs": 2}}}, "switches: 'a/b' is not allowed as a name"),
        ({"switches": {"a": "yes"}}, "switches.a: options must stand under it"),
        ({"switches": {"a": {"train.epoch": 2}}}, "train.epoch: no such field; did you mean train.epochs?"),
        ({"switches": {"a": {"train.epochs": "many"}}}, "train.epochs: 'many' is not allowed"),
        ({"switches": {"a": {"train.epochs": -1}}}, "train.epochs: -1"),
        ({"switches": {"a": {"labelled.limit": 5}}}, "labelled.limit: the ablation gives it to each run; delete it"),
        ({"base": {"labelled.limit": 5}}, "labelled.limit: the ablation gives it to each run; delete it (base, line 3"),
        ({"switches": {"a": {"seed": 5}}}, "seed: the ablation gives it to each run; delete it"),
        ({"switches": {"a": None}}, "switches.a: options must stand under it"),
        ({"switches": {"a": {"train.epochs": 4}}}, "switches.a: of own its options are those of base"),
        ({"switches": {"a": {"train.micro_batch": 2}}}, "switches.a: of own its options are those of base"),
        (
            {"switches": {"a": {"train.epochs": 2}, "b": {"train.epochs": 2}}},
            "switches.b: of own its options are those of a, or change no score; give it others",
        ),
        ({"sizes": []}, "sizes: it takes a list of numbers of training examples, such as [50, 200, all]"),
        ({"sizes": 50}, "sizes: it takes a list of numbers of training examples"),
        ({"sizes": [0]}, "sizes: '0' is not allowed; give a whole number of at least 1"),
        ({"sizes": ["most"]}, "sizes: 'most' is not allowed"),
        ({"sizes": [50, "all", 50]}, "sizes: 50 is there twice; delete one"),
        ({"sizes": [50, 61]}, "sizes: 61 is not allowed; HERE/data/own.jsonl has 60 training examples: give at most"),
        ({"seeds": 1}, "seeds: a single run of own tells nothing of chance; give at least 2"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] is not allowed; give different seeds"),
        ({"grid": {"train.epochs": [1]}}, "ablation: no such key 'grid'; choose of data, output, dev, base, models"),
        ({"switch": {}}, "ablation: no such key 'switch'; did you mean switches?"),
        ({"tasks": {"own": OWN | {"labelled.train": "gone.jsonl"}}}, "labelled.train: 'HERE/data/gone.jsonl' is not"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write_ablation(tmp_path, **changed)
    with pytest.raises(UserError) as caught:
        main([str(path), f"--output={tmp_path / 'out'}"])
    told = str(caught.value).replace(str(path), "PATH").replace(str(tmp_path), "HERE")
    assert told.startswith(message)
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_a_switch_is_given_once(tmp_path: Path) -> None:
    path = write_ablation(tmp_path)
    path.write_text(path.read_text().replace("  short:", "  smooth:"))
    with pytest.raises(UserError, match=r"^switches.smooth: given twice in .*, in line \d+ and line \d+; delete one$"):
        main([str(path)])


@pytest.mark.parametrize(
    ("task", "name", "text", "count"),
    [
        ("token_classification", "x.conll", "a B-X\n\nb O\n\n", 2),
        ("question_answering", "x.jsonl", '{"question": "q?", "context": "a dog", "answers": []}\n' * 3, 1),
    ],
)
def test_sizes_count_what_a_task_learns_from(tmp_path: Path, task: str, name: str, text: str, count: int) -> None:
    own = {"task": task, "labelled.train": name}
    path = write_ablation(tmp_path, tasks={"own": own}, sizes=[count, count + 1], switches={"a": {"train.epochs": 2}})
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(UserError, match=rf"^sizes: {count + 1} is not allowed; .* has {count} training examples"):
        main([str(path), "--plan"])


def test_cola_is_counted_before_it_has_a_header(tmp_path: Path) -> None:
    path = write_ablation(tmp_path, tasks={"cola": {"glue": "cola"}}, sizes=[3, 4])
    (tmp_path / "data" / "CoLA").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "data" / "CoLA" / f"{part}.tsv").write_text("x\t1\t\tgood\nx\t0\t*\tbad\nx\t1\t\tfine\n")
    with pytest.raises(UserError, match=r"^sizes: 4 is not allowed; .* has 3 training examples"):
        main([str(path), "--plan"])


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("base,n=all", ("base", "all")),
        ("a,n=3,n=20", ("a,n=3", "20")),
        ("epochs=2", None),
        (",n=20x", None),
        ("a,n=", None),
    ],
)
def test_a_setting_tells_its_switch_and_size(setting: str, parts: tuple[str, str] | None) -> None:
    assert parts_of(setting) == parts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("regularisers", 11), ("regularisers_tiny", 17)])
def test_the_recipes_can_be_planned(name: str, settings: int, tmp_path: Path) -> None:
    row = {"sentence": "a", "sentence1": "a", "sentence2": "b", "label": 1}
    for task in ("RTE", "SST-2"):
        for part in ("train", "dev"):
            write_rows(tmp_path / task / f"{part}.jsonl", [row])
    recipe = ROOT / "launch" / "recipes" / "ablations" / f"{name}.yaml"
    suite = plan_suite(read_ablation(str(recipe)), tmp_path / "out", tmp_path, [f"bert={tmp_path}"])
    assert len(suite.cells) == 2 * 2 * settings
    assert {cell.record.options["labelled.limit"] for cell in suite.cells} == {200, 2000}
