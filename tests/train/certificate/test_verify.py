"""The certificate of an update: right updates pass closely, wrong ones are caught by name, and a run reports it."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.train.certificate.certificate import BOUND, TABLE, columns
from engine.train.certificate.recorded import checksum, covers
from engine.train.checkpoint.folder import complete_checkpoints
from launch.configure.options import parse
from tests.train.certificate.verify_worker import GROUPS, RAISED, SKIPPED, SPOILT
from tests.train.runs import execute, run, start_warm

SLOW = pytest.mark.slow
SOUND_RUNS = [
    pytest.param(2, "few", case.name, id=f"2-ranks-{case.name}") for case in GROUPS["few"] if not case.fault
] + [
    pytest.param(ranks, "all", case.name, id=f"{ranks}-ranks-{case.name}-all", marks=SLOW)
    for ranks in (1, 2, 3)
    for case in GROUPS["all"]
]
#: what the message says of each fault, "{}" being the parameter to blame
WRONG = {
    "own norms": ("the weights have an error of", "by a trust ratio of"),
    "clamped ratio": ("they moved 0.0",),
    "piece left out": ("{}: exp_avg has an error of 1.0e+00",),
    "piece unknown": ("{}: not each of its elements is stepped once",),
    "parameter left out": ("{}: not each of its elements is stepped once",),
    "stale copy": ("{}: ",),
    "clipped twice": ("clipping",),
    "late correction": ("the update of step 2 is wrong", "the weights have an error of", "(10 parameters are wrong)"),
    "decayed biases": ("bias: the weights have an error of", "(6 parameters are wrong)"),
    "moment kept": ("{}: exp_avg_sq has an error of 1.0e+00",),
    "other weights on one rank": ("{}: the ranks have different weights",),
    "not a number": ("{}: the weights have an error of nan",),
}


@cache
def launch(ranks: int, group: str) -> list[dict[str, dict[str, Any]]] | str:
    """What each of `ranks` ranks recorded: {case: record}, all cases in one launch; what it printed if it failed."""
    with TemporaryDirectory() as folder:
        done = execute("tests/train/certificate/verify_worker.py", folder, group, ranks=ranks)
        if done.returncode != 0:
            return done.stdout
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def recorded(ranks: int, group: str, name: str) -> list[dict[str, Any]]:
    """The record of one case on each rank."""
    records = launch(ranks, group)
    assert not isinstance(records, str), records
    return [of_rank[name] for of_rank in records]


@pytest.mark.parametrize(("ranks", "group", "name"), SOUND_RUNS)
def test_a_right_update_is_verified_far_within_the_bound(ranks: int, group: str, name: str) -> None:
    first, *others = recorded(ranks, group, name)
    print(ranks, name, first["errors"])
    assert first["failure"] is None
    assert first["remaining"] == 0
    assert [line.split(",")[0] for line in first["said"]] == [f"update verified: step {step}" for step in (1, 2, 3)]
    assert max(first["errors"].values()) < BOUND / 10
    assert first["same"] in (None, True), "the certificate changed the training"
    for record in others:
        assert (record["errors"], record["said"]) == (first["errors"], [])


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SPOILT])
def test_a_wrong_update_is_caught_on_every_rank_by_name(case: Any) -> None:
    first, second = recorded(2, "few", case.name)
    message = first["failure"]
    assert message is not None
    assert message == second["failure"]
    assert "\n" not in message
    assert f"ZeRO stage {case.stage}, 2 rank(s)" in message
    blamed = {record["blamed"] for record in (first, second)}
    for part in WRONG[case.fault]:
        assert any(part.format(name) in message for name in blamed), message


def test_a_copy_that_is_stale_is_told_from_ranks_that_differ() -> None:
    """At stage 2 rank 1 has the weights whose copy was lost on rank 0."""
    said = {case.stage: recorded(2, "few", case.name)[0]["failure"] for case in SPOILT if case.fault == "stale copy"}
    assert "the ranks have different weights" in said[2]
    assert "elements of the model's own weights are not the optimizer's, rounded" in said[0]
    assert "elements of the model's own weights are not the optimizer's, rounded" in said[3]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SKIPPED])
def test_a_step_without_a_finite_gradient_does_not_count(case: Any) -> None:
    record = recorded(2, "few", case.name)[0]
    assert record["failure"] is None
    assert record["remaining"] == 1
    assert record["said"][0] == "update not verified: the gradient of step 1 is not finite"
    assert [line.split(",")[0] for line in record["said"][1:]] == ["update verified: step 2", "update verified: step 3"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in RAISED])
def test_a_step_that_deepspeed_unscales_by_another_loss_scale_does_not_count(case: Any) -> None:
    record = recorded(2, "few", case.name)[0]
    assert record["failure"] is None
    assert record["remaining"] == 1
    assert record["said"][2].startswith("update not verified: DeepSpeed raised the loss scale in step 3")


def rows(output: Path) -> list[dict[str, str]]:
    with (output / TABLE).open() as file:
        return list(csv.DictReader(file))


def test_a_run_verifies_its_first_updates_and_those_after_a_resume_elsewhere(store: Path, tmp_path: Path) -> None:
    options = [f"--data.path={store}", "--train.verify_update=2", "--optim.name=lamb", "--train.eval_samples=16"]
    printed = run(tmp_path, *options, "--train.steps=3", ranks=2)
    verified = [line for line in printed.splitlines() if line.startswith("update ")]
    assert [line.split(",")[0] for line in verified] == ["update verified: step 1", "update verified: step 2"]
    table = rows(tmp_path)
    assert tuple(table[0]) == columns(("exp_avg", "exp_avg_sq")) == (
        "step", "parameter", "elements", "error", "weights_error", "exp_avg_error", "exp_avg_sq_error",
        "stale_elements", "trust_ratio", "weight_norm", "update_norm",
    )  # fmt: skip
    names = {row["parameter"] for row in table}
    assert len(table) == 2 * len(names)
    assert f"{len(names)} parameters" in verified[0]
    assert all(float(row["error"]) < BOUND for row in table)
    decayed = {row["parameter"]: float(row["trust_ratio"]) for row in table}
    assert decayed["bert.embeddings.word_embeddings.weight"] != 1.0
    assert decayed["bert.embeddings.LayerNorm.weight"] == 1.0
    printed = run(tmp_path, *options, "--train.steps=4", "--resume=auto", "--train.zero_stage=3")
    assert "update verified: step 4, " in printed
    assert {row["step"] for row in rows(tmp_path)} == {"4"}


def test_a_run_whose_update_is_wrong_ends_with_one_line(store: Path, tmp_path: Path) -> None:
    """The certificate is told of another weight decay than the optimizer."""
    script = (
        "from engine.optim.adamw import AdamWEntry; exact = AdamWEntry.exact\n"
        "def other(entry, config, decay, step): return exact(entry, config, 0.5, step)\n"
        "AdamWEntry.exact = other\n"
        "from launch.cli import run_command; from launch.train import main; run_command(main)"
    )
    (tmp_path / "spoilt.py").write_text(script)
    process = start_warm(
        tmp_path / "run", f"--data.path={store}", "--model.layers=1", "--train.steps=3", "--train.save_interval=1",
        ranks=2, script=str(tmp_path / "spoilt.py"),
    )  # fmt: skip
    printed, _ = process.communicate()
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0
    assert len(errors) == 1, printed
    assert "the update of step 1 is wrong" in errors[0]
    assert rows(tmp_path / "run")
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_a_wrong_number_of_updates_is_a_mistake(value: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([f"--train.verify_update={value}"])
    assert str(caught.value).startswith("train.verify_update: ")
    assert "\n" not in str(caught.value)


def test_pieces_cover_a_parameter_once() -> None:
    assert covers([(0, 3, 4), (0, 0, 3)], 7)
    assert not covers([(0, 0, 3), (0, 4, 3)], 7)
    assert not covers([(0, 0, 4), (0, 3, 4)], 7)
    assert not covers([(0, 0, 3)], 7)
    assert covers([], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_a_bit_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.randn(2**20 + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed, swapped = tensor.clone(), tensor.clone()
    changed[-1] = -changed[-1]
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksum(tensor) == checksum(tensor.clone())
    assert len({checksum(tensor), checksum(changed), checksum(swapped), checksum(tensor.flip(0))}) == 4
