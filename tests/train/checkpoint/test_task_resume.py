"""Every task on labelled data, killed at a random step: losses, scores and predictions of a run that nobody disturbed.

Resumed with the layout that it had they are equal bit for bit, with dropout; with another one up to rounding, without.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.curves import Curve
from tests.tasks.answers import test_task as answers
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert, tiny_teacher
from tests.tasks.tokens.folders import save_model, write_conll
from tests.train.checkpoint.test_resume import kill_in_mid_run
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference

STEPS = 12
BOUND = 1e-5
DROPOUT = ["--model.hidden_dropout=0.1", "--model.attention_dropout=0.1"]
USUAL = ["--labelled.max_length=14", "--optim.learning_rate=5e-3"]
SIZES = {"train": 90, "validation": 24, "test": 21}


@dataclass(frozen=True)
class Case:
    """A task with options of its own."""

    task: str
    options: tuple[str, ...] = ()
    splits: tuple[str, ...] = tuple(SIZES)
    early: bool = False
    """whether its patience ends it before the last step"""
    drawn: bool = False
    """whether it draws random numbers even without dropout, or can't do without dropout"""
    taught: bool = False
    """whether it has a teacher"""


WEIGHTS = ("--labelled.class_weights=balanced", "--labelled.label_smoothing=0.1")
LOSS = "--labelled.metric=loss"
WINDOWS = ("--labelled.max_length=16", "--labelled.stride=4")
ANSWERS = ("--labelled.max_length=28", "--labelled.stride=8")
CASES = {
    # by its default, the correlation, the best may be a step whose predictions are all but equal: rounding decides it
    "regression": Case("regression", ("--labelled.metric=mse",)),
    "several labels": Case("multi_label_classification"),
    "choices": Case("multiple_choice"),
    "classes": Case("sequence_classification"),
    "decay to the start, averages": Case(
        "sequence_classification", ("--regularise.start_decay=20", "--regularise.ema=0.8", "--labelled.metric=loss")
    ),
    "weighted and smoothed classes": Case("sequence_classification", WEIGHTS),
    "weighted classes in order": Case("sequence_classification", ("--labelled.loss=ordinal", WEIGHTS[0])),
    "a fold, with patience": Case(
        "sequence_classification",
        (
            "--labelled.folds=3",
            "--labelled.fold=2",
            "--train.patience=1",
            "--labelled.metric=loss",
            "--optim.learning_rate=2e-2",
            "--optim.schedule=constant",
        ),
        ("train",),
        early=True,
    ),
    "tags": Case("token_classification", WINDOWS),
    "weighted and smoothed tags": Case("token_classification", (*WINDOWS, *WEIGHTS)),
    "augmented classes": Case("sequence_classification", ("--labelled.augment=characters",)),
    "augmented tags": Case("token_classification", (*WINDOWS, "--labelled.augment=eda_neighbours")),
    "answers": Case("question_answering", ANSWERS),
    "two passes under other dropout": Case("multiple_choice", ("--regularise.r_drop=1",), drawn=True),
    "noise of several steps": Case("token_classification", (*WINDOWS, "--regularise.adversarial=freelb"), drawn=True),
    "noise along the gradient": Case("question_answering", (*ANSWERS, "--regularise.adversarial=fgm")),
    "taught classes": Case(
        "sequence_classification",
        ("--distil.hidden=0.5", "--distil.relations=0.5", "--labelled.metric=loss"),
        taught=True,
    ),
    "mixed classes": Case("sequence_classification", ("--regularise.mixup=0.4",), drawn=True),
}
EVERY = [(name, stage) for name in CASES for stage in (2, 3)]


def options(folder: Path, case: Case, stage: int) -> list[str]:
    """Of a run on two ranks that accumulate twice."""
    if case.task == "token_classification":
        model = save_model(folder / "bert")
        files = {name: write_conll(folder / name, SIZES[name], seed) for seed, name in enumerate(case.splits)}
    elif case.task == "question_answering":
        model = answers.save_folder(folder / "bert")
        rows = {name: answers.rows_of(SIZES[name], seed, 0.3) for seed, name in enumerate(case.splits)}
        files = {name: write(folder / f"{name}.jsonl", rows[name]) for name in case.splits}
    else:
        model = tiny_bert(folder / "bert")
        rows = {name: ROWS[case.task](SIZES[name], seed) for seed, name in enumerate(case.splits)}
        files = {name: write(folder / f"{name}.jsonl", rows[name]) for name in case.splits}
    taught = [f"--distil.teachers={tiny_teacher(folder / 'teacher', '0123')}"] if case.taught else []
    given = {option.partition("=")[0] for option in case.options}
    usual = [option for option in USUAL if option.partition("=")[0] not in given]
    return [
        f"--task={case.task}", f"--model.init_from={model}", *(f"--labelled.{name}={files[name]}" for name in files),
        f"--train.steps={STEPS}", "--train.micro_batch=4", "--train.eval_interval=2", "--train.save_interval=2",
        f"--train.zero_stage={stage}", *usual, *case.options, *taught,
    ]  # fmt: skip


def kill(output: Path, arguments: list[str], early: bool) -> None:
    """Kill -9 both ranks at a random time, with a checkpoint behind them and steps before them."""
    step = 2 * random.randint(1, 2 if early else 4)
    delay = random.uniform(0.0, 0.2)
    print(f"killed {delay:.3f} s behind the checkpoint of step {step}")
    kill_in_mid_run(output, *arguments, step=step, delay=delay)


def curves(output: Path, case: Case) -> dict[str, Curve]:
    held_out = "eval/mse" if case.task == "regression" else "eval/loss"
    names = ("train/loss", "train/grad_norm", "train/learning_rate", held_out)
    return {name: losses(output, name) for name in names}


def report(output: Path) -> dict[str, bytes]:
    """The files of the report, those of text and numbers."""
    files = sorted(path for path in (output / "report").iterdir() if path.suffix != ".png")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), EVERY)
def test_a_killed_run_ends_as_if_nobody_had_disturbed_it(tmp_path: Path, name: str, stage: int) -> None:
    case = CASES[name]
    arguments = [*options(tmp_path, case, stage), *DROPOUT]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, *arguments, ranks=2)
    kill(killed, arguments, case.early)
    assert "resumed" in run(killed, *arguments, "--resume=auto", ranks=2)
    truth = curves(undisturbed, case)
    end = len(truth["train/loss"])
    assert end < STEPS if case.early else end == STEPS
    assert curves(killed, case) == truth
    assert len(report(undisturbed)) >= 3
    assert report(killed) == report(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [each for each in EVERY if not CASES[each[0]].drawn])
def test_a_killed_run_goes_on_at_another_layout(tmp_path: Path, name: str, stage: int) -> None:
    case = CASES[name]
    arguments = [*options(tmp_path, case, stage), *NO_DROPOUT]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, *arguments, ranks=2)
    kill(killed, arguments, case.early)
    assert "resumed" in run(killed, *arguments, "--resume=auto", "--train.zero_stage=0", "--train.micro_batch=16")
    truth, found = curves(undisturbed, case), curves(killed, case)
    for tag in truth.keys() - {"train/grad_norm"}:
        assert len(found[tag]) == len(truth[tag])
        worst = largest_difference(found[tag], truth[tag])
        print(f"{name}, from 2 ranks at ZeRO-{stage} to one: {tag} differs by up to {worst:.1e}")
        assert worst < BOUND
    scores = [json.loads(report(output)["report.json"])["scores"] for output in (killed, undisturbed)]
    assert scores[0] == pytest.approx(scores[1], rel=BOUND)
