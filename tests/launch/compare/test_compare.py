"""`zerobert compare`: what it says of runs whose answers are known, and which runs it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from engine.errors import UserError
from engine.tasks.outcomes import write_outcomes
from engine.tasks.significance import mcnemar, paired_t
from launch.compare.command import compare, main
from launch.seeds.plan import Record

TRUTH = ["yes", "no"] * 100
FACTS = {"tokenizer's rules and pieces": "t", "test examples": "e", "validation examples": "v"}


def finished(folder: Path, right: NDArray[np.bool_], *, truth: list[str] = TRUTH, **told: Any) -> Path:
    """The files of a classifier's run that are compared; `told` are its task and facts that differ from FACTS."""
    (folder / "report").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": told.pop("task", "sequence_classification")}))
    facts = FACTS | {name.replace("_", " "): value for name, value in told.items()}
    (folder / "export" / "zerobert.json").write_text(json.dumps({"facts": facts}))
    other = {"yes": "no", "no": "yes"}
    guesses = [true if fits else other[true] for true, fits in zip(truth, right, strict=True)]
    rows = [f"{index}\t{true}\t{guess}\t0.5" for index, (true, guess) in enumerate(zip(truth, guesses, strict=True))]
    (folder / "report" / "predictions.tsv").write_text("\n".join(["index\ttrue\tpredicted\tconfidence", *rows]) + "\n")
    (folder / "report" / "report.txt").write_text("done\n")
    return folder


def answers(wrong: slice) -> NDArray[np.bool_]:
    right = np.ones(len(TRUTH), dtype=bool)
    right[wrong] = False
    return right


