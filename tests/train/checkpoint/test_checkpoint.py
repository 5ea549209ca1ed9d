"""Checkpoints are complete or absent, and contradictions are refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.data.loading.source import Cursor
from engine.durable import seal
from engine.errors import UserError
from engine.train.checkpoint.folder import (
    STATE_FILE,
    RunState,
    check_resumable,
    complete_checkpoints,
    find,
    read_state,
    resumption,
)
from launch.export import main as export
from tests.train.runs import run

STATE = RunState(step=4, cursor=Cursor(1, 8, 64), world_size=2, config=RunConfig().to_dict(), best=0.5, facts={})


def write(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text(STATE.text())
    return path


def test_a_state_comes_back_equal(tmp_path: Path) -> None:
    saved = read_state(write(tmp_path, 4))
    assert saved.cursor == STATE.cursor
    assert (saved.step, saved.world_size, saved.best) == (4, 2, 0.5)


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 9)
    (tmp_path / ".partial-step-000012").mkdir()
    (tmp_path / "aside-step-000013").mkdir()
    (tmp_path / "step-000014.copy").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000009", "step-000010"]
    assert find("auto", tmp_path) == tmp_path / "step-000010"


def test_steps_sort_as_numbers_beyond_six_digits(tmp_path: Path) -> None:
    write(tmp_path, 1_000_000)
    write(tmp_path, 999_999)
    assert find("auto", tmp_path) == tmp_path / "step-1000000"


def test_a_new_run_never_mixes_with_an_older_ones_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 5)
    with pytest.raises(UserError, match=r"output: .* holds step-000005 .* --resume auto"):
        find("never", tmp_path / "checkpoints")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume: .* is no checkpoint"):
        find(str(tmp_path), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": 3, "step": 1}', seal({"format": 3, "step": 1})])
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, 4)
    (path / STATE_FILE).write_text(content)
    with pytest.raises(UserError, match=r"resume: .*step-000004 is damaged \(state\.json: "):
        read_state(path)


@pytest.mark.parametrize("older", [{}, {"format": 1}, {"format": 2}, {"format": 5, "new": 0}])
def test_another_format_is_refused_with_the_version_that_reads_it(tmp_path: Path, older: dict[str, Any]) -> None:
    """Also where `auto` could go on from an older one: it is not damaged, and its steps are not to be lost."""
    path = write(tmp_path, 4)
    values = {name: value for name, value in asdict(STATE).items() if name != "format"}
    values |= {"version": "0.9.1", **older}
    (path / STATE_FILE).write_text(seal(values) if older.get("format", 1) > 4 else json.dumps(values))
    write(tmp_path, 3)
    reason = f"of checkpoint format {older.get('format', 1)} and this version reads format 4; .*wrote it \\(0.9.1\\)"
    with pytest.raises(UserError, match=f"resume: .*{reason}"):
        find("auto", tmp_path)


def changed(part: str, **values: Any) -> dict[str, Any]:
    """The default configuration with other values in one of its parts."""
    config = RunConfig()
    return replace(config, **{part: replace(getattr(config, part), **values)}).to_dict()


def test_a_resume_tells_what_changed() -> None:
    path, same = Path("step-000004"), RunConfig().to_dict()
    assert resumption(STATE, path, 2, same) == "resumed step-000004 at step 4"
    stage = resumption(STATE, path, 2, changed("train", zero_stage=3))
    assert stage == "resumed step-000004 at step 4, saved by 2 rank(s) at ZeRO stage 2, now 2 rank(s) at stage 3"
    first, second = resumption(STATE, path, 4, same).splitlines()
    assert first.endswith("saved by 2 rank(s) at ZeRO stage 2, now 4 rank(s) at stage 2")
    assert "dropout differs" in second
    batch = resumption(STATE, path, 2, changed("train", global_batch=128))
    assert batch.splitlines()[1] == "changed since then: train.global_batch 64 -> 128"
    rate = resumption(STATE, path, 2, changed("optim", learning_rate=0.5, betas=(0.9, 0.98)))
    assert rate.splitlines()[1].endswith("optim.learning_rate 0.0001 -> 0.5, optim.betas [0.9, 0.999] -> [0.9, 0.98]")


def test_a_checkpoint_that_does_not_know_its_data_says_so() -> None:
    older = replace(STATE, facts=None)
    assert "make sure that they are the same" in resumption(older, Path("step-000004"), 2, RunConfig().to_dict())
    with pytest.raises(UserError, match=r"^model\.init_from: 'bert' differs from None"):
        check_resumable(older, Path("step-000004"), changed("model", init_from="bert"))
    check_resumable(STATE, Path("step-000004"), changed("model", init_from="bert"))  # there the content is compared


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("optim", "name", "lamb"),
        ("train", "precision", "bf16"),
        ("data", "sequence_length", 256),
        ("data", "objective", "mlm"),
        ("data", "mask_probability_end", 0.05),
        ("data", "eval_mask_probability", 0.3),
        ("data", "mean_span_length", 3.0),
        ("model", "layers", 9),
        ("model", "hidden_dropout", 0.2),
        ("labelled", "text", "review"),
        ("labelled", "text_pair", "answer"),
        ("labelled", "label", "stars"),
        ("labelled", "max_length", 64),
        ("labelled", "metric", "loss"),
        ("labelled", "group_by_length", True),
    ],
)
def test_a_configuration_that_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, part: str, field: str, value: object
) -> None:
    with pytest.raises(UserError, match=f"^{part}.{field}: .* differs from .* may change"):
        check_resumable(STATE, tmp_path, changed(part, **{field: value}))


def test_a_checkpoint_that_is_older_than_an_option_counts_as_having_its_default(tmp_path: Path) -> None:
    before = RunConfig().to_dict()
    del before["data"]["objective"]
    older = replace(STATE, config=before)
    check_resumable(older, tmp_path, RunConfig().to_dict())
    with pytest.raises(UserError, match=r"^data\.objective: 'mlm' differs from 'mlm_nsp'"):
        check_resumable(older, tmp_path, changed("data", objective="mlm"))


def test_a_longer_run_in_another_layout_is_no_contradiction(tmp_path: Path) -> None:
    check_resumable(
        STATE, tmp_path, changed("train", steps=123456, log_interval=1, zero_stage=3, micro_batch=1, global_batch=128)
    )
    check_resumable(STATE, tmp_path, changed("model", activation_checkpointing=True))


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks with ZeRO-3 and a checkpoint at every step."""
    output = tmp_path_factory.mktemp("finished")
    options = ["--train.steps=4", "--train.save_interval=1", "--train.keep=2", "--train.zero_stage=3"]
    run(output, f"--data.path={store}", *options, ranks=2)
    return output


