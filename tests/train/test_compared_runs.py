"""Runs that are really trained, compared: seeds of a setting, a crippled one; and runs on the folds of their data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from engine.data.tokenizer.wordpiece import load_tokenizer
from launch.compare.command import compare
from tests.conftest import ROOT
from tests.train.runs import environment
from tests.train.test_best import sentences, write
from tests.train.watch.policy_worker import trained

STEPS = 30


@pytest.fixture(scope="module")
def setting(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A classifier of sentences in which one word tells the class, which it learns."""
    folder = tmp_path_factory.mktemp("labelled")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocabulary = load_tokenizer(store / "tokenizer").vocab_size
    BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)).save_pretrained(folder / "bert")
    shutil.copytree(store / "tokenizer", folder / "bert", dirs_exist_ok=True)
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}",
        f"--labelled.train={write(folder / 'train.jsonl', sentences(31, 29))}",
        "--labelled.max_length=16", "--optim.learning_rate=1e-2", f"--train.steps={STEPS}", "--resume=auto",
        "--train.global_batch=16", "--train.verify_update=0", "--monitor.tensorboard=false",
    ]  # fmt: skip


def tune(rank: Pool, output: Path, *options: str) -> Path:
    assert rank.apply(trained, (output, list(options), {})) == "done"
    return output


@pytest.mark.slow
def test_seeds_of_a_setting_do_not_differ_and_a_crippled_one_does(
    one_rank: Pool, setting: list[str], tmp_path: Path
) -> None:
    """The crippled one hardly learns."""
    test = f"--labelled.test={write(tmp_path / 'test.jsonl', sentences(60, 60))}"
    first, second = (tune(one_rank, tmp_path / str(seed), *setting, test, f"--seed={seed}") for seed in (1, 2))
    same = compare(first, second)["scores"]["accuracy"]
    assert same["first"] > 0.9
    assert not same["real"]
    crippled = tune(one_rank, tmp_path / "crippled", *setting, test, "--optim.learning_rate=1e-7")
    worse = compare(first, crippled)["scores"]["accuracy"]
    assert worse["real"]
    assert worse["second"] == pytest.approx(json.loads((crippled / "report" / "report.json").read_text())["accuracy"])
    assert worse["tests"]["mcnemar"]["interval_95"][1] < 0.0


@pytest.mark.slow
def test_a_run_on_a_fold_reports_on_it_alone(one_rank: Pool, setting: list[str], tmp_path: Path) -> None:
    sizes = []
    for fold in (1, 2, 3):
        options = [*setting, "--labelled.folds=3", f"--labelled.fold={fold}", "--train.steps=1"]
        output = tune(one_rank, tmp_path / str(fold), *options)
        sizes.append(json.loads((output / "report" / "report.json").read_text())["confusion_matrix"])
    rows = [[sum(row) for row in matrix] for matrix in sizes]
    assert sorted(rows) == [[9, 11], [10, 10], [10, 10]]


@pytest.mark.slow
def test_seeds_that_are_killed_go_on_and_end_as_undisturbed_ones(setting: list[str], tmp_path: Path) -> None:
    """SIGKILL of the command and its run, in the middle of the second seed; real processes."""
    command = [sys.executable, "-m", "launch", "seeds", "--seeds=2"]
    options = [*setting, "--train.save_interval=5", "--train.steps=60", "--data.workers=0"]

    def start(output: Path) -> subprocess.Popen[bytes]:
        arguments = [*command, "--", *options, f"--output={output}"]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment(), start_new_session=True)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    while not list((killed / "seed-2").glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "report").exists()
    kept = (killed / "seed-1" / "report" / "report.json").stat().st_mtime_ns
    assert start(killed).wait(timeout=240) == 0
    assert (killed / "seed-1" / "report" / "report.json").stat().st_mtime_ns == kept
    assert start(whole).wait(timeout=240) == 0
    reports = [json.loads((output / "report" / "report.json").read_text()) for output in (killed, whole)]
    assert reports[0] == reports[1]
    found = compare(killed, whole)
    assert found["pairs"] == 2
    assert not found["scores"]["accuracy"]["real"]


@pytest.mark.slow
def test_a_launcher_starts_each_run_on_several_ranks(setting: list[str], tmp_path: Path) -> None:
    own = ["--seeds=1", "--launcher=deepspeed --quiet --num_accelerators 2 --master_port {port}"]
    command = [sys.executable, "-m", "launch", "seeds", *own, "--", *setting, f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "deepspeed: 2 rank(s) on cpu" in done.stdout
    assert "# sequence_classification: 1 run(s)" in done.stdout
    broken = subprocess.run(
        [*command, f"--labelled.test={tmp_path / 'none.jsonl'}", f"--output={tmp_path / 'other'}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert broken.returncode == 2
    errors = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {tmp_path / 'none.jsonl'}: no such file or folder; check the path"]
    assert not (tmp_path / "other").exists()
