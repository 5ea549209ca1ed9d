"""A start that fails ends: soon, with one line and the right exit code, and no process is left of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from engine.data.store.prepare import PrepareConfig, prepare
from engine.train.output import LOCK
from tests.train.runs import ROOT, SCRIPT, SMALL, command, environment, free_port, run, start_warm

WORKER = str(ROOT / "tests" / "train" / "ranks" / "failing_start_worker.py")
#: seconds that no start may take; on an idle machine all take less than 15
LIMIT = 60


@dataclass(frozen=True)
class End:
    """How a start ended: of each process that the test started its exit code and what it printed."""

    codes: list[int]
    printed: list[str]
    seconds: float
    left: list[int]
    """processes that were still there"""

    def errors(self, process: int = 0) -> list[str]:
        return [line for line in self.printed[process].splitlines() if line.startswith("error: ")]


def processes_of(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def ended(
    commands: Sequence[Sequence[str]], *envs: Mapping[str, str], cwds: Sequence[Path] = (), stop_at: str = ""
) -> End:
    """Start commands at once and wait for their ends.

    Args:
        commands: a process each.
        envs: what each has in its environment besides.
        cwds: the folder of each.
        stop_at: SIGTERM goes to the first one once it has printed this.
    """
    mark, began = uuid.uuid4().hex, time.monotonic()
    started = [
        subprocess.Popen(
            arguments,
            env=environment() | {"MARK": mark, "PYTHONPATH": str(ROOT)} | dict(envs[index] if envs else {}),
            cwd=cwds[index] if cwds else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for index, arguments in enumerate(commands)
    ]
    first = ""
    if stop_at:
        assert started[0].stdout is not None
        while stop_at not in first:
            line = started[0].stdout.readline()
            assert line, first
            first += line
        started[0].send_signal(signal.SIGTERM)
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        left = processes_of(mark)
        for process in left:
            os.kill(process, signal.SIGKILL)
    printed[0] = first + printed[0]
    return End([process.returncode for process in started], printed, time.monotonic() - began, left)


def hand(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """The variables of a rank that somebody starts by hand."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Another process has the run's folder."""
    output.mkdir()
    code = f"from engine.train.output import OutputLock as L; from pathlib import Path; k = L(Path({str(output)!r}))\n"
    code += "k.take(); print('locked', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    yield
    holder.kill()
    holder.communicate()


@dataclass(frozen=True)
class Case:
    """A start that fails: its launcher, options, exit codes, and what its line says."""

    launcher: str
    says: str
    options: tuple[str, ...] = ()
    code: tuple[int, ...] = (2,)
    fails: tuple[int | None, str] | None = None
    """the rank and the word of `failing_start_worker`"""
    before: str = ""
    """what is made in the folder of the test before: `made` below"""
    lines: int = 1


