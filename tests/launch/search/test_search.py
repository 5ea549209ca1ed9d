"""`zerobert search`: trials over a space, shared by several processes, with nothing lost and nothing counted twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from engine.config import RunConfig
from engine.errors import RunError, UserError
from launch.search import study
from launch.search.command import check_training, main
from launch.search.space import Interval, read_space
from launch.seeds.plan import without
from tests.conftest import ROOT
from tests.train.runs import environment

STAND_IN = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
RATES = "optim.learning_rate: {low: 1e-5, high: 1e-1, log: true}\n"
TRAINING = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.tsv"]


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(RATES)
    return path


def arguments(space: Path, *own: str, training: tuple[str, ...] = ()) -> list[str]:
    launched = [f"--space={space}", *own, f"--launcher={STAND_IN}"]
    return [*launched, "--", *TRAINING, f"--output={space.parent / 'out'}", *training]


def report(space: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((space.parent / "out" / "report" / "report.json").read_text())
    return found


@pytest.mark.slow
def test_the_best_trial_is_found_told_and_written_as_a_recipe(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space.write_text(RATES + "optim.schedule: [linear, cosine]\n")
    given = ("--optim.learning_rate", "1", "--train.eval_interval=1")
    assert main(arguments(space, "--trials=6", "--sampler=random", training=given)) == 0
    trials = report(space)["trials"]
    assert [trial["number"] for trial in trials] == list(range(6))
    for trial in trials:
        folder = space.parent / "out" / f"trial-{trial['number']:04d}"
        (started,) = [json.loads(line) for line in (folder / "starts.txt").read_text().splitlines()]
        assert float(started["optim.learning_rate"]) == trial["values"]["optim.learning_rate"]
        assert started["optim.schedule"] == trial["values"]["optim.schedule"]
        assert (started["resume"], started["train.eval_interval"]) == ("auto", "1")
        assert trial["results"]["accuracy"] == pytest.approx(max(trial["evaluations"].values()))
    best = max(trials, key=lambda trial: trial["results"]["accuracy"])
    assert report(space)["best"]["number"] == best["number"]
    recipe = yaml.safe_load((space.parent / "out" / "report" / "best.yaml").read_text())
    assert recipe["optim"]["learning_rate"] == best["values"]["optim.learning_rate"]
    for name in ("history", "parallel", "importance"):
        assert (space.parent / "out" / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"best: trial {best['number']}" in capsys.readouterr().out
    assert main(arguments(space, "--trials=7", "--sampler=random", training=given)) == 0
    assert len(report(space)["trials"]) == 7


@pytest.mark.slow
def test_two_searches_share_the_trials_of_one_that_was_killed(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = arguments(space, "--trials=5", training=("--train.keep=5", "--train.eval_interval=1"))
    command = [sys.executable, "-m", "launch", "search", *slow]
    killed = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    first = space.parent / "out" / "trial-0000" / "starts.txt"
    deadline = time.monotonic() + 60
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    monkeypatch.setattr(study, "STALE", 3.0)
    helper = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    assert main(slow) == 0
    assert helper.wait(60) == 0
    trials = report(space)["trials"]
    assert [trial["number"] for trial in trials] == list(range(5))
    assert Counter(trial["state"] for trial in trials) == {"complete": 5}
    started = {
        trial["number"]: len(
            (space.parent / "out" / f"trial-{trial['number']:04d}" / "starts.txt").read_text().split("\n")
        )
        for trial in trials
    }
    assert started == {0: 3, 1: 2, 2: 2, 3: 2, 4: 2}, "the killed trial was started again, each other one once"


def test_a_stopped_search_gives_its_trial_back_and_leaves_no_run(space: Path) -> None:
    slow = arguments(space, "--trials=1", training=("--train.keep=7", "--train.eval_interval=1"))
    process = subprocess.Popen([sys.executable, "-m", "launch", "search", *slow], cwd=ROOT, env=environment())
    first = space.parent / "out" / "trial-0000" / "starts.txt"
    deadline = time.monotonic() + 60
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert (space.parent / "out" / "claims" / "0000").stat().st_mtime == 0
    left = subprocess.run(["pgrep", "-f", str(first.parent)], capture_output=True, text=True)
    assert left.stdout.split() == []
    assert main(arguments(space, "--trials=1", training=("--train.eval_interval=1",))) == 0
    assert len(first.read_text().splitlines()) == 2


def test_a_bad_trial_ends_early(space: Path) -> None:
    out = space.parent / "out"
    out.mkdir()
    training = ("--train.keep=5", "--train.eval_interval=1")
    kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "journal.log")))
    before = optuna.create_study(storage=kept, study_name=study.STUDY, direction="maximize")
    distributions = {"optim.learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)}
    for number in range(5):
        (out / f"trial-{number:04d}").mkdir()
        (out / f"trial-{number:04d}" / "config.yaml").write_text("seed: 1\n")
        before.add_trial(
            optuna.trial.create_trial(
                params={"optim.learning_rate": 1e-3}, distributions=distributions, value=1.0,
                intermediate_values=dict.fromkeys(range(1, 6), 1.0),
            )
        )  # fmt: skip
    start = time.monotonic()
    assert main(arguments(space, "--trials=6", "--pruner=median", training=training)) == 0
    assert report(space)["trials"][-1]["state"] == "pruned"
    assert not (out / "trial-0005" / "report").exists()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_no_trial_ends_before_the_step_that_pruning_begins_at(pruner: str) -> None:
    found = optuna.create_study(direction="maximize", pruner=study.build_pruner(pruner, 16))
    ended = set()
    for number in range(60):
        trial = found.ask()
        for step in (8, 16, 32, 64):
            trial.report(1.0 / (1 + number), step)
            if trial.should_prune():
                ended.add(step)
                break
        found.tell(trial, 1.0, skip_if_finished=True)
    assert 8 not in ended
    assert 16 in ended


def test_what_a_run_trained_with_is_compared_with_what_its_trial_asked_for(space: Path) -> None:
    with pytest.raises(RunError, match=r"trained with optim.learning_rate 0.5, and its trial asked for"):
        main(arguments(space, "--trials=2", training=("--seed=14",)))


def test_a_search_whose_trials_all_fail_gives_up(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="3 trials failed one after the other"):
        main(arguments(space, "--trials=9", training=("--seed=13",)))
    assert capsys.readouterr().out.count("failed: error: labelled.train: no such file") == 3


def test_a_grid_ends_when_it_is_done(space: Path) -> None:
    space.write_text("optim.learning_rate: [1e-4, 1e-3]\n")
    assert main(arguments(space, "--trials=50", "--sampler=grid")) == 0
    assert sorted(trial["values"]["optim.learning_rate"] for trial in report(space)["trials"]) == [1e-4, 1e-3]


def test_several_objectives_give_a_front(space: Path) -> None:
    assert main(arguments(space, "--trials=3", "--objective", "accuracy", "seconds")) == 0
    found = report(space)
    assert found["objectives"] == ["accuracy (max)", "seconds (min)"]
    assert found["best"]["number"] in found["front"]
    assert (space.parent / "out" / "report" / "front.png").is_file()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim.learning_rat: [1, 2]", "optim.learning_rat in .* is no field of a training"),
        ("output: [a, b]", "output in .* the search gives it to each trial itself"),
        ("optim.learning_rate: {low: 0, high: 1, log: true}", "log with low 0 .* give a low above 0"),
        ("optim.learning_rate: {low: 1, high: 1}", "the range is empty"),
        ("optim.learning_rate: {low: 1, high: 2, step: 3}", "step 3 .* fits the range"),
        ("optim.learning_rate: {low: 1}", "high None .* give a finite number"),
        ("train.steps: {low: .nan, high: 4}", "low nan .* give a finite number"),
        ("train.steps: {low: 1, high: .inf}", "high inf .* give a finite number"),
        ("optim.learning_rate: {low: 1e-5, high: 1e-3, lgo: true}", "lgo in .* a range has low, high, log, step"),
        ("optim.learning_rate: {low: 1.5, high: 2.2, step: 0.3}", r"high 2.2 .* no step of 0.3 .* give 2.1"),
        ("regularise.r_drop: [0, 1]\nregularise.mixup: [0, 0.2]", "r_drop: 1 with regularise.mixup: 0.2 is refused"),
        (
            "regularise.adversarial: [none, fgm]\nregularise.adversarial_norm: {low: 0.1, high: 2}",
            "adversarial_norm: 0.1 is refused: .* it needs regularise.adversarial fgm or freelb",
        ),
        ("optim.learning_rate: {low: 1, high: 2, log: maybe}", "log 'maybe'"),
        ("optim.learning_rate: {low: -1, high: 2}", "optim.learning_rate: -1 is refused: .* give a positive number"),
        ("train.steps: {low: 1.5, high: 4}", "the field takes whole numbers"),
        ("optim.schedule: {low: 1, high: 2}", "the field is no number"),
        ("optim.schedule: [linear]", "two different values or more"),
        ("optim.schedule: [linear, linear]", "two different values or more"),
        ("optim.learning_rate: [1, 1.0]", "two different values or more"),
        ("optim.schedule: [linear, lineal]", "optim.schedule: 'lineal' is refused"),
        ("optim.schedule: [[a], [b]]", "give plain values"),
        ("train.steps: 5", "train.steps: 5 .* give a list"),
        ("", "is empty"),
        ("- a", "holds a list"),
        ("a:\tb", "not YAML"),
    ],
)
def test_a_bad_space_is_refused(space: Path, text: str, told: str) -> None:
    space.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        main(arguments(space))
    assert "\n" not in str(error.value)
    assert not (space.parent / "out" / "journal.log").exists()


@pytest.mark.parametrize(
    ("own", "training", "told"),
    [
        (("--trials=0",), (), "trials: 0 is not allowed"),
        (("--seeds=-1",), (), "seeds: -1 is not allowed"),
        (("--objective", "beauty"), (), "'beauty' says not whether higher is better"),
        (("--objective", "accuracy:up"), (), "may end in :min or :max"),
        (("--objective", ":min"), (), "':min' is not allowed; give a score"),
        (("--objective",), (), "objective"),
        (("--objective", "seconds"), (), "give a score first"),
        (("--objective", "accuracy", "accuracy"), (), "each name once"),
        (("--pruner=asha",), (), "needs evaluations on the way; give train.eval_interval"),
        (("--prune-from=8",), (), "prune-from: 8 is not allowed; give --pruner with it"),
        (("--pruner=asha", "--prune-from=0"), ("--train.eval_interval=1",), "give a step of at least 1"),
        (("--pruner=asha", "--objective", "accuracy", "loss"), ("--train.eval_interval=1",), "a single objective"),
        (("--sampler=grid",), (), "finitely many values"),
        (("--sampler=cmaes",), (), "the space has one field"),
        (("--storage=/proc/nowhere/journal.log",), (), "cannot be used"),
        (("--storage=nosuch://db",), (), "cannot be used"),
        (("--launcher=nosuchprogram",), (), "is no program here"),
        ((), ("--resume=x",), "resume: 'x' is not allowed"),
        ((), ("--monitor.tensorboard=false",), "monitor.tensorboard: False is not allowed; a search reads"),
        ((), ("--optim.name=nosuch",), "optim.name"),
        ((), ("--task=pretrain",), "task pretrain has no score of its own|labelled"),
    ],
)
def test_a_bad_option_is_refused(space: Path, own: tuple[str, ...], training: tuple[str, ...], told: str) -> None:
    given = arguments(space, *own, training=training)
    if any(word.startswith("--launcher") for word in own):
        given.remove(f"--launcher={STAND_IN}")
    with pytest.raises(UserError, match=told) as error:
        main(given)
    assert "\n" not in str(error.value)


def test_an_objective_that_no_evaluation_tells_is_named(space: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluation in .* tells 'beauty'"):
        main(arguments(space, "--trials=1", "--objective", "beauty:max"))
    with pytest.raises(RunError, match="no trial has finished"):  # that one failed, and nobody works on it
        main(arguments(space, "--trials=1", "--objective", "beauty:max"))


def test_another_space_in_the_same_folder_is_refused(space: Path) -> None:
    assert main(arguments(space, "--trials=1")) == 0
    space.write_text("optim.learning_rate: [1e-4, 1e-3]\n")
    with pytest.raises(UserError, match=r"is not what the trials in .* have"):
        main(arguments(space, "--trials=2"))


def test_other_options_in_the_same_folder_are_refused(space: Path) -> None:
    assert main(arguments(space, "--trials=1")) == 0
    for given, told in (("--train.epochs=7", "train.epochs: 7.0"), ("--seed=5", "seed: 5")):
        with pytest.raises(UserError, match=f"{told} is not what the trials in .* have"):
            main(arguments(space, "--trials=2", training=(given,)))


def test_a_field_may_need_another_one_of_the_space(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("regularise.adversarial: [fgm, freelb]\nregularise.adversarial_norm: {low: 0.1, high: 2}\n")
    check_training([*TRAINING, f"--output={tmp_path / 'out'}"], read_space(path))


def test_what_is_given_for_a_searched_field_is_told_once(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_training([*TRAINING, "--optim.learning_rate", "1", f"--output={space.parent / 'out'}"], read_space(space))
    assert capsys.readouterr().out == "note: optim.learning_rate is searched, so what is given after -- is not used\n"


def open_study(output: Path, storage: str | None) -> study.Study:
    space = [Interval("optim.learning_rate", 1e-5, 1e-1, log=True, step=None, whole=False)]
    return study.Study(
        output, storage, [study.Objective("loss", False)], [*space], "random", ("none", None), RunConfig()
    )


def test_a_storage_is_of_one_folder(tmp_path: Path) -> None:
    shared = str(tmp_path / "shared.log")
    open_study(tmp_path / "a", shared)
    trial = open_study(tmp_path / "a", shared).next(1)
    (tmp_path / "a" / f"trial-{trial.number:04d}").mkdir()
    for output, storage in ((tmp_path / "b", shared), (tmp_path / "a", None)):
        with pytest.raises(UserError, match=r"does not hold the trials in .*; give the storage and the output"):
            open_study(output, storage)


def test_a_trial_that_is_given_back_keeps_its_seconds(tmp_path: Path) -> None:
    opened = open_study(tmp_path / "a", None)
    trial = opened.next(1)
    assert opened.spent(trial.number) == 0.0
    opened.touch(trial.number, 12.5)
    opened.give_back(trial.number)
    assert opened.next(1).number == trial.number
    assert opened.spent(trial.number) == 12.5


def test_one_search_alone_trains_the_best_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_study(tmp_path / "a", None), open_study(tmp_path / "a", None)
    with first.only_one("best") as mine, second.only_one("best") as theirs:
        assert (mine, theirs) == (True, False)
    (first.claims / "best").touch()  # of one that was killed
    monkeypatch.setattr(study, "STALE", -1.0)
    with second.only_one("best") as mine:
        assert mine


def test_a_search_of_which_no_trial_finished_fails(space: Path) -> None:
    with pytest.raises(RunError, match="no trial has finished"):
        main(arguments(space, "--trials=1", "--seeds=2", training=("--seed=13",)))


def test_a_folder_that_cannot_be_written_is_refused(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # this machine's user may write everywhere
    with pytest.raises(UserError, match="Permission denied"):
        main(arguments(space))


def test_fields_of_the_space_are_taken_out_of_the_training() -> None:
    given = ["--optim.betas", "0.9", "0.99", "--seed=1", "--optim.learning_rate", "1e-3", "--config", "a.yaml"]
    kept = without(given, ["--optim.learning_rate", "--optim.betas"])
    assert kept == ["--seed=1", "--config", "a.yaml"]
