"""A suite as a SLURM array, without a cluster: the scripts, what an element runs, and what a stub of SLURM gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.suite.command import main
from tests.launch.suite.files import run_suite, write_suite

ODD = "a b $(touch canary) 'q'"


def scripts(path: Path, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    """The array's script and that of the report, as a dry run prints them."""
    assert main([str(path), f"--output={output}", *options, "--submit", "--", "--gpus-per-node=2", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.split("# then, behind the array:\n")
    return first, second


def element(script: str, index: int, folder: Path) -> tuple[str, list[str]]:
    """The output folder and the options that an element chooses, as bash reads its script, and where it logs."""
    end = script.index("# --- end of settings")
    show = '\nprintf "%s\\n" "$OUTPUT" "${ARGUMENTS[@]}" > "$SHOWN"\n'
    shown = folder / "shown"
    (folder / "script").write_text(script[:end] + show)
    environment = {
        "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SHOWN": str(shown),
        "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    subprocess.run(["bash", str(folder / "script")], env=environment, cwd=folder, check=True, capture_output=True)
    output, *arguments = shown.read_text().splitlines()
    return output, arguments


def test_each_element_of_the_array_is_one_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    path = write_suite(folder)
    output = folder / "out"
    assert run_suite(path, "--only", "epochs=2") == 0
    capsys.readouterr()
    first, second = scripts(path, output, capsys, "--runs=3")
    assert "#SBATCH --array=0-3%3\n" in first
    assert "#SBATCH --gpus-per-node=2\n#SBATCH" in first
    found = [element(first, index, tmp_path) for index in range(4)]
    names = [str(Path(place).relative_to(output)) for place, _ in found]
    assert names == [f"bert/{task}/epochs=4/seed-{seed}" for task in ("rte", "own") for seed in (1, 2)]
    for place, arguments in found:
        assert f"--output={place}" in arguments
        assert f"--model.init_from={folder / 'bert'}" in arguments
        assert "--resume=auto" in arguments
        log = Path(f"{place}.log").read_text()
        assert log == "--- started: job 7 on n1\n"
    assert not list(tmp_path.rglob("canary"))
    assert "#SBATCH --dependency=afterany:ARRAY\n" in second
    assert "--gpus-per-node" not in second
    assert re.search(r"^exec \S+ -m launch suite '.*out'$", second, re.MULTILINE)
    assert not (output / "submit").exists()


def test_what_is_submitted_is_an_array_and_a_report_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/called\nwc -l < {tmp_path}/called | sed "s/^ */4/"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    path, output = write_suite(tmp_path), tmp_path / "out"
    assert main([str(path), f"--output={output}", "--submit"]) == 0
    printed = capsys.readouterr().out
    assert f"job 41: 8 run(s) into {output}, 1 rank(s) each\njob 42: their report, behind them" in printed
    folder = output / "submit" / "001"
    assert (tmp_path / "called").read_text().split() == [str(folder / "train.sbatch"), str(folder / "report.sbatch")]
    assert (folder / "code" / "launch" / "suite" / "command.py").is_file()
    assert json.loads((folder / "job.json").read_text())["job"] == "41"
    assert "#SBATCH --dependency=afterany:41\n" in (folder / "report.sbatch").read_text()
    assert len(json.loads((output / "suite.json").read_text())) == 4
    assert sys.executable in (folder / "report.sbatch").read_text()


def test_nothing_to_do_is_told(tmp_path: Path) -> None:
    path, output = write_suite(tmp_path, grid={"train.epochs": [2]}, seeds=1), tmp_path / "out"
    assert run_suite(path) == 0
    with pytest.raises(UserError, match=r"^suite: all of its runs are finished; zerobert suite .* makes the report$"):
        main([str(path), f"--output={output}", "--submit"])


def test_a_batch_that_the_ranks_cannot_divide_is_refused_at_once(tmp_path: Path) -> None:
    path, output = write_suite(tmp_path), tmp_path / "out"
    with pytest.raises(UserError, match=r"^train.global_batch: 64 is not a multiple of 3 rank\(s\)"):
        main([str(path), f"--output={output}", "--submit", "--", "--ntasks-per-node=3"])
    assert not output.exists()
