"""What a run writes: curves, texts and files, read back."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import RunConfig, TrainConfig
from engine.data.store.store import open_store
from engine.train.curves import monitor
from engine.train.curves.monitor import Monitor, Progress, duration, memory_bytes, monitor_section
from tests.conftest import ROOT
from tests.train.runs import losses, run

TAGS = [
    "train/loss",
    "train/mlm_loss",
    "train/nsp_loss",
    "train/mlm_accuracy",
    "train/nsp_accuracy",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/step_time",
    "train/memory_bytes",
    "eval/loss",
    "eval/mlm_loss",
    "eval/perplexity",
    "eval/mlm_accuracy",
    "eval/nsp_accuracy",
]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 6 steps that logs every second one, and what it printed."""
    output = tmp_path_factory.mktemp("monitored")
    options = ["--train.steps=6", "--train.log_interval=2", "--train.eval_interval=3", "--monitor.csv=true"]
    return output, run(output, f"--data.path={store}", *options, ranks=2)


def events(output: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(output / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_every_curve_is_there_with_the_global_step_as_x(finished: tuple[Path, str]) -> None:
    output, _ = finished
    assert set(TAGS) <= set(events(output).Tags()["scalars"])
    assert [step for step, _ in losses(output)] == [2, 4, 6]
    assert [step for step, _ in losses(output, "eval/mlm_loss")] == [3, 6]


def test_a_point_is_the_mean_of_its_steps(store: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    run(tmp_path, f"--data.path={store}", "--train.steps=6", ranks=2)
    single = [value for _, value in losses(tmp_path)]
    means = [value for _, value in losses(finished[0])]
    assert means == pytest.approx([(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)], rel=1e-6)


def test_the_total_loss_is_the_sum_of_its_parts(finished: tuple[Path, str]) -> None:
    total, mlm, nsp = (losses(finished[0], f"train/{name}") for name in ("loss", "mlm_loss", "nsp_loss"))
    for (_, whole), (_, a), (_, b) in zip(total, mlm, nsp, strict=True):
        assert whole == pytest.approx(a + b, rel=1e-5)


def test_the_configuration_and_guesses_are_there_as_text(finished: tuple[Path, str]) -> None:
    accumulator = events(finished[0])
    texts = {
        tag: accumulator.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in accumulator.Tags()["tensors"]
    }
    assert '"global_batch": 16' in texts["config/run/text_summary"]
    assert '"train_batch_size": 16' in texts["config/deepspeed/text_summary"]
    notation, *guesses = texts["eval/masked_sentences/text_summary"].splitlines()
    assert "**word**" in notation
    assert [line[:9] for line in guesses] == ["", *["- \\[CLS\\]"] * 4]
    assert "held-out MLM loss" in texts["report/validation/text_summary"]


def test_every_curve_says_what_it_is_and_in_which_unit(finished: tuple[Path, str]) -> None:
    accumulator = events(finished[0])
    for tag in accumulator.Tags()["scalars"]:
        shown = accumulator.SummaryMetadata(tag)
        assert shown.display_name != tag
        assert shown.summary_description, tag
    units = {"tokens_per_second": "[tokens/s]", "memory_bytes": "[bytes]", "loss": "[nats]", "step_time": "[s]"}
    for name, unit in units.items():
        assert unit in accumulator.SummaryMetadata(f"train/{name}").display_name


def test_without_texts_no_sentence_leaves_the_store(store: Path, tmp_path: Path) -> None:
    """By all files of a run but the tokenizer, whose vocabulary is the text's; with texts the search finds some."""
    opened = open_store(store)
    split, tokens = opened.split("validation"), opened.tokenizer.tokens
    text = " ".join(tokens[index] for index in split.tokens(0, int(split.sentence_lengths.sum()))).replace(" ##", "")
    phrases = re.compile(rb" [a-z]{2,} [a-z]{2,} [a-z]{2,} [a-z]{2,}")

    def told(folder: Path) -> list[bytes]:
        files = [path for path in folder.rglob("*") if path.is_file() and "tokenizer" not in path.name]
        found = [words for path in files for words in phrases.findall(path.read_bytes())]
        return [words for words in found if words.decode() in text]

    options = [f"--data.path={store}", "--train.steps=2", "--train.audit=true", "--monitor.csv=true"]
    run(tmp_path / "with", *options)
    run(tmp_path / "without", *options, "--monitor.texts=false")
    assert told(tmp_path / "with")
    assert told(tmp_path / "without") == []
    assert "eval/masked_sentences/text_summary" not in events(tmp_path / "without").Tags()["tensors"]
    assert losses(tmp_path / "without") == losses(tmp_path / "with")


def test_csv_files_hold_the_same_points(finished: tuple[Path, str]) -> None:
    output, _ = finished
    with (output / "csv" / "train_loss.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [(int(step), pytest.approx(float(value))) for step, value in rows] == losses(output)


def noise(printed: str) -> list[str]:
    """The lines of what a run printed that say nothing of it."""
    allowed = ("deepspeed: ", "step ", "evaluation at step ", "held-out ", "model ", "curves ")
    allowed += ("environment: 2 rank(s) ", "update verified: step 1, ", "an epoch shows ")
    return [line for line in printed.splitlines() if line.strip() and not line.startswith(allowed)]


def test_output_that_is_no_terminal_gets_quiet_lines_and_no_noise(finished: tuple[Path, str]) -> None:
    assert noise(finished[1]) == []


@pytest.mark.slow
def test_deepspeeds_launcher_adds_no_noise(store: Path, tmp_path: Path) -> None:
    assert noise(run(tmp_path, f"--data.path={store}", "--train.steps=2", launcher="deepspeed", ranks=2)) == []


def test_wandb_needs_its_package(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    try:
        import wandb  # noqa: F401
    except ImportError:
        printed = run(tmp_path / "x", f"--data.path={store}", "--monitor.wandb=true", code=2)
        assert "error: monitor.wandb: true needs the package wandb" in printed
    else:
        assert monitor_section(RunConfig().monitor, tmp_path)["tensorboard"]["enabled"]


def write_a_restarted_run(folder: Path) -> None:
    config = RunConfig(output=str(folder))
    died = Monitor(config, 0)
    for step in (1, 2, 3, 4):
        died.scalars({"train/loss": 10.0 + step}, step)
    died.close()
    resumed = Monitor(config, 2)
    resumed.scalars({"train/loss": 20.0}, 3)
    resumed.close()


def test_points_after_the_resumed_step_no_longer_count(one_rank: Pool, tmp_path: Path) -> None:
    one_rank.apply(write_a_restarted_run, (tmp_path,))
    assert losses(tmp_path) == [(1, 11.0), (2, 12.0), (3, 20.0)]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations_read_like_a_clock(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def scrollback(code: str) -> list[str]:
    """What stays on a terminal when Python code ran on it: of each line what was written last."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal):
        os.close(terminal)
        written = b""
        while chunk := _read(master):
            written += chunk
    os.close(master)
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in written.decode().split("\n")]


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # Linux's way to tell that nobody has the terminal open any more
        return b""


HISTORY = """
from engine.train.curves.monitor import Progress
from engine.train.log import say
progress = Progress(0, {total}, True)
for step in range(1, {total} + 1):
    progress.advance()
    if step % {interval} == 0:
        values = dict(zip(("loss", "learning_rate", "tokens_per_second"), (1 / step, 1e-3, 5e4)))
        progress.point(step, {{f"train/{{name}}": value for name, value in values.items()}})
say("the end")
progress.close()
"""


@pytest.mark.slow
def test_a_terminal_keeps_a_history_of_points() -> None:
    lines = scrollback(HISTORY.format(total=40, interval=10))
    kept = [line for line in lines if line.startswith("step ")]
    assert [line.split("  left")[0] for line in kept] == [
        f"step {step}/40  loss {1 / step:.4f}  lr 1.00e-03  tokens/s 50,000" for step in (10, 20, 30, 40)
    ]
    assert "the end" in lines
    assert any("40/40" in line and "step/s" in line for line in lines)  # the bar


@pytest.mark.slow
def test_a_long_run_does_not_flood_it() -> None:
    kept = [line for line in scrollback(HISTORY.format(total=20_000, interval=10)) if line.startswith("step ")]
    assert len(kept) == pytest.approx(200, abs=2)
    assert kept[0].startswith("step 10/20000 ")
    assert kept[-1].startswith("step 20000/20000 ")


def test_the_time_left_is_at_the_pace_of_this_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start at step 100 of 150 that has done 10 steps in 20 seconds needs 80 more for the other 40."""
    now = [1000.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    progress = Progress(100, 150, enabled=True)
    now[0] += 20.0
    progress.point(110, {"train/loss": 1.0, "train/learning_rate": 1e-3, "train/tokens_per_second": 1234.0})
    progress.close()
    shown = capsys.readouterr().out
    assert shown.startswith("step 110/150  loss 1.0000  lr 1.00e-03  tokens/s 1,234")
    assert "left 1:20" in shown


def test_memory_is_the_peak_of_this_process_in_bytes() -> None:
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert memory_bytes(torch.device("cpu")) == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
def test_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(1 << 30, dtype=np.uint8)
    told = (
        "import torch; from engine.train.curves.monitor import memory_bytes; print(memory_bytes(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < held.nbytes


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        (TrainConfig(steps=7, global_batch=16), 7),
        (TrainConfig(epochs=1.0, global_batch=16), 3),
        (TrainConfig(epochs=1.5, global_batch=16), 4),
        (TrainConfig(epochs=2.0, global_batch=20), 4),
        (TrainConfig(epochs=0.001, global_batch=16), 1),
        (TrainConfig(), 1000),
    ],
)
def test_the_steps_of_a_run_see_all_samples_of_its_epochs(train: TrainConfig, steps: int) -> None:
    """Of epochs with 40 samples; the last global batch reaches into the next epoch."""
    assert train.total_steps(40) == steps
