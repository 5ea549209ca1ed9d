"""`zerobert suite`: which runs it makes, how it goes on after failures, and what it reports of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.tasks.significance import paired_t
from launch.compare.command import compare
from launch.suite.command import main
from tests.conftest import ROOT
from tests.launch.suite.files import run_suite, starts, told, write_suite
from tests.launch.suite.stand_in import EXAMPLES, right_of, validation_of
from tests.train.runs import environment


def test_every_task_setting_and_seed_is_a_run_and_the_table_is_of_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, output = write_suite(tmp_path), tmp_path / "out"
    assert run_suite(path) == 0
    for task in ("rte", "own"):
        for epochs in (2, 4):
            for seed in (1, 2):
                (options,) = starts(output, f"bert/{task}/epochs={epochs}/seed-{seed}")
                assert (float(options["train.epochs"]), options["seed"]) == (epochs, str(seed))
                assert options["model.init_from"] == str(tmp_path / "bert")
                assert options["labelled.max_length"] == "16"
                assert options["resume"] == "auto"
    assert starts(output, "bert/rte/epochs=2/seed-1")[0]["labelled.text_pair"] == "sentence2"
    own = starts(output, "bert/own/epochs=2/seed-1")[0]
    assert own["labelled.train"] == str(tmp_path / "data" / "own.jsonl")

    printed = capfd.readouterr().out
    text = (output / "report" / "report.md").read_text()
    assert text in printed
    assert "bert/rte/epochs=2/seed-1: accuracy 0.1250 (validation 0.2500); 7 left" in printed
    assert text.startswith("# 8 of 8 runs\n")
    assert (output / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "bert/rte/epochs=2/seed-1.starts" not in printed  # what runs print is in their logs
    assert "--- started: " in (output / "bert" / "rte" / "epochs=2" / "seed-1.log").read_text()


def test_the_report_can_be_recomputed_by_hand(tmp_path: Path) -> None:
    path = write_suite(tmp_path, seeds=[1, 2, 5])
    assert run_suite(path) == 0
    found = told(tmp_path / "out")
    (result,) = (each for each in found["results"] if each["task"] == "own")
    means = {epochs: np.mean([right_of(epochs, seed) for seed in (1, 2, 5)]) / EXAMPLES for epochs in (2, 4)}
    scores = np.array([right_of(4, seed) for seed in (1, 2, 5)]) / EXAMPLES
    assert (result["chosen"], result["scored_on"], result["metric"]) == ("epochs=4", "test", "accuracy")
    assert result["score"]["mean"] == pytest.approx(means[4])
    assert result["score"]["standard_deviation"] == pytest.approx(scores.std(ddof=1))
    assert result["score"]["interval_95"] == pytest.approx([scores.min(), scores.max()], abs=0.02)
    assert result["validation"]["mean"] == pytest.approx(2 * means[4])
    assert result["of_settings"] == pytest.approx({"lowest_mean": means[2], "highest_mean": means[4]})
    assert result["of_runs"] == pytest.approx({"count": 6, "lowest": 5 / EXAMPLES, "highest": 13 / EXAMPLES})
    against = result["against_chosen"]["epochs=2"]
    assert against["difference"] == pytest.approx(means[2] - means[4])
    assert against["pairs"] == 3
    # the four examples that two more epochs have right are the same with each seed: no spread over seeds
    first, second = ([right_of(epochs, seed) / EXAMPLES for seed in (1, 2, 5)] for epochs in (4, 2))
    assert against["tests"]["paired_t"]["p"] == pytest.approx(paired_t(first, second).p)
    cells = compare(tmp_path / "out/bert/own/epochs=4", tmp_path / "out/bert/own/epochs=2")["scores"]["accuracy"]
    assert against["tests"] == cells["tests"]
    assert against["real"] is cells["real"]


def test_validation_chooses_and_the_test_score_of_the_choice_is_told(tmp_path: Path) -> None:
    """With 8 epochs the stand-in is best on the test examples and worst on those that choose."""
    path = write_suite(tmp_path, grid={"train.epochs": [4, 8]})
    assert run_suite(path) == 0
    (result,) = (each for each in told(tmp_path / "out")["results"] if each["task"] == "own")
    assert validation_of(8, 1) < validation_of(4, 1)
    assert result["chosen"] == "epochs=4"
    assert result["score"]["mean"] == pytest.approx((right_of(4, 1) + right_of(4, 2)) / 2 / EXAMPLES)
    assert result["of_settings"]["highest_mean"] > result["score"]["mean"]


def test_a_choice_by_the_examples_of_the_score_is_told(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    assert run_suite(path) == 0
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "of rte the setting is chosen by the examples that its score is of" in text
    assert "of 2 runs an interval says little" in text
    assert run_suite(write_suite(tmp_path, dev="test"), f"--output={tmp_path / 'honest'}") == 0
    text = (tmp_path / "honest" / "report" / "report.md").read_text()
    assert "chosen by the examples" not in text
    assert "accuracy, test" in text


def test_a_failed_run_loses_no_other_and_is_tried_again_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, output = write_suite(tmp_path), tmp_path / "out"
    cell = output / "bert" / "rte" / "epochs=2"
    cell.mkdir(parents=True)
    (cell / "seed-1.json").write_text(json.dumps({"code": 1, "error": "the loss of step 3 is nan"}))
    (cell / "seed-2.json").write_text(json.dumps({"code": 7}))
    assert run_suite(path) == 1
    printed = capfd.readouterr().out
    assert "bert/rte/epochs=2/seed-1: FAILED: the loss of step 3 is nan (see " in printed
    assert "bert/rte/epochs=2/seed-2: FAILED: ended with exit code 7 (see " in printed
    text = (output / "report" / "report.md").read_text()
    assert text.startswith("# 6 of 8 runs\n")
    assert "- bert/rte/epochs=2/seed-1: the loss of step 3 is nan\n" in text
    assert "- bert/rte/epochs=2/seed-2: ended with exit code 7\n" in text
    (result,) = (each for each in told(output)["results"] if each["task"] == "rte")
    assert (result["chosen"], result["finished_settings"], result["complete"]) == ("epochs=4", 1, False)
    for seed in (1, 2):
        (cell / f"seed-{seed}.json").unlink()
    assert run_suite(path) == 0
    assert [len(starts(output, f"bert/rte/epochs=2/seed-{seed}")) for seed in (1, 2)] == [2, 2]
    assert len(starts(output, "bert/rte/epochs=4/seed-1")) == 1
    assert "## Missing" not in (output / "report" / "report.md").read_text()


def test_mistakes_of_all_failed_runs_are_the_users(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    for epochs in (2, 4):
        for seed in (1, 2):
            behaviour = tmp_path / "out" / "bert" / "rte" / f"epochs={epochs}" / f"seed-{seed}.json"
            behaviour.parent.mkdir(parents=True, exist_ok=True)
            behaviour.write_text(json.dumps({"code": 2, "error": "labelled.train: bad"}))
    assert run_suite(path) == 2
    assert "no finished run" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_a_part_is_run_and_the_report_is_of_what_there_is(tmp_path: Path) -> None:
    path, output = write_suite(tmp_path), tmp_path / "out"
    assert run_suite(path, "--only", "rte") == 0
    assert starts(output, "bert/own/epochs=2/seed-1") == []
    assert "# 4 of 8 runs" in (output / "report" / "report.md").read_text()
    assert run_suite(path, "--only", "*/own/epochs=2") == 0
    assert "# 6 of 8 runs" in (output / "report" / "report.md").read_text()
    with pytest.raises(UserError, match=r"^only: 'cola' fits no cell; give such as bert/rte/epochs=2, or a part$"):
        run_suite(path, "--only", "cola")
    (output / "report" / "report.md").unlink()
    assert main([str(output)]) == 1  # two runs are missing
    assert "# 6 of 8 runs" in (output / "report" / "report.md").read_text()


def test_other_options_are_not_mixed_and_new_settings_join_the_table(tmp_path: Path) -> None:
    path, output = write_suite(tmp_path), tmp_path / "out"
    assert run_suite(path) == 0
    changed = write_suite(tmp_path, base={"model.init_from": "bert", "labelled.max_length": 32})
    with pytest.raises(
        UserError, match=r"^labelled.max_length: 32 is not what the runs in .*epochs=2 have \(16\);"
    ) as e:
        run_suite(changed)
    assert str(e.value).endswith(f"(base, line 4 of {path})")
    assert run_suite(write_suite(tmp_path, grid={"train.epochs": [6]})) == 0
    names = [cell["setting"] for cell in told(output)["cells"] if cell["task"] == "rte"]
    assert names == ["epochs=6", "epochs=2", "epochs=4"]


def test_models_are_compared_task_by_task(tmp_path: Path) -> None:
    path = write_suite(tmp_path, base=None, grid=None, models={
        "few": {"model.init_from": "bert", "train.epochs": 2}, "many": {"model.init_from": "bert", "train.epochs": 8},
    })  # fmt: skip
    assert run_suite(path) == 0
    found = told(tmp_path / "out")
    assert [(each["task"], each["best"], each["other"]) for each in found["models"]] == [
        ("rte", "many", "few"),
        ("own", "many", "few"),
    ]
    assert found["models"][0]["difference"]["difference"] == pytest.approx(-12 / EXAMPLES)
    assert found["models"][0]["difference"]["real"]
    assert "rte: few against many: -0.3000, different (p " in (tmp_path / "out" / "report" / "report.md").read_text()


def test_models_of_the_command_line_take_the_place_of_the_files(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    (tmp_path / "other" / "export").mkdir(parents=True)
    assert run_suite(path, "--only", "rte", "--models", f"{tmp_path / 'other' / 'export'}", f"x={tmp_path}") == 0
    assert starts(tmp_path / "out", "x/rte/epochs=2/seed-1")[0]["model.init_from"] == str(tmp_path)
    assert starts(tmp_path / "out", "other/rte/epochs=2/seed-1")[0]["model.init_from"].endswith("other/export")


def test_folds_take_the_place_of_test_examples(tmp_path: Path) -> None:
    own = {"task": "sequence_classification", "labelled.train": "own.jsonl", "folds": 3}
    path = write_suite(tmp_path, tasks={"own": own, "rte": {"glue": "rte", "folds": 2}}, seeds=1)
    assert run_suite(path) == 0
    options = starts(tmp_path / "out", "bert/own/epochs=2/fold-3")[0]
    assert (options["labelled.folds"], options["labelled.fold"]) == ("3", "3")
    assert "labelled.validation" not in starts(tmp_path / "out", "bert/rte/epochs=2/fold-1")[0]
    assert {cell["scored_on"] for cell in told(tmp_path / "out")["cells"]} == {"fold"}


def test_a_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_suite(tmp_path)
    assert run_suite(path, "--plan") == 0
    printed = capsys.readouterr().out
    assert "bert/own/epochs=4: 0 of 2 run(s) finished\n  zerobert train --model.init_from=" in printed
    assert "4 cell(s), 8 run(s), into " in printed
    assert not (tmp_path / "out").exists()


def test_a_user_sees_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = write_suite(tmp_path, tasks={"rte": {"glue": "rte", "train.step": 3}})
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "__main__.py"), "suite", str(path), "--output", str(tmp_path / "out")],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    place = f"(tasks.rte, line 9 of {path})"
    assert done.stderr == f"error: train.step: no such field; did you mean train.steps? {place}\n"
    assert not (tmp_path / "out").exists()
