"""The file of a ladder, the runs that it means, and what is told of mistakes in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.scaling.sizes import Proportions, counts, layer_parameters, size_near
from launch.scaling.ladder.cells import Ladder, plan_ladder, write_record
from launch.scaling.ladder.plan import main
from launch.scaling.ladder.reading import read_ladder
from launch.scaling.ladder.run import chosen
from tests.train.runs import ROOT

SIZES = "sizes: {from: 2e4, to: 2e5, count: 3}\n"
REST = "tokens_per_parameter: [5, 10, 20]\nproportions: {width_per_layer: 20, head_width: 16}\n"
RULES = "rules: {learning_rate: {value: 5e-3, at: 1e5, exponent: -0.3}, global_batch: 8}\n"


def base(store: Path) -> str:
    return f"base: {{data: {{path: {store}}}}}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "ladder.yaml"
    path.write_text(text)
    return path


def planned(folder: Path, text: str) -> Ladder:
    return plan_ladder(read_ladder(str(written(folder, text))), folder / "runs")


@pytest.fixture
def ladder(store: Path, tmp_path: Path) -> Ladder:
    return planned(tmp_path, base(store) + SIZES + REST + RULES)


def test_branches_begin_where_the_decay_of_their_budget_does(ladder: Ladder) -> None:
    assert [cell.is_trunk for cell in ladder.cells] == [True] * 6 + [False] * 12
    trunk = ladder.cells[0]
    small, middle, large = trunk.rung.budgets
    assert trunk.budget == large
    assert trunk.config.train.saved_steps == (small.begins, middle.begins)
    branch = next(cell for cell in ladder.cells if cell.rung == trunk.rung and cell.budget == middle)
    checkpoints = ladder.output / f"{trunk.rung.name}/seed-1/20x/checkpoints"
    assert branch.config.branch_from == str(checkpoints / f"step-{middle.begins:06d}")
    assert (branch.config.train.steps, branch.config.optim.decay) == (middle.steps, middle.decay)
    assert branch.config.optim.warmup == trunk.config.optim.warmup == trunk.rung.warmup <= small.begins


def test_rate_and_batch_follow_their_rules(ladder: Ladder) -> None:
    for rung in ladder.rungs:
        assert rung.learning_rate == pytest.approx(5e-3 * (rung.parameters / 1e5) ** -0.3)
        assert rung.batch == 8
        for budget, tokens in zip(rung.budgets, (5, 10, 20), strict=True):
            assert budget.steps * 8 * 128 == pytest.approx(tokens * rung.parameters, rel=0.05)


def test_the_largest_size_follows_from_the_flops_of_the_ladder(store: Path, tmp_path: Path) -> None:
    text = base(store) + "sizes: {from: 2e4, count: 3}\nflops: 2e13\n" + REST + RULES
    ladder = planned(tmp_path, text)
    assert 0.6 * 2e13 < ladder.flops <= 2e13
    assert [rung.parameters for rung in ladder.rungs] == sorted(rung.parameters for rung in ladder.rungs)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("target", [1e6, 8.5e7, 3e8])
def test_shapes_keep_their_proportions(architecture: str, target: float) -> None:
    size = size_near(target, architecture, Proportions())
    assert layer_parameters(size) == pytest.approx(target, rel=0.35)
    assert size.hidden == 64 * size.heads
    assert size.hidden / size.layers == pytest.approx(64, rel=0.7)


def test_parameters_are_counted_in_three_ways() -> None:
    size = size_near(1e6, "bert", Proportions())
    shape = size.shape(1000, pairs=False)
    found, hidden = counts(shape), size.hidden
    embeddings = 1000 * hidden + 512 * hidden + 2 * hidden + 2 * hidden
    assert found.all == shape.parameters() == found.no_embedding + embeddings + 1000
    assert found.with_decoder == found.no_embedding + 1000 * hidden + 1000


def test_the_plan_is_told_and_nothing_is_written(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, base(store) + SIZES + REST + RULES)
    assert main([str(path), "--output", str(tmp_path / "runs"), "--gpu", "h100", "--price", "2"]) == 0
    told = capsys.readouterr().out
    assert "18 runs, 0 of them finished" in told
    assert "at 2 a GPU and hour" in told
    main([str(path), "--gpu", "h100", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["flops"] == pytest.approx(sum(rung["flops"] for rung in plan["rungs"]))
    assert not (tmp_path / "runs").exists()


def test_runs_of_other_options_are_not_mixed(ladder: Ladder, store: Path, tmp_path: Path) -> None:
    write_record(ladder)
    other = base(store) + SIZES + REST + RULES.replace("5e-3", "6e-3")
    with pytest.raises(UserError, match=r"has bert-mlm/.* with another optim\.learning_rate; put it back"):
        planned(tmp_path, other)


def test_patterns_choose_runs(ladder: Ladder) -> None:
    name = ladder.rungs[0].name
    assert len(chosen(ladder, [f"{name}/*"])) == 6
    with pytest.raises(UserError, match="only: 'h7' fits no run; give such as bert-mlm/"):
        chosen(ladder, ["h7"])
    with pytest.raises(UserError, match=f"only: {name}/seed-1/5x begins with a checkpoint of {name}/seed-1/20x"):
        chosen(ladder, [f"{name}/seed-1/5x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ladder: PATH is empty; write fields such as sizes:"),
        (SIZES + RULES, "tokens: give token budgets of all sizes, or else tokens_per_parameter"),
        (SIZES + RULES + REST + "tokens: [1e6]\n", "tokens: give token budgets of all sizes, or else"),
        (SIZES + REST + RULES + "sises: 3\n", "ladder: no such key 'sises'; did you mean sizes?"),
        (REST + RULES, "sizes: PATH has none; write such as sizes:"),
        ("sizes: {to: 1e6, count: 2}\n" + REST + RULES, "sizes: from is missing; write such as"),
        ("sizes: {from: 1e6, to: 1e5, count: 2}\n" + REST + RULES, "sizes.to: 100000.0 is not allowed; give more than"),
        ("sizes: {from: -1, to: 1e5, count: 2}\n" + REST + RULES, "sizes.from: '-1' is not allowed; give a positive"),
        ("sizes: {from: 1e4, to: 1e5, count: 1}\n" + REST + RULES, "sizes.count: '1' is not allowed; give a whole"),
        ("sizes: {from: 1e4, count: 3}\n" + REST + RULES, "sizes: 'from and count alone' is not allowed; give to, or"),
        (SIZES + REST + RULES + "flops: 1e15\n", "sizes: 'to' is not allowed; the largest size follows from flops"),
        ("sizes: {from: 2e4, count: 3}\nflops: 1e9\n" + REST + RULES, "flops: 1e+09 are too few for 3 sizes"),
        ("sizes: [1e5, 1.01e5]\n" + REST + RULES, "sizes: two of them are h"),
        ("sizes: [20]\n" + REST + RULES, "sizes: no shape with heads of width 16 has about 20 parameters"),
        (
            SIZES + RULES + "tokens_per_parameter: [5, 4]\n",
            "tokens_per_parameter: [5.0, 4.0] is not allowed; give rising",
        ),
        (SIZES + RULES + REST.replace("[5, 10, 20]", "[0.01, 0.02]"), "tokens: 0.01x, 0.02x are 1, 1 steps of h"),
        (SIZES + RULES + "tokens: 5\n", "tokens: it takes a list of numbers"),
        (SIZES + RULES + "tokens: [a]\n", "tokens: 'a' is not allowed; give a positive number"),
        (SIZES + REST, "rules: PATH has none; rate and batch must go with the size"),
        (SIZES + REST + "rules: {learning_rate: 1e-3}\n", "rules.global_batch: None is not allowed; give a number"),
        (SIZES + REST + "rules: {rate: 1e-3}\n", "rules.rate: no such key; choose of learning_rate, global_batch"),
        (SIZES + REST + "rules: {learning_rate: {value: 1}}\n", "rules.learning_rate: give value, at (parameters) and"),
        (
            SIZES + REST + "rules: {learning_rate: {value: 1, at: 1, exponent: 9}}\n",
            "rules.learning_rate.exponent: '9' is not allowed; give -2 to 2",
        ),
        (SIZES + REST + RULES + "decay: 1.5\n", "decay: '1.5' is not allowed; give a positive number of at most 1"),
        (
            SIZES + REST + RULES + "decay: 0.9\nwarmup: 0.2\n",
            "warmup: 0.2 is not allowed; with decay 0.9 nothing is left",
        ),
        (SIZES + REST + RULES + "architectures: [gpt]\n", "architectures: 'gpt' is not allowed; choose of bert"),
        (
            SIZES + REST + RULES + "objectives: [mlm, mlm]\n",
            "objectives: ['mlm', 'mlm'] is not allowed; give each once",
        ),
        (SIZES + REST + RULES + "seeds: 0\n", "seeds: '0' is not allowed; give a whole number of at least 1"),
        (SIZES + REST + RULES + "abilities: {blimps: x}\n", "abilities.blimps: no such key; choose of blimp, labelled"),
        (SIZES + REST + RULES + "abilities: {labelled: {a: {test: x}}}\n", "abilities.labelled.a: train is missing"),
        (
            SIZES + REST + RULES + "base: {train: {steps: 3}}\n",
            "train.steps: the ladder gives it to each run; delete it",
        ),
        (SIZES + REST + RULES + "base: {train: {step: 3}}\n", "train.step: no such field"),
    ],
)
def test_mistakes_are_named(store: Path, tmp_path: Path, text: str, message: str) -> None:
    if text and "base:" not in text:
        text += base(store)
    with pytest.raises(UserError) as error:
        planned(tmp_path, text)
    assert str(error.value).replace(str(tmp_path / "ladder.yaml"), "PATH").startswith(message)


def test_a_ladder_needs_a_prepared_store(tmp_path: Path) -> None:
    nowhere = "base: {data: {path: nowhere}}\n"
    for text, message in (
        ("", "base.data.path: None is not allowed; give a prepared store"),
        (nowhere, "data.path: PATH/nowhere is no prepared store"),
    ):
        with pytest.raises(UserError) as error:
            planned(tmp_path, SIZES + REST + RULES + text)
        assert str(error.value).replace(str(Path.cwd()), "PATH").startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "gpus: 8 is not allowed; give gpu too"),
        (["--gpu", "x"], "gpu: 'x' is unknown; choose one of"),
        (["--gpu", "h100", "--gpus", "16"], "gpus: 16 can't share the global batch 8 of h"),
        (["--price", "-1"], "price: -1.0 is not allowed; give a positive number"),
    ],
)
def test_wrong_hardware_is_refused(store: Path, tmp_path: Path, options: list[str], message: str) -> None:
    path = written(tmp_path, base(store) + SIZES + REST + RULES)
    with pytest.raises(UserError) as error:
        main([str(path), *options])
    assert str(error.value).startswith(message)


def test_the_recipe_can_be_planned(store: Path, tmp_path: Path) -> None:
    recipe = ROOT / "launch" / "recipes" / "ladder_tiny.yaml"
    ladder = planned(tmp_path, recipe.read_text().replace("../../data/ladder", str(store)))
    assert len(ladder.cells) == 5 * 4 * 2
    assert 2e4 < ladder.rungs[0].parameters < ladder.rungs[-1].parameters < 4e5
