"""A search as a SLURM array, without a cluster: the script, and what a stub of SLURM gets."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.search.command import main

TRAINING = ["--task=sequence_classification", "--labelled.train=train.tsv"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a search in a folder with an odd name, from which it is submitted."""
    folder = tmp_path / "a b $(touch canary) 'q'"
    (folder / "bert").mkdir(parents=True)
    monkeypatch.chdir(folder)
    Path("space.yaml").write_text("optim.learning_rate: {low: 1e-5, high: 1e-1, log: true}\n")
    return ["--space", "space.yaml", "--trials=6", "--sampler=random"]


def test_each_element_is_the_same_search(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--time=1:00:00", "--gpus-per-node", "2", "--dry-run"]
    given = ["--model.init_from=bert", *TRAINING, "--output", "o u t"]
    assert main([*arguments, "--submit", "4", "--", *job, *given]) == 0
    script = capsys.readouterr().out
    for line in ("--array=0-3", "--time=1:00:00", "--gpus-per-node=2", "--ntasks-per-node=1", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert f'#SBATCH --chdir="{Path.cwd()}"\n' in script
    (line,) = (line for line in script.splitlines() if line.startswith("srun "))
    words = shlex.split(line.removesuffix("|| code=$?"))
    place = words.index("search")
    expected = [*arguments, "--", "--model.init_from=bert", *TRAINING, f"--output={Path.cwd() / 'o u t'}"]
    assert words[place + 1 :] == expected
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bert", "space.yaml"]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False)])
def test_what_usr1_stopped_goes_back_into_the_queue(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, code: int, requeued: bool
) -> None:
    assert main([*arguments, "--submit=2", "--", "--model.init_from=bert", *TRAINING, "--dry-run"]) == 0
    for name, text in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > requeued')):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/sh\n{text}\n")
        stub.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", capsys.readouterr().out], env={"PATH": f"{tmp_path / 'bin'}:/bin", "SLURM_JOB_ID": "7"}
    )
    assert done.returncode == (0 if requeued else code)
    assert Path("requeued").is_file() is requeued


def test_it_is_submitted_with_a_copy_of_the_code(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 41\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    assert main([*arguments, "--submit=3", "--", "--model.init_from=bert", *TRAINING, "--output=out"]) == 0
    output = Path.cwd() / "out"
    assert f"job 41: 3 search(es) into {output}; the last of them reports" in capsys.readouterr().out
    assert (output / "submit" / "001" / "code" / "launch" / "search" / "command.py").is_file()


@pytest.mark.parametrize(
    ("submit", "options", "message"),
    [
        ("0", [], "submit: 0 is not allowed; give the number of searches, at least 1"),
        ("2", ["--nodes=2"], "submit: an element is one search on one node; leave out nodes"),
        ("2", ["--array=1-2%1"], "submit: an element is one search on one node"),
        ("2", ["--tim=1"], "tim"),
        ("2", ["--time=soon"], "time: 'soon'"),
        ("2", ["--model.init_from=./gone"], "model.init_from: './gone' is not there; give a path that the nodes see"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], submit: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main([*arguments, f"--submit={submit}", "--", "--model.init_from=bert", *TRAINING, *options])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()
