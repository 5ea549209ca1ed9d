"""The file of a suite: what it may hold, and what is told of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import UserError
from launch.suite.command import main
from launch.suite.reading import read_suite
from tests.launch.suite.files import write_rows, write_suite

GOOD = "tasks: {own: {task: sequence_classification, labelled.train: own.jsonl}}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_settings_and_grid_are_combined(tmp_path: Path) -> None:
    text = (
        GOOD
        + "settings:\n  plain:\n  warm: {optim: {warmup: 0.2}}\n"
        + "grid:\n  optim.learning_rate: [1e-5, 3e-5]\n  train.epochs: [3, 10]\n"
    )
    file = read_suite(str(written(tmp_path, text)))
    assert list(file.settings) == [
        f"{name},learning_rate={rate},epochs={epochs}"
        for name in ("plain", "warm")
        for rate in ("1e-5", "3e-5")
        for epochs in (3, 10)
    ]
    own, varied = file.settings["warm,learning_rate=3e-5,epochs=10"]
    assert dict(own.values) == {"optim.warmup": 0.2}
    assert dict(varied.values) == {"optim.learning_rate": 3e-5, "train.epochs": 10.0}
    assert file.seeds == (1, 2, 3, 4, 5)


def test_a_setting_may_be_the_only_one_and_lists_of_seeds_are_taken(tmp_path: Path) -> None:
    file = read_suite(str(written(tmp_path, GOOD + "seeds: [7, 0]\nmodels: {a: bert, b: {model.init_from: x}}\n")))
    assert list(file.settings) == ["default"]
    assert file.seeds == (7, 0)
    assert [source.values["model.init_from"] for source in file.models.values()] == ["bert", "x"]
    both = read_suite(str(written(tmp_path, GOOD + "grid: {optim.betas: [[0.9, 0.98], [0.9, 0.999]]}\n")))
    assert list(both.settings) == ["betas=0.9-0.98", "betas=0.9-0.999"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "suite: PATH is empty; write fields such as tasks: {rte: {glue: rte}}, or leave it out"),
        ("- a\n", "suite: PATH holds a list, and no fields; write fields such as tasks:"),
        ("tasks:\n\trte: 1\n", "suite: the recipe is not YAML (PATH, line 2: found character '\\t' that"),
        ("seeds: 3\n", "tasks: PATH has none; write such as tasks: {rte: {glue: rte}}"),
        ("tasks:\n", "tasks: names must stand under it, and what belongs to each; indent them (line 1 of PATH)"),
        ("tasks: [rte]\n", "tasks: names must stand under it"),
        (GOOD + "setings: {}\n", "suite: no such key 'setings'; did you mean settings? (line 2 of PATH)"),
        (GOOD + GOOD, "tasks: given twice in PATH, in line 1 and line 2; delete one"),
        ("tasks:\n  a: {task: regression}\n  a: {glue: rte}\n", "tasks.a: given twice in PATH, in line 2 and line 3"),
        ("tasks: {a/b: {glue: rte}}\n", "tasks: 'a/b' is not allowed as a name; it becomes a folder"),
        (GOOD + "models: {report: bert}\n", "models: 'report' is not allowed as a name"),
        ("tasks: {rte: 3}\n", "tasks.rte: names must stand under it"),
        ("tasks: {rte: {folder: x}}\n", "tasks.rte: a folder goes with glue: NAME; else give labelled.train"),
        ("tasks: {rte: {glue: rte, folds: 1}}\n", "tasks.rte.folds: '1' is not allowed; give a whole number of at"),
        (GOOD + "seeds: 0\n", "seeds: '0' is not allowed; give a whole number of at least 1 (line 2 of PATH)"),
        (GOOD + "seeds: []\n", "seeds: [] is not allowed; give different seeds, at least one (line 2 of PATH)"),
        (GOOD + "seeds: [1, 1]\n", "seeds: [1, 1] is not allowed; give different seeds"),
        (GOOD + "seeds: [1, x]\n", "seeds: 'x' is not allowed; give a whole number of at least 0"),
        (GOOD + "seeds: [4294967296]\n", "seeds: '4294967296' is not allowed"),
        (GOOD + "grid: {}\n", "grid: names must stand under it"),
        (GOOD + "grid: {train.epochs: []}\n", "grid: train.epochs takes a list of values, such as [2e-5, 5e-5]"),
        (GOOD + "grid: {train.epochs: 3}\n", "grid: train.epochs takes a list of values"),
        (GOOD + "grid: {train.epochs: [3, 3]}\n", "grid: epochs=3 is twice (line 2 of PATH)"),
        (GOOD + "grid: {model.init_from: [a/b]}\n", "grid: init_from=a/b is no name of a folder; give it as a named"),
        (GOOD + "grid: {train.epoch: [3]}\n", "train.epoch: no such field; did you mean train.epochs? (grid, line 2"),
        (GOOD + "settings: {a: {train.epoch: 3}}\n", "train.epoch: no such field; did you mean train.epochs? (setti"),
        (GOOD + "settings: {a: 3}\n", "settings.a: options must stand under it, such as {train: {epochs: 3}}"),
        (GOOD + "base: [a]\n", "base: options must stand under it"),
        (GOOD + "base: {train.epochs: many}\n", "train.epochs: 'many' is not allowed; give a number or null (base"),
        (GOOD + "base:\n  seed: 3\n", "seed: the suite gives it to each run; delete it (base, line 3 of PATH)"),
        (GOOD + "base: {output: x}\n", "output: the suite gives it to each run; delete it (base, line 2 of PATH)"),
        (GOOD + "base: {config: x}\n", "config: the suite gives it to each run"),
        (GOOD + "base: {labelled: {folds: 3}}\n", "labelled.folds: the suite gives it to each run"),
        (GOOD + "settings: {a: {train.epochs: 3}}\ngrid: {train.epochs: [4]}\n", "train.epochs: the grid varies it"),
        (GOOD + "dev: both\n", "dev: 'both' is not allowed; choose validation or test (PATH)"),
        (GOOD + "data: [x]\n", "data: it takes one text (line 2 of PATH)"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_suite(str(path))
    told = str(caught.value).replace(str(path), "PATH")
    assert told.startswith(message)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": {"rte": {"glue": "rtw"}}}, "tasks.rte.glue: 'rtw' is not allowed; choose one of cola, sst2, mrpc"),
        ({"tasks": {"cola": {"glue": "cola"}}}, "tasks.cola.folder: 'DATA/CoLA' is not there; give that of the task's"),
        ({"tasks": {"x": {"task": "pretrain"}}, "base": None}, "task: 'pretrain' is not allowed; seeds compares"),
        ({"tasks": {"x": {"task": "regresion"}}}, "task: 'regresion'"),
        (
            {"tasks": {"x": {"task": "regression", "labelled.train": "no.jsonl"}}},
            "labelled.train: 'DATA/no.jsonl' is not there; correct it (tasks.x, line 9 of",
        ),
        ({"models": {"a": "./nowhere"}, "base": None}, "model.init_from: './nowhere' is not there; correct it (mod"),
        ({"base": {"model.init_from": "bert", "labelled.metric": "bleu"}, "tasks": {"own": {
            "task": "sequence_classification", "labelled.train": "own.jsonl"}}},
            "labelled.metric: 'bleu' is not allowed; choose one of accuracy"),
        ({"grid": {"train.patience": [2]}}, "train.patience: 2 is not allowed; it counts evaluations during training; "
            "give train.eval_interval too (grid, line"),
    ],
)  # fmt: skip
def test_options_are_checked_before_anything_runs(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    path = write_suite(tmp_path, **changed)
    with pytest.raises(UserError) as caught:
        main([str(path), f"--output={tmp_path / 'out'}"])
    assert str(caught.value).replace(str(tmp_path / "data"), "DATA").startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.yaml"], "suite: 'none.yaml' can't be read (No such file or directory); give a suite, such as those in"),
        (["OWN", "--runs=0"], "runs: 0 is not allowed; give a whole number of at least 1"),
        (["OWN", "--models", "a=b", "a=c"], "models: 'a=c' is not allowed; give each as NAME=FOLDER, with a name"),
        (["OWN", "--models", "report=b"], "models: 'report=b' is not allowed"),
        (["OWN", "--", "--nodes=2"], "submit: options of a job stand after -- without it; add --submit"),
        (["OWN", "--submit", "--launcher=mpirun"], "launcher: with --submit srun starts the ranks"),
        (["OWN", "--submit", "--", "--array=1-2%1"], "array: '1-2%1' is not allowed; it is the runs of the file"),
        (
            ["OWN", "--submit", "--", "--train.steps=2"],
            "train.steps=2: options of the training stand in the file;",
        ),
        (["OWN", "--submit", "--", "--nodes=0"], "nodes: 0 is not allowed"),
        (["HERE"], "suite: HERE is a folder and holds no runs; give a YAML file, or the folder of its runs"),
        (["HERE", "--runs=2"], "suite: HERE is a folder, of which only the report is made"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    path = write_suite(tmp_path)
    given = [option.replace("OWN", str(path)).replace("HERE", str(tmp_path)) for option in options]
    output = [] if "HERE" in options else [f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError) as caught:
        main([given[0], *output, *given[1:]])
    assert str(caught.value).replace(str(tmp_path), "HERE").startswith(message)


def test_a_record_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"suite.json: it is no record of a suite \(KeyError\('model'\)\); remove it"):
        main([str(tmp_path)])


def test_paths_are_those_of_the_data_folder_or_beside_the_file(tmp_path: Path) -> None:
    from launch.suite.plan import plan_suite

    path = write_suite(tmp_path, output="here")
    write_rows(tmp_path / "other" / "own.jsonl")
    write_rows(tmp_path / "other" / "rte" / "train.jsonl")
    write_rows(tmp_path / "other" / "rte" / "validation.jsonl")
    suite = plan_suite(read_suite(str(path)), None, tmp_path / "other", [])
    assert suite.output == tmp_path / "here"
    own = next(cell for cell in suite.cells if cell.task == "own").record.options
    assert own["labelled.train"] == str(tmp_path / "other" / "own.jsonl")
    assert own["model.init_from"] == str(tmp_path / "bert")
