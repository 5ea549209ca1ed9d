"""The documentation: that it builds strictly, and that the commands and options that it names are there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from launch.__main__ import COMMANDS, dispatch
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="no mkdocs-material")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources of the pages, to be spoiled."""
    for name in ("docs", "engine", "launch", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


@needs_mkdocs
def test_the_pages_build(copy: Path) -> None:
    done = build(copy)
    assert done.returncode == 0, done.stderr
    page = (copy / "build" / "docs" / "configuration.html").read_text()
    assert "sequences in an optimizer step, over all ranks" in page
    assert row_of(page, "seed")[:2] == ["whole number", "<code>1</code>"]
    assert row_of(page, "train.async_save")[1] == "<code>true</code>"
    assert row_of(page, "monitor.csv")[2] == "write a CSV file a curve under &lt;output&gt;/csv"
    assert not re.search(r'(?:src|rel="stylesheet" href)="(?:https?:)?//', page), "a page asks another host"


def row_of(page: str, option: str) -> list[str]:
    """The cells beside an option in a table of the configuration's page: value, default and text."""
    row = re.search(rf"<td><code>{re.escape(option)}</code></td>(.*?)</tr>", page, re.S)
    assert row is not None
    return re.findall(r"<td>(.*?)</td>", row[1], re.S)


@needs_mkdocs
@pytest.mark.parametrize(
    "spoil", ["link", *(pytest.param(spoil, marks=pytest.mark.slow) for spoil in ("anchor", "page"))]
)
def test_a_broken_link_or_a_missing_page_fails(copy: Path, spoil: str) -> None:
    page = copy / "docs" / "quickstart.md"
    if spoil == "page":
        page.unlink()
    else:
        page.write_text(page.read_text() + {"link": "[x](none.md)\n", "anchor": "[x](data.md#none)\n"}[spoil])
    assert build(copy).returncode == 1


@cache
def helped(*command: str) -> str:
    """What --help of a command, or of a verb of one, prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        dispatch([*command, "--help"])
    return text.getvalue()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_and_option_of_a_page_is_there(path: Path) -> None:
    """A command line goes to the end of its line, over backslashes, to a comment, or to the end of its backticks."""
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(r"\bzerobert ([a-z-]+)([^\n`#]*)", "\n".join(code_of(text)))
    lines += [("train", rest) for rest in re.findall(r"launch/train\.py([^\n`#]*)", "\n".join(code_of(text)))]
    for command, rest in lines:
        assert command in {*COMMANDS, "help"}, f"zerobert {command}"
        known = helped(command) + (helped("train") if command in ("submit", "seeds", "search") else "")
        known += verb_helped(command, rest)
        known += helped("submit") if command in ("suite", "ablate", "search") else ""
        for option in re.findall(r"(?<=\s)--[a-z][\w.-]*", rest):
            assert re.search(rf"{re.escape(option)}(?![\w-])", known), f"zerobert {command} {option}"


def verb_helped(command: str, rest: str) -> str:
    """What --help of the verb prints that a command line names; nothing of a command without verbs."""
    verbs = (
        getattr(importlib.import_module(f"launch.{COMMANDS[command][0]}"), "VERBS", {}) if command in COMMANDS else {}
    )
    verb = next(iter(rest.split()), "")
    return helped(command, verb) if verb in verbs else ""


def code_of(text: str) -> list[str]:
    """The code of a page: its blocks, and what stands in backticks."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
