"""What a shell completes with the script of `zerobert --print_completion`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.__main__ import COMMANDS
from launch.completion import completion_script
from tests.conftest import ROOT
from tests.train.runs import environment

#: calls the function that the script registers, as bash does when the tab key is pressed
PRESS_TAB = """
source "$0"
function=$(complete -p zerobert | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"$function" zerobert "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash as the command prints it; torch, which takes seconds, has no part in it."""
    code = "import sys; from launch.__main__ import dispatch; dispatch(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "--print_completion", "bash"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "zerobert.bash"
    path.write_text(done.stdout)
    return path


def completed(script: Path, folder: Path, words: str) -> list[str]:
    """What bash offers for the last word."""
    command = ["bash", "-c", PRESS_TAB, str(script), *shlex.split(words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("zerobert prep", ["prepare"]),
        ("zerobert train --model.hid", ["--model.hidden_size", "--model.hidden_dropout"]),
        ("zerobert train --debug --train.precision b", ["bf16"]),
        ("zerobert train --task pre", ["pretrain"]),
        ("zerobert train --data.path my", ["my_store"]),
        ("zerobert submit --nod", ["--nodes"]),
        ("zerobert submit --data.pa", ["--data.path"]),
        ("zerobert predict my", ["my_store"]),
        ("zerobert predict --prec", ["--precision"]),
        ("zerobert export --weights ''", ["best", "last"]),
        ("zerobert status my", ["my_store"]),
        ("zerobert seeds --fol", ["--folds"]),
        ("zerobert compare my", ["my_store"]),
        ("zerobert scaling fi", ["fit"]),
        ("zerobert scaling fit my", ["my_store"]),
        ("zerobert scaling fit --hold", ["--hold-out-largest"]),
        ("zerobert --ver", ["--version"]),
    ],
)
def test_bash_completes_commands_options_and_values(
    script: Path, tmp_path: Path, words: str, offered: list[str]
) -> None:
    (tmp_path / "my_store").mkdir()
    assert completed(script, tmp_path, words) == offered


def test_bash_offers_every_command(script: Path, tmp_path: Path) -> None:
    assert completed(script, tmp_path, "zerobert ''") == list(COMMANDS)


def test_zsh_gets_the_same_commands_and_options(tmp_path: Path) -> None:
    text = completion_script(COMMANDS, "zsh")
    assert text.startswith("#compdef zerobert")
    for command in COMMANDS:
        assert f"    {command}:'" in text
    assert '"--train.precision[' in text
    assert ":(fp32 bf16 fp16)" in text
    if shutil.which("zsh"):
        (tmp_path / "_zerobert").write_text(text)
        subprocess.run(["zsh", "-n", str(tmp_path / "_zerobert")], check=True)


@pytest.mark.parametrize("shell", ["", "ksh"])
def test_another_shell_is_refused(shell: str) -> None:
    with pytest.raises(UserError, match=rf"^print_completion: '{shell}' is not a known shell; choose one of bash, zsh"):
        completion_script(COMMANDS, shell)
