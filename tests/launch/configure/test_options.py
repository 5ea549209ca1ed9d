"""Where a run's values come from: defaults, recipes, the command line, and what wins where two exclude each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.configure.options import parse, parse_options
from launch.curves import main as curves
from tests.train.runs import SCRIPT, environment, losses, run


def recipe(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text)
    return f"--config={folder / name}"


EPOCHS = "task: sequence_classification\nmodel: {init_from: x}\nlabelled: {train: x.csv}\ntrain: {epochs: 3}\n"


def test_the_command_line_wins_where_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    config = parse([recipe(tmp_path, EPOCHS), "--train.steps", "24"])
    assert (config.train.steps, config.train.epochs) == (24, None)
    config = parse([recipe(tmp_path, "train: {steps: 900}"), "--train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    config = parse([recipe(tmp_path, EPOCHS), "--train.steps", "null"])
    assert (config.train.steps, config.train.epochs) == (None, 3.0)


@pytest.mark.parametrize("place", ["recipe", "command line"])
def test_both_in_one_place_are_refused_by_name(tmp_path: Path, place: str) -> None:
    text = "train: {steps: 5, epochs: 2}" if place == "recipe" else "seed: 1"
    options = [] if place == "recipe" else ["--train.steps=5", "--train.epochs=2"]
    with pytest.raises(UserError, match=r"train\.epochs: 2\.0 .* train\.steps \(5\), not both"):
        parse([recipe(tmp_path, text), *options])


def test_the_place_of_the_recipe_on_the_command_line_does_not_matter(tmp_path: Path) -> None:
    config = parse(["--train.steps=9", recipe(tmp_path, "seed: 5\ntrain: {steps: 7, global_batch: 16}")])
    assert (config.seed, config.train.steps, config.train.global_batch) == (5, 9, 16)


def test_a_later_recipe_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first = recipe(tmp_path, "seed: 5\ntrain: {steps: 7}", "a.yaml")
    second = recipe(tmp_path, "train: {epochs: 2}", "b.yaml")
    config = parse([first, second])
    assert (config.seed, config.train.steps, config.train.epochs) == (5, None, 2.0)


def test_a_named_size_replaces_a_recipes_dimensions(tmp_path: Path) -> None:
    small = recipe(tmp_path, "model: {hidden_size: 64, layers: 1, heads: 2, intermediate_size: 100, hidden_dropout: 0}")
    config = parse([small, "--model.size=base"])
    assert config.model.dimensions() == (768, 12, 12, 3072)
    assert config.model.hidden_dropout == 0
    assert parse([small, "--model.layers=3"]).model.dimensions() == (64, 3, 2, 100)
    assert parse(["--model.size=base", "--model.layers=3"]).model.dimensions() == (768, 3, 12, 3072)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.size=base"], r"model\.size: 'base' has no effect: model\.init_from .* has hidden_size 48; leave"),
        (
            ["--model.layers=6"],
            r"model\.layers: 6 has no effect: model\.init_from .* has layers 3; leave one of the two",
        ),
        (["--model.max_positions=512"], r"model\.max_positions: 512 has no effect: .* has max_positions 64"),
    ],
)
def test_dimensions_against_those_of_the_folder_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    folder = start_model(tmp_path / "model")
    given = recipe(tmp_path, f"model: {{size: large, init_from: {folder}}}")
    assert parse([given, "--model.layers=3", "--model.hidden_size=48"]).model.init_from == str(folder)
    with pytest.raises(UserError, match=message):
        parse([given, *options])


def test_positions_of_a_folder_are_extended_where_no_weight_depends_on_them(tmp_path: Path) -> None:
    folder = start_model(tmp_path / "model", "modernbert")
    given = [f"--model.init_from={folder}", "--model.max_positions=4096", "--model.rope_theta=160000"]
    assert parse(given).model.max_positions == 4096
    with pytest.raises(UserError, match=r"model\.layers: 6 has no effect"):
        parse([*given, "--model.layers=6"])


@pytest.mark.parametrize("option", ["window=64", "global_every=2", "rope_theta=1e4", "local_rope_theta=1e4"])
def test_options_of_another_architecture_are_refused(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(UserError, match=rf"model\.{name}: .* has no effect: .*'bert' .*take one of type 'modernbert'"):
        parse([f"--model.{option}"])
    assert getattr(parse([f"--model.{option}", "--model.architecture=modernbert"]).model, name) is not None


def start_model(folder: Path, kind: str = "bert") -> Path:
    folder.mkdir()
    numbers = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"model_type": kind, "vocab_size": 999, "max_position_embeddings": 64, **numbers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CLASSIFY = ["--task=sequence_classification", "--labelled.train=a.csv", "--model.init_from=bert"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labelled.train=a.csv"], "labelled.train: 'a.csv' has no effect while task is pretrain; give --task seq"),
        (["--labelled.test=a.csv"], "labelled.test: 'a.csv' has no effect"),
        (["--labelled.metric=loss"], "labelled.metric: 'loss' has no effect while task is pretrain; give --task seq"),
        (
            [*CLASSIFY, "--data.objective=mlm"],
            "data.objective: 'mlm' has no effect while task is sequence_classification; give --task pretrain, or leave",
        ),
        ([*CLASSIFY, "--data.mask_probability=0.3"], "data.mask_probability: 0.3 has no effect while task is seq"),
        ([*CLASSIFY, "--data.short_sequence_probability=0"], "data.short_sequence_probability: 0.0 has no effect"),
        (
            ["--data.objective=mlm", "--data.short_sequence_probability=0.2"],
            "data.short_sequence_probability: 0.2 has no effect while data.objective is mlm; give --data.objective",
        ),
        (["--zero.nvme_path=/x"], "zero.nvme_path: '/x' has no effect while zero.offload_optimizer is none"),
        (
            ["--optim.power=3"],
            "optim.power: 3.0 has no effect while optim.schedule is linear; give --optim.schedule poly",
        ),
        (["--optim.max_trust_ratio=3"], "optim.max_trust_ratio: 3.0 has no effect while optim.name is adamw"),
        (["--train", "{steps: 3}"], "train: it is a section; give its fields one by one, as --train.NAME VALUE"),
        (["--config"], "config: a file is missing; give --config RECIPE"),
        (["--config", "--train.steps=3"], "config: a file is missing"),
        (["--train.steps"], "train.steps: its value is missing; give one after it"),
        (["--debug=1"], "debug: '1' is not allowed; it takes no value"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(options)
    assert str(caught.value).startswith(message)


def test_loader_processes_are_every_task_s() -> None:
    assert parse([*CLASSIFY, "--data.workers=1"]).data.workers == 1


def test_a_recipe_may_hold_what_the_command_line_switches_off(tmp_path: Path) -> None:
    pairs = recipe(tmp_path, "data: {objective: mlm, sequence_length: 64}", "pairs.yaml")
    assert parse([pairs, *CLASSIFY]).task == "sequence_classification"
    nvme = recipe(tmp_path, "train: {zero_stage: 3}\nzero: {offload_optimizer: nvme, nvme_path: /x}")
    assert parse([nvme, "--zero.offload_optimizer=cpu"]).zero.offload_optimizer == "cpu"
    assert parse([nvme, "--zero.offload_optimizer=nvme"]).zero.nvme_path == "/x"


def test_debug_gives_way_to_what_stands_beside_it(tmp_path: Path) -> None:
    long = recipe(tmp_path, "train: {steps: 900, global_batch: 256, save_interval: 5}\nmodel: {size: base}")
    config = parse([long, "--debug"])
    assert (config.train.steps, config.train.global_batch, config.train.save_interval) == (10, 8, None)
    assert config.model.dimensions() == (64, 2, 2, 128)
    config = parse([long, "--debug", "--train.steps=24", "--train.global_batch=16", "--model.layers=3"])
    assert (config.train.steps, config.train.global_batch) == (24, 16)
    assert config.model.dimensions() == (64, 3, 2, 128)
    config = parse(["--debug", "--train.epochs=1", "--model.size=mini", "--data.workers=1"])
    assert (config.train.steps, config.train.epochs, config.model.size, config.data.workers) == (None, 1, "mini", 1)


def test_an_option_given_twice_is_told_and_the_last_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--train.steps", "3", "--seed=1", "--train.steps=5", "--seed", "1"]).train.steps == 5
    assert capsys.readouterr().out == "note: train.steps is given twice, as 3 and 5; the last counts\n"
    with pytest.raises(UserError, match=r"tags: given twice, \['a'\] and \['b'\]; write all values after one --tags"):
        curves(["run", "--tags", "a", "--tags", "b"])


SIZES = {"train_batch_size": 64, "zero_optimization": {"stage": 1}, "scheduler": {"params": {}, "type": "WarmupLR"}}


def deepspeed(folder: Path, **values: object) -> str:
    (folder / "ds.json").write_text(json.dumps(SIZES | values))
    return str(folder / "ds.json")


def test_a_deepspeed_file_counts_as_part_of_what_names_it(tmp_path: Path) -> None:
    file = deepspeed(tmp_path)
    within = recipe(tmp_path, f"deepspeed_config: {file}\ntrain: {{global_batch: 64}}", "in.yaml")
    beside = recipe(tmp_path, "train: {zero_stage: 3, epochs: 2}", "beside.yaml")
    config = parse([within, "--train.zero_stage=2"])
    assert (config.train.zero_stage, config.train.global_batch) == (2, 64)
    config = parse([beside, f"--deepspeed_config={file}"])
    assert (config.train.zero_stage, config.train.global_batch, config.train.epochs) == (1, 64, 2.0)
    both = recipe(tmp_path, f"deepspeed_config: {file}\ntrain: {{zero_stage: 3}}", "both.yaml")
    for refused in ([both], [f"--deepspeed_config={file}", "--train.zero_stage=3"]):
        with pytest.raises(UserError, match=r"zero_optimization\.stage is 1, but train\.zero_stage is given as 3"):
            parse(refused)


def test_a_deepspeed_files_steps_and_a_recipes_epochs_exclude_each_other(tmp_path: Path) -> None:
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 500}}
    file = deepspeed(tmp_path, scheduler=schedule)
    epochs = recipe(tmp_path, "train: {epochs: 2}", "epochs.yaml")
    within = recipe(tmp_path, f"deepspeed_config: {file}", "in.yaml")
    config = parse([epochs, f"--deepspeed_config={file}"])
    assert (config.train.steps, config.train.epochs) == (500, None)
    config = parse([within, "--train.epochs=1"])
    assert (config.train.steps, config.train.epochs) == (None, 1.0)
    assert parse([within, "--train.steps=7"]).train.steps == 7
    with pytest.raises(UserError, match=r"total_num_steps is 500, but train\.epochs is given as 2"):
        parse([f"--deepspeed_config={file}", "--train.epochs=2"])


def test_given_names_what_was_given_and_not_replaced(tmp_path: Path) -> None:
    found = parse_options([recipe(tmp_path, "debug: false\nseed: 2\ntrain: {epochs: 3}"), "--train.steps=4"])
    assert found.given == {"seed", "train.steps"}


def test_a_plan_needs_neither_labels_nor_a_model() -> None:
    config = parse_options(["--task=sequence_classification"], complete=False).config
    assert config.labelled.train is None
    with pytest.raises(UserError, match=r"^labelled\.train: None"):
        parse_options(["--task=sequence_classification"])


@pytest.mark.slow
def test_a_runs_own_config_trains_it_again(store: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "no", tmp_path / "again"
    run(first, f"--data.path={store}", "--train.steps=3")
    again = [sys.executable, SCRIPT, f"--config={first / 'config.yaml'}", f"--output={second}"]
    subprocess.run(again, env=environment(), capture_output=True, check=True)
    assert losses(second) == losses(first)
    assert len(losses(second)) == 3
