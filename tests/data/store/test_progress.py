"""Progress of learning a vocabulary, in a batch log and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from engine.data.text import progress
from engine.data.text.embedded import embedded_documents
from engine.data.text.progress import LearningProgress
from engine.data.tokenizer.wordpiece import train_wordpiece
from tests.conftest import ROOT
from tests.data.store.corpora import TEXTS, write_corpus


class Watched:
    """Documents that tell where their readers are."""

    def __init__(self, texts: list[str], told: LearningProgress) -> None:
        self.texts, self.told = texts, told

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.told.begin_pass()
        for number, text in enumerate(self.texts):
            yield text
            self.told.update(number / len(self.texts))
        self.told.end_pass()


def test_each_phase_and_each_while_is_a_line_of_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.02)
    caplog.set_level("INFO")
    with LearningProgress() as told:
        train_wordpiece(Watched(embedded_documents()[:150], told), tmp_path / "v", 2000)
        time.sleep(0.2)  # a slow machine's last phase
    lines = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    assert [line for line in lines if "done in" in line] == [
        line for phase in LearningProgress.PHASES for line in lines if line.startswith(f"{phase}: done in ")
    ]
    assert sum("done in" in line for line in lines) == 3
    assert any(line.startswith("count characters: ") and "% after" in line for line in lines)
    assert any(line.startswith("learn pieces: after ") for line in lines)


def test_a_failure_ends_the_thread_without_a_last_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    told = LearningProgress()

    def fail() -> None:
        with told:
            told.begin_pass()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert not told._thread.is_alive()
    assert not [record for record in caplog.records if record.name == progress.__name__]


def preparing(folder: Path) -> list[str]:
    """The command that prepares a small corpus."""
    source, output = write_corpus(folder / "corpus.jsonl", TEXTS), folder / "store"
    options = ["--source", str(source), "--output", str(output), "--vocab_size", "300", "--workers=0"]
    return [sys.executable, "-m", "launch", "prepare", *options]


def test_the_command_tells_the_phases(tmp_path: Path) -> None:
    done = subprocess.run(preparing(tmp_path), cwd=ROOT, capture_output=True, text=True, check=True)
    phases = [line.split(":")[0] for line in done.stdout.splitlines() if ": done in" in line]
    assert phases == list(LearningProgress.PHASES)
    assert done.stderr == ""


def test_a_terminal_shows_a_bar_instead(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(preparing(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, text=True) as running:
        os.close(slave)
        assert running.stdout is not None
        printed = running.stdout.read()
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert running.returncode == 0
    assert "done in" not in printed
    assert "count characters: " in shown
    assert "%|" in shown
