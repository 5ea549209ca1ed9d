"""What goes wrong in the middle of a run ends it with one line."""

from __future__ import annotations

from pathlib import Path

from engine.train.checkpoint.folder import complete_checkpoints
from tests.train.runs import run


def test_a_loss_that_is_no_number_stops_every_rank_at_once(store: Path, tmp_path: Path) -> None:
    options = ["--train.steps=20", "--train.save_interval=1", "--optim.learning_rate=1e30", "--optim.max_grad_norm=0"]
    printed = run(tmp_path, f"--data.path={store}", *options, ranks=2, code=1)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the loss became" in errors[0]
    assert "optim.learning_rate" in errors[0]
    assert "Traceback" not in printed
    assert not (tmp_path / "export").exists()
    assert len(complete_checkpoints(tmp_path / "checkpoints")) <= 2