def test_two_runs_that_differ_in_little_do_not_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = finished(tmp_path / "a", answers(slice(0, 30))), finished(tmp_path / "b", answers(slice(4, 32)))
    found = compare(first, second)["scores"]["accuracy"]
    expected = mcnemar(2, 4, 200)
    assert not found["real"]
    assert (found["first"], found["second"]) == (0.85, 0.86)
    assert (found["right_in_first_alone"], found["right_in_second_alone"]) == (2, 4)
    assert found["tests"] == {
        "mcnemar": {
            "difference": pytest.approx(0.01),
            "interval_95": pytest.approx([expected.low, expected.high]),
            "p": pytest.approx(0.6875),
        }
    }
    assert main([str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy: no real difference at 5 %, 0.8500 and 0.8600" in printed
    assert "+0.0100 (95 % interval -0.0157 to +0.0355), p 0.69, McNemar's exact test" in printed
    assert "6 examples are right in one run alone: 2 in the first, 4 in the second" in printed


def test_a_crippled_run_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = finished(tmp_path / "a", answers(slice(0, 20))), finished(tmp_path / "b", answers(slice(10, 90)))
    assert main([str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["accuracy"]["real"]
    assert found["examples"] == 200
    assert main([str(first), str(second)]) == 0
    assert "accuracy: a real difference at 5 %, 0.9000 and 0.6000" in capsys.readouterr().out


def test_runs_with_equal_answers_do_not_differ(tmp_path: Path) -> None:
    right = answers(slice(0, 9))
    found = compare(finished(tmp_path / "a", right), finished(tmp_path / "b", right))["scores"]["accuracy"]
    assert not found["real"]
    assert found["tests"]["mcnemar"]["p"] == 1.0


def test_other_scores_are_compared_by_the_bootstrap(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for name, shift in (("a", 0.0), ("b", 0.2)):
        folder = finished(tmp_path / name, answers(slice(0, 9)))
        scores = {"f1": generator.random(200) + shift, "entity_f1": generator.integers(0, 3, (200, 3)).astype(float)}
        write_outcomes(folder / "report", TRUTH, scores)
    found = compare(tmp_path / "a", tmp_path / "b")["scores"]
    assert found["f1"]["real"]
    assert not found["entity_f1"]["real"]
    assert list(found["f1"]["tests"]) == list(found["entity_f1"]["tests"]) == ["bootstrap"]
    assert list(compare(tmp_path / "a", tmp_path / "b", "entity_f1")["scores"]) == ["entity_f1"]


def of_seeds(folder: Path, accuracies: list[float], **told: Any) -> Path:
    """A folder of seeds whose runs have so many right answers."""
    for seed, accuracy in enumerate(accuracies, 1):
        wrong = round(200 * (1 - accuracy))
        start = 7 * seed
        finished(folder / f"seed-{seed}", answers(slice(start, start + wrong)), **told)
    seeds = list(range(1, len(accuracies) + 1))
    Record("sequence_classification", "accuracy", seeds, None, {}).write(folder)
    return folder


def test_folders_of_seeds_are_compared_seed_by_seed_and_by_example(tmp_path: Path) -> None:
    low, high = [0.8, 0.82, 0.79, 0.81], [0.88, 0.9, 0.89, 0.88]
    found = compare(of_seeds(tmp_path / "a", low), of_seeds(tmp_path / "b", high))
    score, expected = found["scores"]["accuracy"], paired_t(low, high)
    assert (found["pairs"], found["examples"]) == (4, 200)
    assert (score["first"], score["second"]) == pytest.approx((0.805, 0.8875))
    assert score["tests"]["paired_t"]["p"] == pytest.approx(expected.p)
    assert score["tests"]["bootstrap"]["difference"] == pytest.approx(0.0825)
    assert score["real"]


def test_a_difference_that_seeds_do_not_repeat_is_not_real(tmp_path: Path) -> None:
    """Each example says so, with the same draw for all seeds, but the next seed may say the opposite."""
    found = compare(of_seeds(tmp_path / "a", [0.5, 0.8, 0.5]), of_seeds(tmp_path / "b", [0.9, 0.7, 0.9]))
    tests = found["scores"]["accuracy"]["tests"]
    assert tests["bootstrap"]["p"] < 0.05 < tests["paired_t"]["p"]
    assert not found["scores"]["accuracy"]["real"]


def test_another_tokenizer_is_compared_by_what_is_right(tmp_path: Path) -> None:
    """Fingerprints of the same texts differ then."""
    first = finished(tmp_path / "a", answers(slice(0, 9)))
    changed = {"tokenizer's rules and pieces": "other", "test_examples": "other"}
    assert compare(first, finished(tmp_path / "b", answers(slice(0, 8)), **changed))["examples"] == 200


def refused(first: Path, second: Path, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compare(first, second)
    assert message in str(caught.value)


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    right = answers(slice(0, 9))
    first = finished(tmp_path / "a", right)
    refused(first, tmp_path / "none", "none: it is no folder; give the output folder of a finished run")
    refused(tmp_path, first, f"{tmp_path}: it holds no run")
    other = finished(tmp_path / "task", right, task="multiple_choice")
    refused(first, other, f"{other}: its task is multiple_choice and that of {first} is sequence_classification")
    other = finished(tmp_path / "fewer", right[:150], truth=TRUTH[:150])
    refused(first, other, f"{other}: it is scored on other examples (150) than {first} (200); give both the same")
    refused(first, finished(tmp_path / "labels", right, truth=TRUTH[::-1]), "is scored on other examples")
    refused(first, finished(tmp_path / "texts", right, test_examples="f"), "is scored on other examples")
    refused(first, finished(tmp_path / "split", right, test_examples=None), "is scored on other examples")
    other = finished(tmp_path / "unfinished", right)
    (other / "report" / "report.txt").unlink()
    refused(first, other, f"{other}: the run (sequence_classification) has no report; finish it")
    other = finished(tmp_path / "silent", right)
    (other / "report" / "predictions.tsv").unlink()
    refused(first, other, "it tells nothing of single examples")
    write_outcomes(other / "report", TRUTH, {"f1": np.zeros(200)})
    refused(first, other, "has no score of single examples in common")
    refused(
        first, of_seeds(tmp_path / "seeds", [0.5, 0.6]), f"{first}: it is no folder of zerobert seeds and the other"
    )
    single = of_seeds(tmp_path / "single", [0.5])
    refused(tmp_path / "seeds", single, f"{single}: it shares fewer than two seeds or folds with")
    (single / "seeds.json").write_text("{")
    refused(tmp_path / "seeds", single, "seeds.json: it is no record of seeds")
    with pytest.raises(UserError, match=r"^metric: 'f2' is not allowed; choose one of accuracy$"):
        compare(first, first, "f2")
    with pytest.raises(UserError, match=r"^first: not given, nor second"):
        main([])
