"""Recipes: nothing in one is lost, or taken for something else, and what is wrong is one line with the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import RunConfig
from engine.errors import UserError
from launch.configure.options import parse
from launch.configure.recipe import field_types, read_recipe, scalar
from launch.slurm.snapshot import configuration_text


def written(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {steps: 3}\nmodel: {layers: 1}\ntrain: {global_batch: 4}\n",
            "train: given twice in PATH, in line 1 and line 3; join the two sections",
        ),
        (
            "train:\n  steps: 3\n  global_batch: 4\n  steps: 5\n",
            "train.steps: given twice in PATH, in line 2 and line 4; delete one",
        ),
        ("train: {steps: 3}\ntrain.steps: 5\n", "train.steps: given twice in PATH, in line 1 and line 2; delete one"),
        ("seed: 1\nseed: 1\n", "seed: given twice in PATH, in line 1 and line 2; delete one"),
        (
            "train:\nseed: 3\n",
            "train: nothing stands under it; indent its fields under it, or delete it (line 1 of PATH)",
        ),
        ("seed: 1\ntrain: r.yaml\n", "train: its fields must stand under it, such as {steps: 1000}; correct it"),
        ("train: [steps, 3]\n", "train: its fields must stand under it"),
        ("seed: null\n", "seed: null is not allowed; give a value, or delete it (line 1 of PATH)"),
        ("labelled: {label: }\n", "labelled.label: null is not allowed"),
        ("- train\n- seed\n", "config: PATH holds a list, and no fields; write fields such as"),
        ("hello\n", "config: PATH holds only 'hello', and no fields"),
        ("", "config: PATH is empty; write fields such as"),
        ("# only this\n", "config: PATH is empty"),
        ("null\n", "config: PATH is empty"),
        ("seed: 1\n---\nseed: 2\n", "config: PATH holds 2 documents, the second from line 3; keep one"),
        ("train:\n\tsteps: 3\n", "line 2: found character '\\t' that cannot start any token); indent with spaces"),
        ("train: *x\n", "config: the recipe is not YAML (PATH, line 1: found undefined alias 'x'); correct it"),
        ("train: {steps: 3\n", "config: the recipe is not YAML (PATH, line 2: expected ',' or '}'"),
        ("output: a: b\n", "config: the recipe is not YAML (PATH, line 1: mapping values are not allowed here)"),
        ("seed: !!int 3\n", "seed: tags such as !!int aren't read; leave it out (line 1 of PATH)"),
        ("seed: !!python/object:os.getcwd []\n", "seed: tags such as !!python/object:os.getcwd aren't read"),
        ("[a]: 2\n", "config: a list or a mapping can't be a field's name"),
        ("train: &a {<<: *a}\n", "it contains itself"),
        ("a: 1\na.b: 2\n", "a.b: a has a value of its own; give one of the two (line 2 of PATH)"),
        ("config: other.yaml\n", "config: PATH names another recipe; give both on the command line, --config twice"),
        ("[" * 5000, "config: the recipe is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    assert message.replace("PATH", path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {async_save: nope}\n", "train.async_save: 'nope' is not allowed; give true or false"),
        ("train: {steps: yes}\n", "train.steps: 'yes' is not allowed; give a whole number or null"),
        ("train: {steps: 3.0}\n", "train.steps: '3.0' is not allowed; give a whole number or null"),
        ("train:\n  steps: 1,000\n", "train.steps: '1,000' is not allowed; give a whole number or null"),
        ("train: {precision: 16}\n", "train.precision: '16' is not allowed; give one of fp32, bf16, fp16"),
        ("optim: {learning_rate: .inf}\n", "optim.learning_rate: inf is not allowed; give a finite number"),
        ("optim: {warmup: .nan}\n", "optim.warmup: nan is not allowed; give a finite number"),
        ("optim: {learning_rate: fast}\n", "optim.learning_rate: 'fast' is not allowed; give a number"),
        ("on: 1\n", "on: no such field"),
        ("1: 2\n", "1: no such field"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--config", written(tmp_path, text)])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output: on\nlabelled: {label: no, text: yes, text_pair: off}\n", ["on", "no", "yes", "off"]),
        ("output: 5\nlabelled: {label: 1, text: 1e3, text_pair: 2024-01-01}\n", ["5", "1", "1e3", "2024-01-01"]),
        ("output: 'null'\nlabelled: {label: \"3\", text: true, text_pair: ~}\n", ["null", "3", "true", None]),
    ],
)
def test_text_is_what_stands_there(tmp_path: Path, text: str, expected: list[str | None]) -> None:
    config = parse(["--config", written(tmp_path, text)])
    labelled = config.labelled
    assert [config.output, labelled.label, labelled.text, labelled.text_pair] == expected


def test_numbers_are_those_of_yaml_1_2_and_truth_values_of_both(tmp_path: Path) -> None:
    text = """
