"""`zerobert certify`: real runs that are killed get their certificate, and faults in a real audit are found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.train.audit import read_audit
from launch.certify import command as certify
from launch.certify import runs as certificate_runs
from launch.certify.plan import GLOBAL_BATCH, SAVE_INTERVAL, STEPS, Plan, least_resumed, parse_routes
from launch.certify.runs import RunSetup, kill_all, last_word, marked, started
from launch.certify.verdict import judge
from launch.curves import read_curves
from tests.train.runs import ROOT

PLAN = Plan(2, (2, 1), dropout=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "kills: 0 is not allowed; give 1 to 1000"),
        (["--kills", "1001"], "kills: 1001 is not allowed; give 1 to 1000"),
        (["--kills", "many"], "kills: 'many' is not allowed; give a whole number"),
        (["--stages", "4"], "stages: '4' is not allowed; give ZeRO stages such as 1,2,3"),
        (["--stages", ""], "stages: '' is not allowed; give ZeRO stages such as 1,2,3"),
        (["--routes", "2"], "routes: '2' is not allowed; give ranks before and after each kill, such as 1-2-4-2-1,2-2"),
        (["--routes", "2-3"], "routes: '2-3' is not allowed; give numbers of ranks that divide 16"),
        (["--routes", "2-0"], "routes: '2-0' is not allowed; give numbers of ranks that divide 16"),
        (
            ["--routes", "-".join("1" * 8)],
            "routes: '1-1-1-1-1-1-1-1' has 7 kills; give at most 6, or several routes",
        ),
        (["--seed", "-1"], "seed: -1 is not allowed; give a whole number in [0, 2^32)"),
        (
            ["--adapter", "series"],
            "adapter: 'series' is not allowed; "
            "give one of none, lora, dora, adalora, ia3, prefix, prompt, houlsby, bitfit",
        ),
        (["--launcher", "mpirun"], "launcher: 'mpirun' is not allowed; give one of torchrun, deepspeed"),
        (["--kill", "1"], "kill: no such field; did you mean kills?"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        certify.main(["--output", str(tmp_path / "new"), *arguments])
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds other files; give a new folder"):
        certify.main(["--output", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: .*; give a folder that can be written"):
        certify.main(["--output", str(tmp_path / "file")])


def test_an_earlier_certificate_is_replaced(tmp_path: Path) -> None:
    (certify.empty_folder(tmp_path / "new") / "runs" / "old").mkdir(parents=True)
    assert [path.name for path in certify.empty_folder(tmp_path / "new").iterdir()] == [certify.RESULT]


def test_routes_are_read() -> None:
    assert parse_routes("1-2-4-2-1,2-2,2-2") == [(1, 2, 4, 2, 1), (2, 2)]


def test_a_kill_ends_children_and_orphans_too(tmp_path: Path) -> None:
    """A launcher that has died leaves ranks behind, each in a session of its own."""
    script = "setsid sleep 300 & (setsid sleep 300 &) ; exec sleep 300"
    with (tmp_path / "log").open("wb") as log, started(["bash", "-c", script], log.fileno()) as (process, mark):
        while len(marked(mark)) < 3:
            assert process.poll() is None
        left = Path(f"/dev/shm/torch_{process.pid}_test")
        left.touch()
        kill_all(mark)
        assert process.wait() == -9
        assert not marked(mark)
        assert not left.exists()


def test_what_a_failed_start_said_is_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("begin\nerror: data.path: wrong\nTraceback\n")
    assert last_word(log) == f" (data.path: wrong); see {log}"
    log.write_text("Traceback\n  File\nengine.errors.SomeError: broken\n=====\n")
    assert last_word(log) == f" (engine.errors.SomeError: broken); see {log}"
    log.write_text("")
    assert last_word(log) == f" (nothing was printed); see {log}"


def plan_place(tmp_path: Path) -> RunSetup:
    return RunSetup(tmp_path, "torchrun", 1)


@pytest.mark.parametrize(("hangs", "good"), [(0, True), (2, True), (3, False)])
def test_a_start_that_hung_before_its_first_step_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hangs: int, good: bool
) -> None:
    """The command is one that behaves as a run whose watchdog ended it, `hangs` times."""
    count = tmp_path / "count"
    script = f'echo x >> {count}; [ $(wc -l < {count}) -gt {hangs} ] || {{ echo "no progress; exit code 75"; exit 1; }}'
    monkeypatch.setattr(certificate_runs, "command", lambda _launcher, _ranks: ["bash", "-c", script])
    with caplog.at_level("INFO"):
        (start,) = certificate_runs.carry_out(PLAN.reference, plan_place(tmp_path), random.Random(1))
    assert (start.failure is None) == good
    assert start.hung == min(hangs, 2)
    assert sum("ended with exit code 1 (no progress; exit code 75)" in line for line in caplog.messages[:-1]) == hangs


def test_a_start_that_fails_otherwise_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"echo x >> {tmp_path / 'count'}; echo error: no good; exit 2"
    monkeypatch.setattr(certificate_runs, "command", lambda _launcher, _ranks: ["bash", "-c", script])
    starts = certificate_runs.carry_out(PLAN, plan_place(tmp_path), random.Random(1))
    assert len(starts) == 1
    assert "start 1 ended with exit code 2 (no good)" in str(starts[0].failure)
    assert (tmp_path / "count").read_text() == "x\n"


def certified(output: Path, *options: str) -> dict[str, Any]:
    """Run the command; its JSON document."""
    command = [sys.executable, "-m", "launch", "certify", f"--output={output}", "--json", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, progress = process.communicate()
        finally:
            process.terminate()  # a test that takes too long leaves no ranks behind
    assert process.returncode == 0, printed + progress
    result: dict[str, Any] = json.loads(printed)
    assert json.loads((output / certify.RESULT).read_text()) == result
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run, killed once, that goes on with half as many ranks."""
    output = tmp_path_factory.mktemp("certify") / "small"
    return output, certified(output, "--kills=1", "--stages=2", "--routes=2-1", "--seed=3")


