"""What a user reads who asks for help: every command's --help, and that what it cites is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.__main__ import COMMANDS, dispatch
from launch.curves import main as curves
from launch.curves import named_tags
from launch.zero.presets import FOLDER
from launch.zero.presets import main as presets
from tests.conftest import ROOT
from tests.train.runs import environment


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        dispatch(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = helped(capsys, command, "--help")
    assert text == helped(capsys, command, "-h") == helped(capsys, "help", command)
    examples = re.findall(r"^  (?:zerobert|python|deepspeed|mpirun) .*$", text, re.MULTILINE)
    assert examples, "an example stands on a line of its own"
    assert any(f"zerobert {command}" in line or "launch/train.py" in line for line in examples)
    noise = r"Literal|NoneType|<class|Optional\[|Union\[|type: |%%|: null, default: null|default: (True|False|None|\[')"
    assert not re.search(noise, text), re.search(noise, text)
    assert "help" in text.lower()


def test_defaults_and_types_are_shown_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(helped(capsys, "train", "--help").split())
    assert "(whole number or null, default: null)" in text
    assert "(a list of 2 numbers, default: [0.9, 0.999])" in text
    assert "write TensorBoard events under <output>/tensorboard (default: true)" in text
    assert "(number, default: 0.0001)" in text
    assert "--model CONFIG" not in text
    text = " ".join(helped(capsys, "submit", "--help").split())
    assert "SLURM's %x %j %A %a allowed; <output>/logs/%x-%j.log when null" in text
    assert "such as 1-5%1" in text


def test_zerobert_alone_and_help_list_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in ([], ["help"], ["--help"], ["-h"]):
        assert dispatch(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert all(f"  {name} " in texts[0] for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "command: 'trian' is unknown; did you mean train?"),
        (["Plan"], "command: 'Plan' is unknown; did you mean plan?"),
        (["build_kernels"], "command: 'build_kernels' is unknown; did you mean build-kernels?"),
        (["help", "exprot"], "command: 'exprot' is unknown; did you mean export?"),
        (["xyzzy"], "command: 'xyzzy' is unknown; choose one of doctor, prepare"),
        (["export"], "run: not given, nor output; --help tells what it is"),
        (["export", "x", "--output"], "output: its value is missing; give one after it"),
    ],
)
def test_a_wrong_command_is_named_with_the_nearest(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dispatch(arguments)
    assert str(caught.value).startswith(message)


def test_help_of_the_presets_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in FOLDER.glob("*.json")}
    with pytest.raises(SystemExit) as caught:
        presets(["--help"])
    assert caught.value.code == 0
    with pytest.raises(UserError, match="tyr: no such field"):
        presets(["--tyr"])
    assert "python -m launch.zero.presets" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in FOLDER.glob("*.json")} == before


@pytest.mark.parametrize(
    "words",
    [["a/b", "c/d"], ["a/b,c/d"], ["[a/b,c/d]"], ["[a/b,", "c/d]"], ["['a/b', \"c/d\"]"], ["a/b", "c/d", "a/b"]],
)
def test_tags_are_named_in_any_notation(words: list[str]) -> None:
    assert named_tags(words) == ["a/b", "c/d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--tags", "[]"], "tags: none is named; give some such as train/loss"),
        (["RUN", "--rows", "-1"], "rows: -1 is not allowed; give 0 or more"),
        (["RUN", "--json", "--plot", "x.png"], "plot: 'x.png' and json exclude each other; give one of the two"),
        (["--tags", "a"], "run: not given; give the output folder of a run"),
        (["--tags", "a", "b", "RUN"], "run: 'RUN' holds no TensorBoard files"),
        (
            ["RUN", "--tags", "a", "--tags", "b"],
            "tags: given twice, ['a'] and ['b']; write all values after one --tags",
        ),
    ],
)
def test_wrong_options_of_curves_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        curves(arguments)
    assert str(caught.value).startswith(message)


CITING = [
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "launch/**/*.py",
        "launch/**/*.yaml",
        "benchmarks/**/*.md",
        "slurm/*",
        "engine/**/*.py",
    )
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("path", CITING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_that_is_cited_is_there(path: Path) -> None:
    text = path.read_text()
    recipes = {one.name for one in (ROOT / "launch" / "recipes").glob("*.yaml")}
    cited = set(re.findall(r"recipes/([\w.\-]+\.yaml)", text)) | set(
        re.findall(r"`((?:pre|fine)[\w.\-]+\.yaml)`", text)
    )
    assert cited <= recipes


@pytest.mark.parametrize("arguments", [["-m", "launch", "plan", "--help"], ["launch/train.py", "--help"]])
def test_help_is_a_success_of_the_real_command(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