seed: 010
train: {steps: 1_000, async_save: off, audit: Yes, micro_batch: auto, epochs: null}
optim: {learning_rate: 1e-4, eps: 1E-6, betas: [9e-1, .98]}
fault: {hang_timeout: 0x10}
"""
    config = parse(["--config", written(tmp_path, text)])
    assert (config.seed, config.train.steps, config.train.micro_batch) == (10, 1000, "auto")
    assert (config.train.async_save, config.train.audit) == (False, True)
    assert (config.optim.learning_rate, config.optim.eps, config.optim.betas) == (1e-4, 1e-6, (0.9, 0.98))
    assert config.fault.hang_timeout == 16.0


def test_anchors_merges_dotted_keys_and_marks_of_a_document_are_read(tmp_path: Path) -> None:
    text = "\ufeff---\nmodel: {<<: &small {layers: 3, heads: 2}, layers: 1}\ntrain.steps: 5\ntrain: {keep: 4}\n...\n"
    config = parse(["--config", written(tmp_path, text)])
    assert (config.model.layers, config.model.heads, config.train.steps, config.train.keep) == (1, 2, 5, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder; give a YAML file"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("seed: 1")), "is a folder; give "),
        (lambda path: path.write_bytes(b"output: caf\xe9\n"), "is not UTF-8 text; save it as UTF-8"),
        (lambda path: None, "can't be read (No such file or directory); give a recipe"),
    ],
    ids=["folder", "folder of a run", "latin-1", "missing"],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "it")
    with pytest.raises(UserError) as caught:
        parse(["--config", str(tmp_path / "it")])
    assert str(caught.value).startswith("config: ")
    assert message in str(caught.value)
    assert ("config.yaml" in str(caught.value)) == (tmp_path / "it" / "config.yaml").is_file()


@pytest.mark.parametrize("output", ["runs/a b", "no", "1e3", "null", "#5", "a: b", "'quoted'", "émile", "x,y"])
def test_a_written_configuration_reads_back(tmp_path: Path, output: str) -> None:
    """As a run writes it beside its results, and as a submission does."""
    config = RunConfig(output=output, seed=7)
    config.train.steps, config.optim.learning_rate = 3, 1e-5
    values = config.to_dict()
    values["optim"]["betas"] = list(values["optim"]["betas"])
    for text in (yaml.safe_dump(values, sort_keys=False), configuration_text(config)):
        assert parse(["--config", written(tmp_path, text)]) == config


def test_every_field_has_a_type_that_a_scalar_can_have() -> None:
    kinds = {kind for name, types in field_types().items() for kind in types}
    assert kinds == {int, float, str, bool, dict, type(None)}
    assert field_types()["train.micro_batch"] == (int, str, type(None))
    assert scalar("7", plain=True, kinds=(int, str)) == 7
    assert scalar("7", plain=False, kinds=(int, str)) == "7"
