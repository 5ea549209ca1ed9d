"""Mistakes in what a server is given, by the real command line: one line on stderr, exit code 2, no weights read."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from engine.predict.model import ModelFolder
from launch.__main__ import dispatch
from launch.cli import run_command
from tests.predict.models import write_model

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": (["IN/none"], "IN/none: no such folder"),
    "no head": (["IN/mlm"], "names 'BertForMaskedLM' in architectures, which has no head of a task"),
    "unknown host": (["IN/model", "--host=no.such.host.invalid"], "host: 'no.such.host.invalid' is no address that is"),
    "another machine's host": (["IN/model", "--host=192.0.2.1"], "host: '192.0.2.1' can't be listened at ("),
    "no host": (["IN/model", "--host="], "host: '' is not allowed; give an address or a name"),
    "negative port": (["IN/model", "--port=-1"], "port: -1 is not allowed; give at least 0"),
    "large port": (["IN/model", "--port=65536"], "port: 65536 is not allowed; give at most 65535"),
    "port in words": (["IN/model", "--port=http"], "port: 'http' is not allowed; give a whole number"),
    "no threads": (["IN/model", "--threads=0"], "threads: 0 is not allowed; give at least 1"),
    "no batch": (["IN/model", "--max_batch=0"], "max_batch: 0 is not allowed; give at least 1"),
    "negative wait": (["IN/model", "--max_wait_ms=-1"], "max_wait_ms: -1.0 is not allowed; give at least 0"),
    "endless wait": (["IN/model", "--max_wait_ms=inf"], "max_wait_ms: 'inf' is not allowed; give a number"),
    "no rows": (["IN/model", "--max_rows=0"], "max_rows: 0 is not allowed; give at least 1"),
    "no tokens": (["IN/model", "--max_tokens=3"], "max_tokens: 3 is not allowed; give at least 4"),
    "small bodies": (["IN/model", "--max_body=1"], "max_body: 1 is not allowed; give at least 1024"),
    "small queue": (["IN/model", "--max_queue=9"], "max_queue: 9 has no room for the 256 of max_rows; raise it"),
    "no time": (["IN/model", "--timeout=0"], "timeout: 0.0 is not allowed; give a number of seconds above 0"),
    "no patience": (["IN/model", "--client_timeout=nan"], "client_timeout: 'nan' is not allowed; give a number"),
    "no grace": (["IN/model", "--grace=0"], "grace: 0 is not allowed; give a number of seconds above 0"),
    "other long texts": (
        ["IN/model", "--long_texts=keep"],
        "long_texts: 'keep' is not allowed; give one of cut",
    ),
    "too long": (["IN/model", "--max_length=41"], "max_length: 41 is not allowed; IN/model has 40 positions"),
    "option of another head": (["IN/model", "--options=a,b"], "options: 'a,b' has no effect"),
    "option of predict": (["IN/model", "--output=x.jsonl"], "output: no such field"),
    "unknown option": (["IN/model", "--ports=1"], "ports: no such field; did you mean port?"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_model(folder / "model", "SequenceClassification", ("a", "b"))
    write_model(folder / "mlm", "MaskedLM", ("a", "b"))
    return folder


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["serve", *arguments])
    assert ended.value.code == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2(
    name: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(ModelFolder, "load", load)
    given, message = MISTAKES[name]
    port = [] if any("port" in argument for argument in given) else ["--port=0"]
    told = refused([argument.replace("IN", str(folders)) for argument in given] + port, capfd)
    assert message.replace("IN", str(folders)) in told


def test_a_port_in_use_is_found_before_the_model_is_looked_for(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = refused(["no-such-model", f"--port={port}"], capfd)
    assert told == f"error: port: {port} is in use at 127.0.0.1; give another, or 0 for a free one\n"


def test_a_model_whose_weights_cannot_be_read_ends_the_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (write_model(tmp_path, "SequenceClassification", ("a", "b")) / "model.safetensors").unlink()
    capfd.readouterr()
    assert f"{tmp_path}: it holds no weights" in refused([str(tmp_path), "--port=0"], capfd)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else found(name))
    told = refused(["no-such-model"], capfd)
    assert told == "error: serve needs prometheus-client; pip install 'zerobert[serve]'\n"
