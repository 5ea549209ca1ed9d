"""GLUE's average, and differences of scores that single examples don't tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.seeds.report import spread
from launch.suite.scores import AVERAGED, glue_average, reason_of
from tests.launch.suite.files import run_suite, told, write_suite

SCORES = {name: [0.5 + 0.01 * place, 0.6 + 0.01 * place] for place, name in enumerate(AVERAGED)}


def summaries(missing: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results and the cells of one model on GLUE with two seeds; one of a task's runs may be missing."""
    cells = []
    for name, values in SCORES.items():
        runs = {f"seed-{seed}": {"score": value} for seed, value in enumerate(values, 1)}
        cells.append(
            {"model": "m", "task": f"my {name}", "setting": "s", "glue": name, "runs": runs, "score": spread(values)}
        )
    results = [
        {"model": "m", "task": cell["task"], "glue": cell["glue"], "chosen": "s", "complete": cell["glue"] != missing}
        for cell in cells
    ]
    return results, cells


def test_the_average_is_of_eight_tasks_and_its_spread_over_seeds() -> None:
    found = glue_average("m", *summaries())
    assert found is not None
    assert found["mean"] == pytest.approx(np.mean(list(SCORES.values())))
    by_seed = np.mean(list(SCORES.values()), axis=0)
    assert found["standard_deviation"] == pytest.approx(by_seed.std(ddof=1))
    assert found["tasks"] == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]


@pytest.mark.parametrize("name", AVERAGED)
def test_there_is_no_average_without_all_of_them(name: str) -> None:
    results, cells = summaries()
    assert glue_average("m", [each for each in results if each["glue"] != name], cells) is None
    assert glue_average("m", *summaries(missing=name)) is None
    assert glue_average("other", results, cells) is None


def test_a_score_that_examples_do_not_tell_is_compared_over_seeds(tmp_path: Path) -> None:
    own = {"task": "sequence_classification", "labelled": {"train": "own.jsonl", "metric": "matthews"}}
    assert run_suite(write_suite(tmp_path, tasks={"own": own}, seeds=2)) == 0
    (result,) = told(tmp_path / "out")["results"]
    against = result["against_chosen"]["epochs=2"]
    assert list(against["tests"]) == ["paired_t"]
    assert against["difference"] == pytest.approx(-0.1)
    assert against["real"]  # the same difference with each seed


def test_the_reason_is_that_of_the_newest_start(tmp_path: Path) -> None:
    log = tmp_path / "seed-1.log"
    assert reason_of(tmp_path / "seed-1") is None
    log.write_text("--- started: python\nerror: old\n--- started: job 7 on n1\n0: step 3\n")
    assert reason_of(tmp_path / "seed-1") is None
    log.write_text(log.read_text() + "0: error: labelled.train: no such file\nsrun: error: node1: task 0: Exited\n")
    assert reason_of(tmp_path / "seed-1") == "labelled.train: no such file"