@pytest.mark.slow
def test_a_real_run_is_killed_and_certified(small: tuple[Path, dict[str, Any]]) -> None:
    output, result = small
    assert result["certified"]
    assert (result["kills"], result["transitions"], result["seen_twice"], result["missed"]) == (1, 1, 0, 0)
    assert 0 <= result["largest_difference"]["ranks changed"] < 1e-5
    before, after = [row for row in result["rows"] if row["run"] == "zero2-2-1"]
    assert before["steps"] + after["steps"] == STEPS
    assert before["steps"] == after["resumed"] >= least_resumed(after["killed"]) >= SAVE_INTERVAL
    assert "resumed" in (output / "logs" / "zero2-2-1-start-2.log").read_text()


@pytest.mark.slow
def test_modernbert_is_certified_on_documents_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "modernbert"
    result = certified(output, "--architecture=modernbert", "--kills=1", "--stages=3", "--routes=1-2", "--seed=4")
    assert result["certified"]
    assert result["architecture"] == "modernbert"
    assert (result["kills"], result["seen_twice"], result["missed"]) == (1, 0, 0)


@pytest.mark.slow
def test_adapters_are_certified(tmp_path: Path) -> None:
    output = tmp_path / "lora"
    result = certified(output, "--adapter=lora", "--kills=2", "--stages=2", "--routes=2-1,2-2", "--seed=5")
    assert result["certified"]
    assert result["adapter"] == "lora"
    assert (result["kills"], result["seen_twice"], result["missed"]) == (2, 0, 0)
    assert (output / "runs" / "zero2-2-1" / "export" / "adapter_model.safetensors").is_file()


def plant_a_second_look(lines: list[dict[str, Any]]) -> None:
    lines[-1]["samples"][0] = lines[0]["samples"][0]


def plant_a_gap(lines: list[dict[str, Any]]) -> None:
    del lines[-1]


def plant_a_late_resume(lines: list[dict[str, Any]]) -> None:
    """As if the second start went on behind the checkpoint: its first step's samples are never seen."""
    first = next(index for index, line in enumerate(lines) if line["start"] != lines[0]["start"])
    for earlier, later in zip(lines[first:], lines[first + 1 :], strict=False):
        earlier["samples"] = later["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (plant_a_second_look, "sample 0 of epoch 0 seen twice"),
        (plant_a_gap, f"step {STEPS} was never done"),
        (plant_a_late_resume, "missed"),
    ],
)
def test_a_fault_planted_in_a_real_audit_is_found(
    small: tuple[Path, dict[str, Any]], tmp_path: Path, plant: Callable[[list[dict[str, Any]]], None], told: str
) -> None:
    from launch.certify.data import stream
    from launch.certify.runs import options

    output, result = small
    place, folder = RunSetup(output, "torchrun", result["seed"]), output / "runs" / "zero2-2-1"
    samples = stream(options(PLAN, place), STEPS, GLOBAL_BATCH)
    curve = read_curves(folder, ["train/loss"])["train/loss"]
    assert not any(one.problems for one in judge(read_audit(folder), samples, curve, curve, GLOBAL_BATCH, 0.0).values())
    for path in (folder / "audit").glob("*"):
        (tmp_path / "audit").mkdir(exist_ok=True)
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
        if path.name == "rank-00000.jsonl":
            plant(lines)
        (tmp_path / "audit" / path.name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    accounts = judge(read_audit(tmp_path), samples, curve, curve, GLOBAL_BATCH, 0.0)
    found = [problem for account in accounts.values() for problem in account.problems]
    assert any(told in problem for problem in found), found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_certificate(tmp_path: Path) -> None:
    result = certified(tmp_path / "whole")
    assert result["certified"]
    assert result["transitions"] == result["transitions_asked_for"] == 15
    assert result["largest_difference"]["ranks changed"] < 1e-5
    assert result["largest_difference"]["ranks the same"] == 0.0