def test_retention_keeps_the_newest(finished: Path) -> None:
    folder = finished / "checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == ["step-000003", "step-000004"]
    assert (folder / "latest").read_text() == "step-000004"
    assert not list(folder.glob(".partial*"))
    of_rank = {f"rng-rank-{rank}.pt" for rank in range(2)} | {f"rank-0000{rank}.safetensors" for rank in range(2)}
    assert {path.name for path in (folder / "step-000004").iterdir()} == {
        *("state.json", "index.json", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
        *of_rank,
    }


def test_an_export_of_the_last_checkpoint_equals_the_runs_own(finished: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    assert export([str(finished), f"--output={tmp_path / 'model'}"]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (finished / "export", tmp_path / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


OVERWRITE = b"\xff" * 8


def damaged_copy(finished: Path, tmp_path: Path, *, cut: bool) -> Path:
    """A copy of the run, a file of whose last checkpoint is cut off or overwritten; returns the file."""
    shutil.copytree(finished, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-000004" / "rank-00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:1000] if cut else content[:5000] + OVERWRITE + content[5000 + len(OVERWRITE) :])
    return damaged


def test_a_damaged_checkpoint_is_named_and_the_run_changes_nothing(finished: Path, store: Path, tmp_path: Path) -> None:
    damaged = damaged_copy(finished, tmp_path, cut=False)
    options = ["--train.steps=6", "--train.zero_stage=3", f"--resume={damaged.parent}"]
    printed = run(tmp_path / "run", f"--data.path={store}", *options, ranks=2, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"step-000004 is damaged ({damaged.name} is not what was written" in errors[0]
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_auto_goes_on_from_the_newest_intact_one_and_replaces_the_damaged(
    finished: Path, store: Path, tmp_path: Path
) -> None:
    damaged = damaged_copy(finished, tmp_path, cut=True)
    output, folder = tmp_path / "run", damaged.parent.parent
    options = ["--train.steps=4", "--train.save_interval=1", "--train.keep=2", "--train.zero_stage=3", "--resume=auto"]
    printed = run(output, f"--data.path={store}", *options, ranks=2)
    assert printed.count(f"passed over {damaged.parent}, which is damaged: {damaged.name} has 1000 bytes of") == 1
    assert f"resumed {folder / 'step-000003'} at step 3" in printed
    assert printed.count(f"set {damaged.parent} aside as aside-step-000004") == 1
    assert [path.name for path in sorted(folder.iterdir())] == ["latest", "step-000003", "step-000004"]
    for file in (finished / "checkpoints" / "step-000004").iterdir():
        if file.name != STATE_FILE:  # which holds the run's folder
            assert (damaged.parent / file.name).read_bytes() == file.read_bytes(), file.name
