"""`zerobert ablate`: which runs it makes, how they are paired, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from engine.errors import UserError
from engine.tasks.significance import holm
from launch.ablate.command import main
from launch.ablate.effects import HARMS, HELPS, UNKNOWN, UNSHOWN
from tests.launch.ablate.files import ablate, write_ablation
from tests.launch.suite.files import run_suite, starts, told, write_suite
from tests.launch.suite.stand_in import EXAMPLES

SEEDS = (1, 2, 3)


def effect(output: Path, switch: str, size: str) -> dict[str, Any]:
    (found,) = (each for each in told(output)["effects"] if (each["switch"], each["size"]) == (switch, size))
    return dict(found)


@pytest.mark.slow
def test_base_and_switches_are_run_at_every_size_with_every_seed(tmp_path: Path) -> None:
    path, output = write_ablation(tmp_path, sizes=[20, "all"], seeds=2), tmp_path / "out"
    assert ablate(path) == 0
    for size, limit in (("20", "20"), ("all", None)):
        for switch, changed in (("base", None), ("smooth", "0.1"), ("short", None)):
            for seed in (1, 2):
                (options,) = starts(output, f"bert/own/{switch},n={size}/seed-{seed}")
                assert options.get("labelled.limit") == limit
                assert options.get("labelled.label_smoothing") == changed
                assert options["seed"] == str(seed)
                assert float(options["train.epochs"]) == (2 if switch == "short" else 4)
    text = (output / "report" / "report.md").read_text()
    assert text.startswith("# 12 of 12 runs\n")
    assert (output / "report" / "effects.png").read_bytes().startswith(b"\x89PNG")
    order = [(each["size"], each["switch"]) for each in told(output)["effects"]]
    assert order == [("20", "smooth"), ("20", "short"), ("all", "smooth"), ("all", "short")]
    assert ablate(path) == 0
    assert len(starts(output, "bert/own/base,n=20/seed-1")) == 1


def test_effects_can_be_recomputed_by_hand(tmp_path: Path) -> None:
    assert ablate(write_ablation(tmp_path)) == 0
    base = np.array([8 + seed for seed in SEEDS]) / EXAMPLES
    gains = np.array([seed % 3 for seed in SEEDS]) / EXAMPLES
    expected = ttest_rel(base + gains, base)
    low, high = expected.confidence_interval(0.95)
    found = effect(tmp_path / "out", "smooth", "20")
    assert found["base"] == pytest.approx(base.mean())
    assert found["effect"] == pytest.approx(gains.mean())
    assert found["interval_95"] == pytest.approx([low, high])
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["differences"] == pytest.approx({f"seed-{s}": g for s, g in zip(SEEDS, gains, strict=True)})
    # four examples fewer with every seed: no spread, so a coin thrown three times
    short = effect(tmp_path / "out", "short", "20")
    assert (short["effect"], short["p"], short["interval_95"]) == (pytest.approx(-4 / EXAMPLES), 0.25, None)
    assert [found["p_holm"], short["p_holm"]] == pytest.approx(holm([found["p"], short["p"]]))
    assert found["verdict"] == short["verdict"] == UNSHOWN
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "where all pairs differ by the same there is no interval" in text
    assert "corrected for all 2 comparisons" in text


def test_what_chance_does_not_explain_helps_or_harms_by_the_direction_of_the_score(tmp_path: Path) -> None:
    seeds = list(range(1, 9))
    switches = {"smooth": {"labelled.label_smoothing": 0.1}}
    assert ablate(write_ablation(tmp_path, seeds=seeds, switches=switches, sizes=None)) == 0
    found = effect(tmp_path / "out", "smooth", "all")
    assert found["p_holm"] == found["p"] < 0.05
    assert found["verdict"] == HELPS
    loss = {
        "own": {
            "task": "sequence_classification",
            "labelled": {"train": "own.jsonl", "test": "own.jsonl", "metric": "loss"},
        }
    }
    path = write_ablation(tmp_path, seeds=seeds, switches=switches, sizes=None, tasks=loss)
    assert ablate(path, f"--output={tmp_path / 'loss'}") == 0
    found = effect(tmp_path / "loss", "smooth", "all")
    assert (found["verdict"], found["higher_is_better"]) == (HARMS, False)
    assert "of loss a lower score is better" in (tmp_path / "loss" / "report" / "report.md").read_text()


def test_what_failed_has_no_pair_and_is_tried_again_alone(tmp_path: Path) -> None:
    path, output = write_ablation(tmp_path, seeds=2), tmp_path / "out"
    failing = output / "bert" / "own" / "smooth,n=20" / "seed-2.json"
    failing.parent.mkdir(parents=True)
    failing.write_text(json.dumps({"code": 1, "error": "the loss of step 3 is nan"}))
    assert ablate(path) == 1
    found = effect(output, "smooth", "20")
    assert (found["pairs"], found["verdict"], found["p"]) == (1, UNKNOWN, None)
    assert "- bert/own/smooth,n=20/seed-2: the loss of step 3 is nan\n" in (output / "report" / "report.md").read_text()
    failing.unlink()
    assert ablate(path) == 0
    assert effect(output, "smooth", "20")["pairs"] == 2
    assert len(starts(output, "bert/own/smooth,n=20/seed-2")) == 2
    assert len(starts(output, "bert/own/smooth,n=20/seed-1")) == 1


def test_a_part_is_run_and_the_report_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write_ablation(tmp_path), tmp_path / "out"
    assert ablate(path, "--only", "base,*", "smooth,*") == 0
    capsys.readouterr()
    assert main([str(output)]) == 1  # runs are missing
    assert "| own" in capsys.readouterr().out
    assert [each["verdict"] for each in told(output)["effects"]] == [UNSHOWN, UNKNOWN]


def test_a_suites_folder_is_no_ablation(tmp_path: Path) -> None:
    assert run_suite(write_suite(tmp_path), "--only", "*/own/epochs=2") == 0
    with pytest.raises(UserError, match=r"^ablate: .*out holds a suite; zerobert suite .*out makes its report$"):
        main([str(tmp_path / "out")])


def test_runs_of_a_pair_are_scored_on_the_same_examples(tmp_path: Path) -> None:
    path = write_ablation(tmp_path, seeds=2)
    assert ablate(path) == 0
    predictions = tmp_path / "out/bert/own/smooth,n=20/seed-2/report/predictions.tsv"
    predictions.write_text("\n".join(predictions.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match=r"smooth,n=20/seed-2: it is scored on other examples than .*base,n=20/"):
        main([str(tmp_path / "out")])


def test_the_report_of_an_array_is_an_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_ablation(tmp_path)
    assert main([str(path), f"--output={tmp_path / 'out'}", "--submit", "--", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.split("# then, behind the array:\n")
    assert "#SBATCH --array=0-8\n" in first
    assert f"-m launch ablate {tmp_path / 'out'}\n" in second


def test_folds_are_pairs_too(tmp_path: Path) -> None:
    own = {"task": "sequence_classification", "labelled.train": "own.jsonl", "folds": 3}
    assert ablate(write_ablation(tmp_path, tasks={"own": own}, seeds=1)) == 0
    found = effect(tmp_path / "out", "short", "20")
    assert (found["pairs"], found["scored_on"]) == (3, "fold")
    assert "folds share training examples" in (tmp_path / "out" / "report" / "report.md").read_text()
