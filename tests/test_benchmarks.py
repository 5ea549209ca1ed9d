"""Scaling, the runner and the pictures of the benchmarks; none is timed here."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as runner
from benchmarks import plots, scaling
from benchmarks.common import emit, processor, spread
from launch.train import parse as parse_training
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


def test_a_benchmark_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    outcome = runner.run("startup", [], tmp_path, limit=0.5)
    assert outcome.state == "failed"
    assert "its limit" in outcome.reason
    assert outcome.seconds < runner.GRACE_S
    assert not (tmp_path / "startup.json").exists()


def test_a_benchmark_that_is_not_there_has_failed(tmp_path: Path) -> None:
    (tmp_path / "nothing.json").write_text("{}")
    assert runner.run("nothing", [], tmp_path, limit=5).reason == "there is no benchmarks.nothing"


def test_the_runner_goes_on_after_failures(tmp_path: Path) -> None:
    """A real run of three: one succeeds, one is skipped for want of data, one is called wrongly."""
    options = ["roofline=--sizes base --gpus a100 --lengths 128", f"finetune=--data {tmp_path}", "scaling=--rounds 0"]
    command = [sys.executable, "-m", "benchmarks.all", "--output", str(tmp_path), "--options", *options]
    command += ["--only", "scaling", "finetune", "roofline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {one["name"]: one["state"] for one in summary["outcomes"]}
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
