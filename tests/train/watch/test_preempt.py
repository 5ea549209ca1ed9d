"""A signal ends a run at a step boundary, on all ranks, with a checkpoint from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine import dist
from engine.train.watch.preempt import (
    LAUNCHER_ENDED,
    MARKER,
    REASONS,
    Stop,
    Stopped,
    StopRequest,
    _Lenient,
    agreed_stop,
)
from tests.train.checkpoint.accidents import accident, heartbeat, start, tracebacks
from tests.train.runs import ROOT, SMALL, environment, losses, run
from tests.warm import Started

STEPS = 8


@pytest.mark.parametrize(
    ("met", "scheduled", "expected"),
    [
        ([], False, None),
        (["SIGUSR1"], False, Stop("SIGUSR1", False)),
        (["SIGTERM", "SIGUSR1"], True, Stop("SIGUSR1", False)),
        (["SIGINT", "SIGTERM"], False, Stop("SIGINT", True)),
        (["SIGINT"], True, Stop("SIGINT", False)),
        (["SIGHUP", LAUNCHER_ENDED], False, Stop("SIGHUP", False)),
        ([LAUNCHER_ENDED], False, Stop(LAUNCHER_ENDED, False)),
    ],
)
def test_ranks_agree_on_the_most_personal_reason(met: list[str], scheduled: bool, expected: Stop | None) -> None:
    assert agreed_stop([2.0 * (reason in met) for reason in REASONS], scheduled) == expected


def test_only_an_interrupt_by_a_person_is_no_success() -> None:
    assert (Stop("SIGTERM", False).code, Stop("SIGINT", True).code) == (0, 130)


def test_a_request_notes_signals_and_takes_one_interrupt_only() -> None:
    taken = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in taken}
    streams = sys.stdout, sys.stderr
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        request = StopRequest()
        request.listen(launched=False)
        assert request.counts() == [0, 0, 0, 0, 0]
        with pytest.raises(KeyboardInterrupt):  # nothing to save before the loop
            os.kill(os.getpid(), signal.SIGINT)
        request.listen_to_interrupts()
        for number in taken:
            os.kill(os.getpid(), number)
        assert request.counts() == [1, 1, 1, 1, 0]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    """`nohup` starts a command so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        request = StopRequest()
        request.listen(launched=False)
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.counts() == [0, 0, 0, 0, 0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_printing_goes_on_without_a_reader() -> None:
    read, write = os.pipe()
    told: list[str] = []
    pipe = io.TextIOWrapper(os.fdopen(write, "wb", buffering=0), write_through=True)
    stream = _Lenient(pipe, lambda: told.append("gone"))
    print("somebody", file=stream, flush=True)  # type: ignore[call-overload]
    assert (os.read(read, 99), told) == (b"somebody\n", [])
    os.close(read)
    print("nobody", file=stream, flush=True)  # type: ignore[call-overload]
    assert told
    assert not stream.isatty()


def terminated_at(moment: str) -> Any:
    """A context in which this process gets SIGTERM at a moment of a run of 16 samples a step and 4 steps."""
    from engine.data.loading.source import MicroBatch
    from engine.tasks.pretrain import Pretraining
    from engine.train.checkpoint.saver import Saver

    def after(original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            if when(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **named)

        return called

    def in_step(number: int) -> Any:
        def when(_task: Pretraining, _model: Any, batch: MicroBatch) -> bool:
            return batch.cursor.consumed == 16 * number

        return mock.patch.object(Pretraining, "step", after(Pretraining.step, when))

    contexts = {
        "start-up": lambda: mock.patch.object(
            Pretraining, "build_model", after(Pretraining.build_model, lambda _: True)
        ),
        "step 2": lambda: in_step(2),
        "last step": lambda: in_step(4),
        "evaluation": lambda: mock.patch.object(
            Pretraining, "show_guesses", after(Pretraining.show_guesses, lambda *_: True)
        ),
        "save": lambda: mock.patch.object(Saver, "save", after(Saver.save, lambda *_: True)),
        "none": contextlib.nullcontext,
    }
    return contexts[moment]()


def attempt(output: Path, options: list[str], moment: str) -> dict[str, Any]:
    """A run of one rank in this process, with SIGTERM at a moment; what is known after it."""
    from engine.errors import RunError
    from engine.train.watch.guard import pending_evaluation
    from engine.train.watch.session import Session
    from engine.train.watch.watchdog import Watchdog
    from launch.configure.options import parse_given
    from launch.launcher import Launcher
    from launch.train import run as run_here

    config, given = parse_given([*SMALL, f"--output={output}", "--train.steps=4", *options])
    request = StopRequest()
    request.listen(launched=False)
    session = Session(config, dist.World(), request, Watchdog(output))
    ended = "done"
    with terminated_at(moment):
        try:
            run_here(config, Launcher("none", 1), session, given)
        except Stopped as stopped:
            ended = f"{stopped} {stopped.code}"
        except RunError as error:
            ended = str(error)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends this process
    marker = output / MARKER
    return {
        "ended": ended,
        "marker": marker.read_text() if marker.exists() else None,
        "checkpoints": sorted(path.name for path in (output / "checkpoints").glob("step-*")),
        "evaluated": pending_evaluation(output, 2),
        "state": session.heartbeat.state,
        "exported": (output / "export").exists(),
    }


def test_a_forked_child_ends_by_sigterm_and_passes_over_the_others() -> None:
    code = (
        "import os, signal, sys, time; from engine.train.watch.preempt import StopRequest\n"
        "StopRequest().listen(launched=False); child = os.fork()\n"
        "if child == 0: print('up', flush=True); time.sleep(60); sys.exit(3)\n"
        "sys.stdin.readline(); os.kill(child, signal.SIGUSR1); time.sleep(0.1)\n"
        "os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment() | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert process.communicate("\n", timeout=30)[0] == f"{int(signal.SIGTERM)}\n"


@pytest.mark.parametrize("killed", ["the parent", "the parent's parent"])
@pytest.mark.parametrize("launched", [True, False])
def test_the_end_of_a_launcher_is_noticed_where_there_is_one(tmp_path: Path, killed: str, launched: bool) -> None:
    """A command that starts a launcher, named as DeepSpeed's, that starts a rank."""
    rank, launch, command = tmp_path / "rank.py", tmp_path / "deepspeed.launcher.launch.py", tmp_path / "command.py"
    rank.write_text(
        "import time; from engine.train.watch.preempt import StopRequest\n"
        f"request = StopRequest(); request.listen(launched={launched}); print(request.counts()[-1], flush=True)\n"
        "end = time.monotonic() + 1.5\n"
        "while time.monotonic() < end and not request.counts()[-1]: time.sleep(0.02)\n"
        "print(request.counts()[-1])"
    )
    for script, child in ((launch, rank), (command, launch)):
        script.write_text(
            f"import subprocess, sys; started = subprocess.Popen([sys.executable, {str(child)!r}])\n"
            f"print(started.pid, flush=True) if {script == command} else None; started.wait()"
        )
    process = subprocess.Popen(
        [sys.executable, str(command)], env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    parent = int(process.stdout.readline())
    assert process.stdout.readline() == "0.0\n"
    os.kill(parent if killed == "the parent" else process.pid, signal.SIGKILL)
    assert process.stdout.readline() == f"{float(launched)}\n"
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def undisturbed(one_rank: Pool, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert one_rank.apply(attempt, (output, options_of(store), "none"))["ended"] == "done"
    return output


def options_of(store: Path) -> list[str]:
    return [f"--data.path={store}", "--train.eval_interval=2", "--train.micro_batch=8", "--resume=auto"]


@pytest.mark.parametrize(
    ("hook", "checkpoints", "step"),
    [
        ("start-up", [], 0),
        ("step 2", ["step-000002"], 2),
        pytest.param("evaluation", ["step-000002"], 2, marks=pytest.mark.slow),
        pytest.param("last step", ["step-000004"], 4, marks=pytest.mark.slow),
        ("save", ["step-000004"], 4),
    ],
)
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on_unchanged(
    one_rank: Pool, store: Path, tmp_path: Path, undisturbed: Path, hook: str, checkpoints: list[str], step: int
) -> None:
    found = one_rank.apply(attempt, (tmp_path, options_of(store), hook))
    assert found["ended"] == "SIGTERM 0"
    assert found["marker"] == f"{step}\n"
    assert found["checkpoints"] == checkpoints
    assert found["state"] == "preempted"
    assert not found["exported"]
    assert found["evaluated"] == (hook in ("step 2", "evaluation"))
    again = one_rank.apply(attempt, (tmp_path, options_of(store), "none"))
    assert (again["ended"], again["marker"], again["evaluated"], again["exported"]) == ("done", None, False, True)
    for tag in ("train/loss", "train/grad_norm"):
        assert losses(tmp_path, tag) == losses(undisturbed, tag), tag
    assert dict(losses(tmp_path, "eval/loss")) == dict(losses(undisturbed, "eval/loss"))  # the last may be made twice


def test_a_run_that_must_not_save_fails_where_it_is_stopped(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    found = one_rank.apply(attempt, (tmp_path, [*options_of(store), "--train.save_interval=null"], "step 2"))
    assert found["ended"].startswith("stopped by SIGTERM at step 2; nothing is saved")
    assert (found["marker"], found["checkpoints"], found["state"]) == (None, [], "failed")


def test_an_interrupt_saves_and_exits_with_130(store: Path, tmp_path: Path) -> None:
    process = start(
        tmp_path, f"--data.path={store}", "--train.steps=4", "--fault.check_interval=3",
        accidents=[accident(0, 1, "kill", int(signal.SIGINT))], ranks=1,
    )  # fmt: skip
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert f"stopped by SIGINT at step 3; checkpoint {tmp_path / 'checkpoints' / 'step-000003'}" in printed
    assert not tracebacks(printed)
    assert heartbeat(tmp_path)["state"] == "interrupted"
    assert not (tmp_path / MARKER).exists()
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_a_closed_terminal_saves(store: Path, tmp_path: Path) -> None:
    hang_up = accident(0, 2, "kill", int(signal.SIGHUP))
    options = [f"--data.path={store}", "--train.steps=4", "--data.workers=1"]
    process = start(tmp_path, *options, accidents=[hang_up], launcher="python", ranks=1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "stopped by SIGHUP at step 2; checkpoint " in printed
    assert (tmp_path / MARKER).read_text() == "2\n"
    assert heartbeat(tmp_path)["state"] == "preempted"


def two_ranks(store: Path) -> list[str]:
    return [f"--data.path={store}", f"--train.steps={STEPS}", "--train.micro_batch=4", "--data.workers=2"]


def end_of(process: subprocess.Popen[str] | Started) -> str:
    """What was printed until the last process that holds the output has ended."""
    printed, _ = process.communicate(timeout=120)
    return printed


@pytest.mark.parametrize(
    ("launcher", "what"), [(None, "kill"), pytest.param("deepspeed", "kill_group", marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_or_to_everything_saves_on_all_ranks_and_resumes_bit_equal(
    store: Path, tmp_path: Path, launcher: str | None, what: str
) -> None:
    truth, stopped = tmp_path / "truth", tmp_path / "stopped"
    run(truth, *two_ranks(store), ranks=2)
    accidents = [accident(1, 3, what, int(signal.SIGUSR1))]
    printed = end_of(start(stopped, *two_ranks(store), accidents=accidents, launcher=launcher))
    lines = [line for line in printed.splitlines() if line.startswith("stopped by ")]
    assert lines == [
        f"stopped by SIGUSR1 at step 3; checkpoint {stopped / 'checkpoints' / 'step-000003'}; --resume auto goes on"
    ]
    assert not tracebacks(printed)
    assert (stopped / MARKER).read_text() == "3\n"
    assert (heartbeat(stopped)["state"], heartbeat(stopped)["step"]) == ("preempted", 3)
    run(stopped, *two_ranks(store), "--resume=auto", ranks=2)
    assert losses(stopped) == losses(truth)
    assert not (stopped / MARKER).exists()
    assert (heartbeat(stopped)["state"], heartbeat(stopped)["restarts"]) == ("done", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "what"),
    [("deepspeed", "kill_command"), ("deepspeed", "kill_launcher"), ("torchrun", "kill_launcher")],
)
def test_ranks_save_and_end_when_their_launcher_dies(store: Path, tmp_path: Path, launcher: str, what: str) -> None:
    process = start(tmp_path, *two_ranks(store), accidents=[accident(0, 3, what)], launcher=launcher)
    found = re.search(rf"stopped by {LAUNCHER_ENDED} at step (\d)", end_of(process))
    assert found is not None
    assert 3 <= int(found[1]) < STEPS  # it takes a moment to die
    assert heartbeat(tmp_path)["state"] == "preempted"
    assert (tmp_path / MARKER).read_text() == f"{found[1]}\n"
    assert (tmp_path / "checkpoints" / f"step-00000{found[1]}").is_dir()
