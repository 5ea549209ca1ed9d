"""What `benchmarks.pretrain_step` gives zerobert and transformers' Trainer is the same work."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import pretrain_peer, pretrain_step
from benchmarks.common import MISSED
from benchmarks.pretrain_samples import MODERNBERT_RATE, make_pieces
from launch.configure.options import parse as parse_training


def given(store: Path, architecture: str, **changes: Any) -> argparse.Namespace:
    terms = {"batch": None, "steps": 8, "threads": [1], "precision": "fp32", "same_batch": False}
    return argparse.Namespace(architecture=architecture, data=store, **{**terms, **changes})


def test_pieces_are_rows_of_documents_masked_at_modernbert_s_rate(store: Path, tmp_path: Path) -> None:
    lengths = make_pieces(store, tmp_path / "pieces.npz", 64)
    rows = np.load(tmp_path / "pieces.npz")
    assert set(rows.files) == {"input_ids", "attention_mask", "labels"}
    assert rows["attention_mask"].sum(1).tolist() == lengths
    assert max(lengths) <= 64
    masked = (rows["labels"] >= 0).sum() / sum(lengths)
    assert masked == pytest.approx(MODERNBERT_RATE, abs=0.05)
    assert not rows["input_ids"][rows["attention_mask"] == 0].any()


def test_both_get_as_many_tokens_of_modernbert(store: Path, tmp_path: Path) -> None:
    work = pretrain_step.work("tiny", 256, given(store, "modernbert"), tmp_path / "pieces.npz")
    ours, theirs = work.ours.batch * work.tokens[0], work.rival.batch * work.tokens[1]
    assert ours == pretrain_step.MODERNBERT_TOKENS
    assert theirs == pytest.approx(ours, rel=0.02)
    assert pretrain_step.rival_batches(work.rival, given(store, "modernbert")) == [
        work.rival.batch // 4,
        work.rival.batch,
    ]
    assert pretrain_step.rival_batches(work.rival, given(store, "modernbert", same_batch=True)) == [work.rival.batch]


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_command_of_our_run_is_valid(architecture: str, store: Path, tmp_path: Path) -> None:
    work = pretrain_step.work("tiny", 128, given(store, architecture), tmp_path / "samples.npz")
    command = pretrain_step.zerobert("tiny", work.ours, store, tmp_path / "run", [])
    config = parse_training(command[2:])
    assert (config.model.architecture or "bert") == architecture
    assert config.data.objective == ("mlm" if architecture == "modernbert" else "mlm_nsp")
    assert config.train.precision == "fp32"
    assert work.flops > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_the_rival_s_loss_is_that_of_the_masked_tokens(sparse: bool, store: Path, tmp_path: Path) -> None:
    """On a batch without the columns that are padding in all of its rows."""
    work = pretrain_step.work("tiny", 128, given(store, "modernbert"), tmp_path / "pieces.npz")
    data = pretrain_peer.samples(work.rival.samples)
    rows = sorted((data[index] for index in range(len(data))), key=lambda row: int(row["attention_mask"].sum()))[:3]
    batch = pretrain_peer.trimmed(rows)
    assert batch["input_ids"].shape == (3, int(rows[-1]["attention_mask"].sum()))
    torch.manual_seed(0)
    model = pretrain_peer.model(replace(work.rival, masked_head=sparse)).eval()
    loss = model(**batch).loss
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_modernbert_has_goals_of_its_own() -> None:
    table = {"zerobert": {"share of GEMM peak": 0.5}, "ratio": {"tokens/s": 2.0}}
    held_to = pretrain_step.GOALS_OF["modernbert"]
    found = {size: pretrain_step.goals(size, table, judged=True, held_to=held_to) for size in ("mini", "base", "small")}
    assert [one["result"] for one in found["mini"]] == [MISSED]
    assert [one["result"] for one in found["base"]] == ["met"]
    assert found["small"] == []