CASES: dict[str, Case] = {
    "a typo": Case("python", "optim.lr: no such field", ("--optim.lr=1",)),
    "a typo, 2 ranks": Case("deepspeed", "optim.lr: no such field", ("--optim.lr=1",)),
    "a missing recipe, 2 ranks": Case("torchrun", "config: ", ("--config=none.yaml",)),
    "an output that is a file": Case("python", "it is a file", before="file"),
    "an output that is a file, 2 ranks": Case("torchrun", "it is a file", before="file"),
    "an output below a file": Case("deepspeed", "is a file", ("--output=OUT/below",), before="file"),
    "an output that is a link to nothing": Case("python", "a link to nothing", before="link"),
    "checkpoints that are a file": Case("torchrun", "checkpoints is a file", before="checkpoints"),
    "a config.yaml that is a folder": Case("python", "config.yaml is a folder", before="config.yaml/"),
    "a folder in use": Case("python", "is in use by process ", before="lock"),
    "a folder in use, 2 ranks": Case("torchrun", "is in use by process ", before="lock"),
    "a folder in use under deepspeed": Case("deepspeed", "is in use by process ", before="lock"),
    "a taken port": Case("deepspeed 1", "MASTER_PORT: ", before="port"),
    "a taken port, 2 ranks": Case("deepspeed", "MASTER_PORT: ", before="port"),
    "a mistake in the model": Case("python", "model.init_from: ", fails=(None, "mistake")),
    "a mistake on one rank": Case("deepspeed", "error: rank 1 on ", fails=(1, "mistake")),
    "a mistake on rank 0": Case("torchrun", "error: model.init_from: ", fails=(0, "mistake")),
    "a defect": Case("python", "AssertionError: a broken thing", fails=(None, "defect"), code=(1,), lines=0),
    "a defect on one rank": Case("torchrun", "AssertionError: a broken thing", fails=(1, "defect"), code=(1,)),
    "a defect on all ranks": Case("deepspeed", "a broken thing", fails=(None, "defect"), code=(1,), lines=0),
    "no memory": Case("python", "out of memory on rank 0", fails=(None, "memory"), code=(1,)),
    "no memory on one rank": Case("deepspeed", "out of memory on rank 1", fails=(1, "memory"), code=(1,)),
    "Ctrl-C": Case("python", "interrupted", fails=(None, "interrupt"), code=(130,), lines=0),
    "Ctrl-C on all ranks": Case("torchrun", "interrupted", fails=(None, "interrupt"), code=(130,), lines=0),
    "an exit": Case("python", "", fails=(None, "exit"), code=(3,), lines=0),
    "ranks that don't divide the batch": Case("deepspeed", "train.global_batch: 15", ("--train.global_batch=15",)),
    "no data": Case("torchrun", "nowhere", ("--data.path=nowhere",)),
}


def made(before: str, folder: Path, stack: contextlib.ExitStack) -> list[str]:
    """Make what stands in the way of a run in `folder / "run"`; options for the launcher."""
    output = folder / "run"
    if before == "file":
        output.touch()
    elif before == "link":
        output.symlink_to(folder / "nowhere")
    elif before == "lock":
        stack.enter_context(locked(output))
    elif before == "port":
        return ["--master_port", str(stack.enter_context(taken_port()))]
    elif before:
        output.mkdir()
        (output / before).mkdir() if before.endswith("/") else (output / before).touch()
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_start_that_fails_ends(name: str, store: Path, tmp_path: Path) -> None:
    case = CASES[name]
    with contextlib.ExitStack() as stack:
        launcher, _, ranks = case.launcher.partition(" ")
        found = made(case.before, tmp_path, stack)
        start = command(launcher, int(ranks or 2)) + found
        script = SCRIPT if case.fails is None else WORKER
        output = tmp_path / "run"
        defaults = [f"--output={output}", f"--data.path={store}", "--data.workers=2"]
        small = [option for option in SMALL if not option.startswith("--data.workers")]
        options = [option.replace("OUT", str(output)) for option in case.options]
        end = ended([[*start, script, *small, *defaults, *options]], {"FAILS": json.dumps(case.fails)})
    line = next((line for line in end.printed[0].splitlines() if case.says and case.says in line), "")
    print(f"| {name} | {case.launcher} | {end.seconds:.0f} | {end.codes[0]} | {line} |")
    assert end.left == []
    assert line or not case.says, end.printed[0]
    if launcher == "torchrun":  # which has a code of its own, and tells that of the rank
        assert end.codes[0] == 1
        assert any(f"exitcode  : {code} " in end.printed[0] for code in case.code), end.printed[0]
    else:
        assert end.codes[0] in case.code, end.printed[0]
    assert len(end.errors()) == case.lines, end.printed[0]
    assert "Traceback" not in end.printed[0] or (case.fails or (0, ""))[1] == "defect" or launcher == "torchrun"
    if not case.before and case.code == (2,):
        assert not output.exists()


