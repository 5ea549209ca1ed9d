"""A wrong command line is one line that names the field, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import UserError
from launch.cli import run_command
from launch.configure.options import debug_config, parse


def failure(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.learnin_rate", "1"], "optim.learnin_rate: no such field; did you mean optim.learning_rate?"),
        (["--optim.learning_rate", "fast"], "optim.learning_rate: 'fast' is not allowed; give a number"),
        (["--train.steps", "1.5"], "train.steps: '1.5' is not allowed; give a whole number or null"),
        (["--train.precision", "fp8"], "train.precision: 'fp8' is not allowed; give one of fp32, bf16, fp16"),
        (["--train.zero_stage", "two"], "train.zero_stage: 'two' is not allowed; give a whole number"),
        (["--train.zero_stage", "5"], "train.zero_stage: 5 is not allowed; choose 0, 1, 2 or 3"),
        (["--qwertyuiop", "1"], "qwertyuiop: no such field; see --help for the fields"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], expected: str) -> None:
    assert failure(*arguments) == expected


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("optim: {learning_rat: 1}", "optim.learning_rat: no such field; did you mean optim.learning_rate?"),
        ("sede: 1", "sede: no such field; did you mean seed?"),
        ("train: {steps: many}", "train.steps: 'many' is not allowed; give a whole number or null"),
        ("optim: {learning_rate: [", "config"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, yaml: str, expected: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml)
    message = failure("--config", str(recipe))
    assert message.startswith(expected)
    assert "\n" not in message


def test_a_missing_recipe_is_named() -> None:
    assert failure("--config", "/nowhere.yaml").startswith("config: ")


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 5\ntrain: {steps: 7, global_batch: 16}\n")
    config = parse(["--config", str(recipe), "--train.steps", "9"])
    assert (config.seed, config.train.steps, config.train.global_batch, config.train.zero_stage) == (5, 9, 16, 2)


def test_scientific_notation_in_a_recipe_is_a_number(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {learning_rate: 1e-3}\n")
    assert parse(["--config", str(recipe)]).optim.learning_rate == 1e-3


def test_help_explains_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "sequences in an optimizer step, over all ranks" in text


def test_print_config_prints_what_a_recipe_can_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--train.steps", "3", "--print_config"])
    assert caught.value.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert parse(["--config", str(recipe)]) == parse(["--train.steps", "3"])


@pytest.mark.parametrize(
    "recipe", sorted(Path(__file__).parents[2].glob("launch/recipes/[!l]*.yaml")), ids=lambda p: p.name
)
def test_every_recipe_parses(recipe: Path) -> None:
    needed = ["--model.init_from=x", "--labelled.train=x"] if "finetune" in recipe.name else []
    needed += ["--distil.teachers=x"] if "distil" in recipe.name else []
    assert parse(["--config", str(recipe), *needed]).output.startswith("runs/")


def test_debug_is_small_and_strict() -> None:
    config = debug_config(parse(["--train.steps", "500", "--train.global_batch", "4096"]))
    assert (config.train.steps, config.train.global_batch, config.data.workers) == (10, 8, 0)
    assert config.train.deterministic
    assert config.train.detect_anomaly
    config.validate()


def test_a_users_mistake_exits_with_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(_: list[str]) -> int:
        raise UserError("seed: -1 is not allowed")

    with pytest.raises(SystemExit) as caught:
        run_command(mistake, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: seed: -1 is not allowed\n"
