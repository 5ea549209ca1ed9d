"""A run whose export isn't its model ends with one line, and its weights stay in a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from engine.model.roundtrip import BOUND
from launch.export import main as export
from tests.conftest import ROOT
from tests.train.runs import start_warm


def test_an_export_that_is_not_the_model_ends_the_run_on_every_rank(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [f"--data.path={store}", "--train.steps=2", "--train.zero_stage=1", "--train.save_interval=null"]
    process = start_warm(run, *options, ranks=2, script=str(ROOT / "tests" / "train" / "other_gelu.py"))
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 2, printed
    (line,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert re.match(
        "error: export: the export is not the model: prediction_logits of transformers' BertForPreTraining differ from "
        rf"ours by \d\.\de-\d+ of the largest, allowed is {BOUND:.1e}; the first is row \d+ of \d+; it was not written",
        line,
    )
    assert "Traceback" not in printed
    assert not [path for path in run.iterdir() if "export" in path.name]

    assert export([str(run), f"--output={tmp_path / 'unchecked'}", "--check=false"]) == 0
    assert (tmp_path / "unchecked" / "model.safetensors").is_file()