def failed(store: Path, output: Path, fails: tuple[int | None, str], ranks: int, code: int) -> str:
    """What a warm start prints that ends with the code."""
    options = [f"--data.path={store}", "--data.workers=2"]
    process = start_warm(output, *options, ranks=ranks, script=WORKER, FAILS=json.dumps(fails))
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    return printed


def test_a_mistake_on_one_rank_is_told_by_it_alone(store: Path, tmp_path: Path) -> None:
    printed = failed(store, tmp_path / "run", (1, "mistake"), 2, 2)
    assert [line[:16] for line in printed.splitlines() if line.startswith("error: ")] == ["error: rank 1 on"]
    assert not (tmp_path / "run").exists()


def test_an_interrupt_is_told_in_one_line(store: Path, tmp_path: Path) -> None:
    printed = failed(store, tmp_path / "run", (None, "interrupt"), 1, 130)
    assert "interrupted" in printed
    assert "error: " not in printed


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_recipe_that_one_rank_lacks_is_told_by_all(store: Path, tmp_path: Path, wrong: int) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    (folders[1 - wrong] / "recipe.yaml").write_text("task: pretrain\n")
    port = free_port()
    options = [*SMALL, "--config=recipe.yaml", f"--data.path={store}", f"--output={tmp_path / 'run'}"]
    end = ended([[sys.executable, SCRIPT, *options]] * 2, hand(0, 2, port), hand(1, 2, port), cwds=folders)
    print(f"| a recipe that rank {wrong} lacks | by hand | {end.seconds:.0f} | {end.codes} | {end.printed} |")
    assert (end.codes, end.left) == ([2, 2], [])
    for rank in range(2):
        (line,) = end.printed[rank].splitlines()
        named = "" if (rank, wrong) == (0, 0) else f"rank {wrong} on {socket.gethostname()}: "
        assert line.startswith(f"error: {named}config: ")
        assert "recipe.yaml" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_whose_folder_cannot_be_written_is_told_by_all(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    port = free_port()
    commands = [
        [sys.executable, SCRIPT, *SMALL, f"--data.path={store}", f"--output={tmp_path / name}"]
        for name in ("run", "other", "file")
    ]
    end = ended(commands, *(hand(rank, 3, port) for rank in range(3)))
    assert (end.codes, end.left) == ([2, 2, 2], [])
    for printed in end.printed:
        assert printed.startswith(f"error: rank 2 on {socket.gethostname()}: output: {tmp_path / 'file'} ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_says_whom_it_waits_for_and_hears_a_signal_meanwhile(store: Path, tmp_path: Path) -> None:
    port = free_port()
    arguments = [sys.executable, SCRIPT, *SMALL, f"--data.path={store}", f"--output={tmp_path}"]
    end = ended([arguments], hand(0, 4, port), stop_at="waiting for ")
    assert end.printed[0].splitlines() == [
        f"waiting for 3 of 4 ranks: 1, 2, 3 (process group at 127.0.0.1:{port})",
        "stopped by SIGTERM before all ranks were there; nothing was saved",
    ]
    assert (end.codes, end.left) == ([0], [])
    assert (tmp_path / "REQUEUE").read_text() == "0\n"


@pytest.mark.slow
def test_a_rank_that_finds_no_rank_0_waits_aloud(store: Path, tmp_path: Path) -> None:
    port = free_port()
    arguments = [sys.executable, SCRIPT, *SMALL, f"--data.path={store}", f"--output={tmp_path / 'run'}"]
    lost = hand(1, 2, port, LOCAL_RANK="0")
    end = ended([arguments], lost, stop_at="waiting for ")
    assert end.printed[0].startswith(f"waiting for 1 of 2 ranks: 0 (process group at 127.0.0.1:{port})\n")
    assert end.codes == [0]
    limited = ended([[*arguments, "--fault.hang_timeout=4"]], lost)
    assert limited.codes == [75]
    limited = ended([[*arguments, "--fault.hang_timeout=4"]], hand(0, 2, port))
    assert limited.codes == [75]
    assert limited.errors()[0].startswith("error: waited 4 s in vain for 1 of 2 ranks: 1 (process group at ")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["no.such.host.invalid", "192.0.2.1"])
def test_a_master_address_that_leads_elsewhere_is_one_line(store: Path, tmp_path: Path, address: str) -> None:
    arguments = [sys.executable, SCRIPT, *SMALL, f"--data.path={store}", f"--output={tmp_path / 'run'}"]
    end = ended([arguments], hand(0, 2, free_port(), MASTER_ADDR=address, LOCAL_WORLD_SIZE="2"))
    assert (end.codes, end.left) == ([2], [])
    assert end.printed[0].startswith(f"error: MASTER_ADDR: {address} is not {socket.gethostname()}")


@pytest.mark.slow
def test_empty_variables_are_as_none(store: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, SCRIPT, *SMALL, f"--data.path={store}", f"--output={tmp_path / 'run'}"]
    empty = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"), "")
    end = ended([[*arguments, "--train.steps=1"]], empty)
    assert end.codes == [0], end.printed
    assert "one process on cpu" in end.printed[0]
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_smaller_store_under_a_resumed_run_ends_it(store: Path, tmp_path: Path, ranks: int) -> None:
    """Its loader processes are at work by then, or were to be."""
    text = tmp_path / "text.txt"
    text.write_text("The cat sat. It ran.\n\nThe dog ran. It sat.\n\n" * 40)
    small = tmp_path / "small"
    run(tmp_path / "run", f"--data.path={store}", "--train.steps=30", launcher="deepspeed", ranks=ranks)
    prepare(PrepareConfig(source=[str(text)], output=str(small), tokenizer=str(store / "tokenizer"), workers=0))
    options = [*SMALL, f"--output={tmp_path / 'run'}", f"--data.path={small}", "--data.workers=2", "--resume=auto"]
    end = ended([[*command("deepspeed", ranks), SCRIPT, *options, "--train.steps=40"]])
    assert (end.codes, end.left) == ([2], [])
    assert len(end.errors()) == 1
    assert "data" in end.errors()[0]


def test_a_second_run_in_a_folder_waits_a_moment_and_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    from engine.errors import UserError
    from engine.train.output import OutputLock, is_used

    output = tmp_path / "deep" / "run"
    with locked(tmp_path / "held"):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"held is in use by process \d+ on "):
            OutputLock(tmp_path / "held").take(patience=0.3)
        assert time.monotonic() - began < 3
    OutputLock(tmp_path / "held").take(patience=0.3)  # its process is dead
    lock = OutputLock(output)
    lock.take()
    assert not is_used(output)
    lock.abandon()
    assert not (tmp_path / "deep").exists()
    lock.take()
    (output / "config.yaml").touch()
    assert is_used(output)
    lock.abandon()
    assert (output / LOCK).exists()
    lock.release()
    assert [path.name for path in output.iterdir()] == ["config.yaml"]


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from engine.train.output import OutputLock

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = OutputLock(tmp_path / "run")
    lock.take()
    assert "can't be locked (No locks available); start no other run there" in capsys.readouterr().out
    lock.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "is_folder", "words"),
    [
        ("tensorboard", False, "tensorboard is a file"),
        ("checkpoints", False, "checkpoints is a file"),
        ("export", False, "export is a file"),
        ("config.yaml", True, "config.yaml is a folder"),
        ("heartbeat.json", True, "heartbeat.json is a folder"),
    ],
)
def test_what_stands_in_the_way_of_a_run_is_named(tmp_path: Path, name: str, is_folder: bool, words: str) -> None:
    from engine.errors import UserError
    from engine.train.output import check_output

    path = tmp_path / name
    path.mkdir() if is_folder else path.touch()
    with pytest.raises(UserError, match=words):
        check_output(tmp_path)
    shutil.rmtree(path) if is_folder else path.unlink()
    check_output(tmp_path)
    check_output(tmp_path / "to" / "be" / "made")
