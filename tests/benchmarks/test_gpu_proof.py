"""The proof on a GPU: its budget, what it makes of a stage's end, and stages of it on a CPU at toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_proof
from benchmarks.common import MISSED, goal
from benchmarks.proof import kernels, losses, resume, runner, stage, trainer, worker
from benchmarks.proof.runs import Run
from benchmarks.proof.stage import STAGES, Setting
from tests.benchmarks import proof_stages
from tests.conftest import ROOT

ROW = proof_stages.ROW
BAD = ROW | {"goals": [goal("speed", 1.0, at_least=1.5)]}


def setting(tmp_path: Path, seconds: float = 60.0) -> Setting:
    return Setting("cpu", str(tmp_path), str(tmp_path), str(tmp_path), seconds, time.time() + seconds)


def test_the_shares_of_the_stages_use_the_budget_and_no_more() -> None:
    names, left = list(STAGES), 450.0
    for name in names:
        seconds = runner.limit(name, names, left)
        assert seconds > 0
        left -= seconds
    assert left == pytest.approx(0)
    assert runner.limit(names[-1], names, 99.0) == 99
    assert runner.limit("losses", ["losses"], 10.0) == 10


def test_every_file_with_tests_that_need_a_gpu_is_run() -> None:
    skipping = "not torch.cuda." + "is_available()"
    needing = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if skipping in path.read_text()
    }
    assert {path for path, *_ in kernels.tests().values()} == needing
    assert all(Path(path).name == name for name, (path, *_) in kernels.tests().items())


def test_every_stage_can_be_loaded() -> None:
    assert all(callable(one.load()) for one in STAGES.values())


@pytest.mark.parametrize(
    ("code", "printed", "rows", "state", "reason"),
    [
        (0, "", [ROW], "ok", ""),
        (0, "", [BAD], "missed", f"{MISSED}: speed 1, goal at least 1.5"),
        (0, "skipped: no GPU\n", [], "skipped", "no GPU"),
        (1, "Traceback\nValueError: bad\n", [ROW], "failed", "exit code 1: ValueError: bad"),
        (-11, "", [], "failed", "exit code -11: "),
        (None, "step 3\n", [BAD], "timed out", f"ended at its limit; {MISSED}: speed 1, goal at least 1.5"),
    ],
)
def test_a_stage_is_judged_by_its_code_its_output_and_its_rows(
    code: int | None, printed: str, rows: list[dict[str, Any]], state: str, reason: str
) -> None:
    found = runner.outcome(code, printed, rows)
    assert (found["state"], found["reason"]) == (state, reason)
    assert ("output" in found) == (state in ("failed", "timed out", "missed"))


def test_what_stages_that_end_badly_had_found_is_kept_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, in which the stages of another module are registered."""
    own = {name: stage.Stage(name, 1, f"{proof_stages.__name__}:{name}") for name in ("slow", "failing", "skipping")}
    code = "import sys; from benchmarks.proof import stage, worker\n"
    code += f"stage.STAGES.update({{n: stage.Stage(n, 1, '{proof_stages.__name__}:' + n) for n in {list(own)}}})\n"
    code += "sys.exit(worker.main(sys.argv[1:]))"
    real = worker.command

    def command(name: str, given: Setting, rows: Path) -> list[str]:
        return [sys.executable, "-c", code, *real(name, given, rows)[3:]]

    monkeypatch.setattr(runner, "STAGES", own)
    monkeypatch.setattr(runner, "command", command)
    start = time.monotonic()
    document = runner.run(list(own), "cpu", 15.0, tmp_path, tmp_path / "out")
    assert time.monotonic() - start < 20
    assert json.loads((tmp_path / "out" / runner.DOCUMENT).read_text()) == document
    states = {name: found["state"] for name, found in document["stages"].items()}
    assert states == {"slow": "timed out", "failing": "failed", "skipping": "skipped"}
    assert document["stages"]["slow"]["rows"] == document["stages"]["failing"]["rows"] == [ROW]
    assert document["stages"]["failing"]["output"][-1] == "ValueError: no such thing"
    assert "no GPU" in runner.summary(document)
    assert "failing: failed" in capsys.readouterr().out


