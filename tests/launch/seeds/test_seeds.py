"""`zerobert seeds`: which runs it makes, how it goes on after a stop, and what it reports of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import TASKS
from engine.errors import RunError, UserError
from launch.seeds import report
from launch.seeds.command import main
from launch.seeds.plan import Record, plan, read_record, without_own
from launch.seeds.running import check_launcher
from tests.conftest import ROOT
from tests.train.runs import environment
from tests.warm import SERVER

STAND_IN = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
TRAINING = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.tsv"]


def seeds(output: Path, *own: str, training: tuple[str, ...] = ()) -> int:
    return main([*own, f"--launcher={STAND_IN}", "--", *TRAINING, f"--output={output}", *training])


def starts(output: Path, name: str) -> list[dict[str, str]]:
    path = output / f"{name}.starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def told(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return found


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_every_seed_is_a_run_and_the_report_is_of_all(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert seeds(output, "--seeds=4", training=("--seed=3", "--train.steps=5")) == 0
    for seed in (3, 4, 5, 6):
        (options,) = starts(output, f"seed-{seed}")
        assert options["seed"] == str(seed)
        assert options["output"] == str(output / f"seed-{seed}")
        assert (options["resume"], options["train.steps"]) == ("auto", "5")
    found = told(output)
    assert found["scores"]["accuracy"]["mean"] == pytest.approx(0.45)
    assert found["scores"]["accuracy"]["standard_deviation"] == pytest.approx(np.std([3, 4, 5, 6], ddof=1) / 10)
    low, high = found["scores"]["accuracy"]["interval_95"]
    assert 0.3 < low < 0.45 < high < 0.6
    assert (found["best"], found["worst"], found["note"]) == ("seed-6", "seed-3", None)
    text = (output / "report" / "report.md").read_text()
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in text.splitlines() if row.startswith("| ")}
    assert [cell.strip() for cell in cells["mean"]] == ["0.2375", "0.4500"]
    assert [cell.strip() for cell in cells["standard deviation"]] == ["0.0725", "0.1291"]
    assert "best seed-6 (accuracy 0.6000), worst seed-3 (0.3000)" in text
    assert (output / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert text in printed
    assert "training seed-4" in printed


def test_finished_runs_are_skipped_and_more_seeds_are_added(output: Path) -> None:
    assert seeds(output, "--seeds=1") == 0
    assert told(output)["note"].startswith("one run tells nothing")
    assert seeds(output, "--seeds=3") == 0
    assert [len(starts(output, f"seed-{seed}")) for seed in (1, 2, 3)] == [1, 1, 1]
    assert told(output)["note"].startswith("of 3 runs an interval says little")
    record = read_record(output)
    assert record is not None
    assert record.names == ["seed-1", "seed-2", "seed-3"]


def test_a_broken_run_ends_the_command_which_then_goes_on_there(output: Path) -> None:
    (output / "seed-2.json").write_text('{"code": 1}')
    with pytest.raises(RunError, match=r"^seed-2: ended with exit code 1 before its end; the same command goes on$"):
        seeds(output, "--seeds=3")
    assert not (output / "report").exists()
    assert starts(output, "seed-3") == []
    (output / "seed-2.json").unlink()
    assert seeds(output, "--seeds=3") == 0
    assert [len(starts(output, f"seed-{seed}")) for seed in (1, 2, 3)] == [1, 2, 1]


def test_the_mistake_that_a_run_tells_is_told_once(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (output / "seed-1.json").write_text('{"code": 2}')
    assert seeds(output, "--seeds=3") == 2
    assert capfd.readouterr().err.splitlines() == ["error: labelled.train: no such file"]
    assert read_record(output) is None


def test_runs_at_once_print_with_their_names(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert seeds(output, "--seeds=3", "--runs=3") == 0
    printed = capfd.readouterr().out
    assert all(f"seed-{seed}: training seed-{seed}\n" in printed for seed in (1, 2, 3))


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 0, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_a_stop_reaches_the_run_and_no_other_is_started(output: Path, number: int, code: int, name: str) -> None:
    (output / "seed-1.json").write_text('{"waits": true}')
    command = [sys.executable, "-m", "launch", "seeds", "--seeds=2", f"--launcher={STAND_IN}", "--", *TRAINING]
    process = subprocess.Popen(
        [*command, f"--output={output}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (output / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:  # as a terminal does; the stand-in ends by it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"stopped by {name}; the same command goes on" in printed
    assert starts(output, "seed-2") == []
    assert not (output / "report").exists()


def test_folds_are_runs_whose_examples_are_put_together(output: Path) -> None:
    assert seeds(output, "--folds=3") == 0
    for fold in (1, 2, 3):
        (options,) = starts(output, f"fold-{fold}")
        assert (options["labelled.folds"], options["labelled.fold"], options["seed"]) == ("3", str(fold), "1")
    found = told(output)
    assert found["folds"] == 3
    assert found["scores"]["accuracy"]["mean"] == pytest.approx(0.3)
    assert found["pooled"]["accuracy"] == pytest.approx((20 * 0.2 + 30 * 0.3 + 40 * 0.4) / 90)
    assert found["note"].startswith("folds share training examples")
    assert "| all folds together" in (output / "report" / "report.md").read_text()


@pytest.mark.parametrize("name", [name for name in TASKS.names if TASKS.get(name).section == "labelled"])
def test_every_task_on_labelled_data_can_hold_out_a_fold(name: str, tmp_path: Path) -> None:
    training = [f"--task={name}", "--model.init_from=bert", "--labelled.train=train", f"--output={tmp_path / 'out'}"]
    training += ["--labelled.text_pair=b", "--labelled.metric=mrr_at_10"] if name == "embeddings" else []
    output, record, members = plan(training, None, 3)
    assert [member.name for member in members] == ["fold-1", "fold-2", "fold-3"]
    assert record.metric in TASKS.get(name).metrics
    assert {"folds", "fold"} <= set(TASKS.get(name).fixed)
    assert not output.exists()


def test_folds_may_be_drawn_by_several_seeds() -> None:
    record = Record("sequence_classification", "accuracy", [1, 2], 2, {})
    assert record.names == ["seed-1-fold-1", "seed-1-fold-2", "seed-2-fold-1", "seed-2-fold-2"]


def test_other_settings_are_not_mixed_and_what_changes_no_score_is_free(output: Path) -> None:
    assert seeds(output, "--seeds=2") == 0
    with pytest.raises(
        UserError, match=r"^train.steps: 7 is not what the runs in .*out have \(None\); put it back, or"
    ):
        seeds(output, "--seeds=3", training=("--train.steps=7",))
    with pytest.raises(
        UserError, match=r"^folds: 2 is not what the runs in .*out have \(None\); give another --output"
    ):
        seeds(output, "--folds=2")
    assert seeds(output, "--seeds=2", training=("--train.micro_batch=1", "--monitor.csv=true")) == 0


def test_data_that_has_changed_between_runs_is_told(output: Path) -> None:
    assert seeds(output, "--seeds=2") == 0
    for seed, digest in ((1, "a"), (2, "b")):
        (output / f"seed-{seed}" / "export").mkdir()
        facts = {"facts": {"training examples": digest, "test examples": digest}}
        (output / f"seed-{seed}" / "export" / "zerobert.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"seed-2: its test examples are not those of seed-1; a file has changed since"):
        seeds(output, "--seeds=2")


def test_a_report_without_scores_is_named(output: Path) -> None:
    assert seeds(output, "--seeds=1") == 0
    (output / "seed-1" / "report" / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"seed-1/report/report.json: it tells no scores"):
        seeds(output, "--seeds=1")


def test_the_best_is_the_lowest_of_a_loss() -> None:
    record = Record("sequence_classification", "loss", [1, 2], None, {})
    found = report.summarise(record, {"seed-1": {"loss": 0.5}, "seed-2": {"loss": 0.2}})
    assert (found["best"], found["worst"]) == ("seed-2", "seed-1")


def test_the_commands_own_options_replace_the_trainings() -> None:
    arguments = ["--output", "a", "--train.steps", "3", "--seed=4", "--resume", "auto", "--debug"]
    assert without_own(arguments) == ["--train.steps", "3", "--debug"]


@pytest.mark.parametrize(
    ("own", "training", "message"),
    [
        (["--seeds=0"], [], "seeds: 0 is not allowed; give a whole number of at least 1"),
        (["--folds=1"], [], "folds: 1 is not allowed; give a whole number of at least 2"),
        (["--runs=0"], [], "runs: 0 is not allowed"),
        (["--seeds=two"], [], "seeds: 'two' is not allowed; give a whole number or null"),
        (["--seed=2"], [], "seed: no such field; did you mean seeds?"),
        (["--launcher=nothing-here -n 2"], [], "launcher: 'nothing-here' is no program here"),
        (["--launcher='x"], [], "launcher: \"'x\" can't be read"),
        (
            ["--runs=2", "--launcher=deepspeed --num_accelerators 2"],
            [],
            "launcher: 'deepspeed --num_accelerators 2' gives",
        ),
        ([], ["--task=pretrain"], "task: 'pretrain' is not allowed; seeds compares scores"),
        ([], ["--resume=runs/a/checkpoints/step-000010"], "resume: 'runs/a/checkpoints/step-000010' is not allowed"),
        ([], ["--labelled.folds=3", "--labelled.fold=1"], "labelled.folds: given beside seeds; give --folds before"),
        (["--folds=3"], ["--labelled.test=t.tsv"], "labelled.test: 't.tsv' is not allowed; each fold is the test"),
        (["--folds=3"], ["--labelled.validation=v.tsv"], "labelled.validation: 'v.tsv' is not allowed; the validation"),
        ([], ["--train.step=3"], "train.step: no such field; did you mean train.steps?"),
        ([], ["--seed=4294967295"], "seed: 4294967299 is not allowed; give a whole number in [0, 2^32)"),
        ([], ["--train.patience=0", "--train.eval_interval=5"], "train.patience: 0 is not allowed"),
        ([], ["--train.patience=3"], "train.patience: 3 is not allowed; it counts evaluations during training"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    tmp_path: Path, own: list[str], training: list[str], message: str
) -> None:
    given = TRAINING if training[:1] != ["--task=pretrain"] else []
    with pytest.raises(UserError) as caught:
        main([*own, "--", *given, f"--output={tmp_path / 'out'}", *training])
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_no_folder_of_seeds(output: Path) -> None:
    (output / "config.yaml").write_text("task: pretrain\n")
    with pytest.raises(UserError, match=r"^output: .*out is the folder of a single run; give another --output$"):
        seeds(output)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["seeds", "--seeds=0", "--", *TRAINING], "error: seeds: 0 is not allowed; give a whole number of at least 1"),
        (["compare", "none", "none"], "error: none: it is no folder; give the output folder of a finished run"),
        (["train", *TRAINING, "--train.patience=2"], "error: train.patience: 2 is not allowed; it counts evaluations"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_user_sees_one_line_and_exit_code_2(tmp_path: Path, command: list[str], message: str) -> None:
    done = SERVER.run([str(ROOT / "launch" / "__main__.py"), *command], [environment()], tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_training_stand_behind_two_dashes() -> None:
    with pytest.raises(
        UserError, match=r"^training: its options are missing; give them after --, as in zerobert seeds"
    ):
        main(["--seeds=3", "--config=launch/recipes/finetune.yaml"])


def test_a_score_that_data_decide_is_named_first(tmp_path: Path) -> None:
    data = ["--model.init_from=m", "--labelled.train=t", "--labelled.text_pair=b", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"^labelled\.metric: name the score by which runs are compared: spearman, "):
        main(["--seeds=3", "--", "--task=embeddings", *data])


def test_patience_of_pretraining_is_refused() -> None:
    from launch.configure.options import parse

    with pytest.raises(UserError, match=r"^train.patience: 2 is not allowed; task pretrain has no score that chooses"):
        parse(["--train.patience=2", "--train.eval_interval=5"])


@pytest.mark.parametrize(
    ("launcher", "at_once"),
    [
        ("deepspeed --num_accelerators 2", 1),
        ("deepspeed --num_accelerators 2 --master_port {port}", 2),
        ("torchrun --standalone --nproc_per_node 2", 2),
    ],
)
def test_launchers_lie_beside_python(launcher: str, at_once: int) -> None:
    words = check_launcher(launcher, at_once, {"PATH": "/usr/bin"})
    assert Path(words[0]).is_absolute()
    assert words[1:] == launcher.split()[1:]


def test_a_launcher_around_the_command_is_refused() -> None:
    with pytest.raises(UserError, match=r"^launcher: WORLD_SIZE is 2; start seeds by itself, and give it the launcher"):
        check_launcher("", 1, {"WORLD_SIZE": "2", "RANK": "0"})