def test_a_spent_budget_skips_what_is_left(tmp_path: Path) -> None:
    document = runner.run(["kernels"], "cpu", 0.5, tmp_path, tmp_path)
    assert document["stages"]["kernels"]["reason"] == "the budget was spent"


def test_the_worst_loss_of_a_precision_is_held_to_its_bound(tmp_path: Path) -> None:
    case, other = losses.Case(2, "bf16", "adamw"), losses.Case(1, "bf16", "lamb")
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train_loss.csv").write_text("step,train_loss\n1,2.0\n2,1.02\n")
    found = losses.figures(Run(tmp_path, 0, 1.0, ""), [2.0, 1.0])
    assert found["apart"] == pytest.approx(0.02)
    table = losses.row({case.name: (case, found)}, 2)
    assert [one["result"] for one in table["goals"]] == [MISSED]
    failed = losses.figures(Run(tmp_path / "none", 1, 1.0, "boom\n"), [2.0, 1.0])
    assert failed["failed"] == "exit code 1: boom"
    close = found | {"apart": 0.001}
    assert losses.row({case.name: (case, close)}, 2)["goals"][0]["result"] == "met"
    assert losses.row({case.name: (case, close), other.name: (other, failed)}, 2)["goals"][0]["result"] == MISSED


def test_all_stages_precisions_and_optimizers_are_compared_on_a_gpu() -> None:
    cases = losses.cases(toy=False)
    found = {(case.stage, case.precision, case.optimizer) for case in cases}
    assert found >= {(zero, "bf16", name) for zero in range(4) for name in ("adamw", "lamb")}
    assert found >= {(zero, "fp16", name) for zero in (1, 2, 3) for name in ("adamw", "lamb")}
    assert len({case.name for case in cases}) == len(cases)


def test_a_resume_that_differs_in_one_bit_is_told() -> None:
    good = {"points that differ": 0, "points": 9, "weights": "same bits"}
    assert resume.row({"a": good})["goals"][0]["result"] == "met"
    for wrong in ({"points that differ": 1}, {"weights": "differ"}, {"points": 0}):
        assert resume.row({"a": good, "b": good | wrong})["goals"][0]["result"] == MISSED
    assert resume.row({"a": {"failed": "exit code 1: boom"}})["goals"][0]["result"] == MISSED


def test_a_steps_time_counts_from_the_first_mark_after_the_unmeasured_ones() -> None:
    assert trainer.seconds_of_a_step([(10, 0.0), (20, 5.0), (30, 6.0), (40, 7.0)], 20) == 0.1


def test_endings_of_tests_are_counted() -> None:
    assert kernels.counted("..F\n1 failed, 12 passed, 3 skipped in 2.1s\n") == {"failed": 1, "passed": 12, "skipped": 3}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--device", "cpu", "--budget", "0"], "--budget"),
        (["--device", "cpu", "--only", "nothing"], "nothing"),
        (["--device", "cpu", "--out", __file__], "is a file"),
        (["--device", "cpu", "--materials", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        gpu_proof.parse(wrong)
    assert found.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_the_kernels_agree_here_too_in_a_real_call(tmp_path: Path) -> None:
    """Materials aren't needed by this stage: an empty file stands for them."""
    (tmp_path / "references.json").write_text("{}")
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--device=cpu", "--budget=60", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, f"--materials={tmp_path}", "--only", "kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "proof.json").read_text())["stages"]["kernels"]
    families, tests = found["rows"]
    assert {values["result"] for values in families["rivals"].values()} == {"agrees"}
    assert "skipped" in tests["rivals"]["pytest"]["result"]
    assert "kernel families against plain torch" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_runs_at_toy_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--device=cpu", "--budget=600", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "proof.json").read_text())["stages"]
    assert list(found) == list(STAGES)
    skipped = {name: one["reason"] for name, one in found.items() if one["state"] == "skipped"}
    assert set(skipped) <= {"sanitizer", "trainer"}, skipped
    assert all(one["rows"] for name, one in found.items() if name not in skipped)
    assert (tmp_path / "proof.png").read_bytes().startswith(b"\x89PNG")
