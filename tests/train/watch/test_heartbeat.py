"""The heartbeat and the count of starts, and when a start is refused."""

from __future__ import annotations

import json
import math
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from engine.config import FaultConfig
from engine.errors import UserError
from engine.train.watch import heartbeat
from engine.train.watch.heartbeat import Heartbeat, Starts, check_restart, forgive_start, read_starts, write_starts

FIELDS = {
    "time", "step", "total", "loss", "tokens_per_second", "restarts", "job", "state", "host", "ranks",
}  # fmt: skip


def test_a_heartbeat_is_written_at_each_change_of_state_and_else_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    beat = Heartbeat(tmp_path, enabled=True, ranks=4, restarts=2)
    written = []
    for seconds, state, step in [(0, "training", 1), (0.5, None, 2), (2.5, None, 3), (0, "saving", 3)]:
        now[0] += seconds
        beat.update(state, step=step, total=9, loss=math.nan, tokens_per_second=5.5)
        written.append(json.loads((tmp_path / "heartbeat.json").read_text()))
    assert [(found["state"], found["step"]) for found in written] == [
        ("training", 1), ("training", 1), ("training", 3), ("saving", 3),
    ]  # fmt: skip
    assert set(written[0]) == FIELDS
    assert (written[0]["loss"], written[0]["tokens_per_second"], written[0]["restarts"]) == (None, 5.5, 2)
    assert written[0]["ranks"] == 4


def test_other_ranks_and_a_folder_that_is_gone_write_nothing(tmp_path: Path) -> None:
    Heartbeat(tmp_path, enabled=False).update("training")
    assert not list(tmp_path.iterdir())
    Heartbeat(tmp_path / "gone", enabled=True).update("training")
    assert not (tmp_path / "gone").exists()


def test_the_job_of_the_scheduler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    Heartbeat(tmp_path, enabled=True).write()
    assert json.loads((tmp_path / "heartbeat.json").read_text())["job"] == "77"


def test_starts_are_counted_and_those_at_the_same_step(tmp_path: Path) -> None:
    starts = read_starts(tmp_path)
    for step in (0, 0, 40, 40, 40):
        starts = starts.next(step)
    write_starts(tmp_path, starts)
    assert read_starts(tmp_path) == Starts(starts=5, stalled=3, step=40)
    forgive_start(tmp_path)
    assert read_starts(tmp_path) == Starts(starts=5)


def test_a_start_that_would_repeat_the_last_ones_is_refused(tmp_path: Path) -> None:
    config, stuck = FaultConfig(max_stalled_restarts=3), Starts(5, 3, 40)
    with pytest.raises(UserError, match=r"the last 3 starts began at step 40 too.*delete .*restarts\.json") as caught:
        check_restart(stuck, 40, config, tmp_path)
    assert str(caught.value).startswith("fault.max_stalled_restarts: ")
    check_restart(stuck, 50, config, tmp_path)
    check_restart(Starts(5, 2, 40), 40, config, tmp_path)
    check_restart(stuck, 40, FaultConfig(max_stalled_restarts=None), tmp_path)


def test_the_number_of_restarts_has_a_bound(tmp_path: Path) -> None:
    config = FaultConfig(max_restarts=2)
    check_restart(Starts(2, 1, 10), 20, config, tmp_path)
    with pytest.raises(UserError, match=r"^fault\.max_restarts: .* was restarted 2 times"):
        check_restart(Starts(3, 1, 10), 20, config, tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"starts": 1, "more": 2}', "no json"])
def test_a_damaged_count_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "restarts.json").write_text(text)
    with pytest.raises(UserError, match=r"restarts\.json is damaged .* delete it"):
        read_starts(tmp_path)


def crash(output: Path, store: Path) -> tuple[str, dict[str, object]]:
    """A start with resume auto whose model can't be built; its error, and the heartbeat after it."""
    from unittest import mock

    from engine import dist
    from engine.tasks.pretrain import Pretraining
    from engine.train.watch.preempt import StopRequest
    from engine.train.watch.session import Session
    from engine.train.watch.watchdog import Watchdog
    from launch.configure.options import parse_given
    from launch.launcher import Launcher
    from launch.train import run
    from tests.train.runs import SMALL

    config, given = parse_given([*SMALL, f"--output={output}", f"--data.path={store}", "--resume=auto"])
    session = Session(config, dist.World(), StopRequest(), Watchdog(output))
    with mock.patch.object(Pretraining, "build_model", side_effect=OSError("no memory")):
        try:
            run(config, Launcher("none", 1), session, given)
        except (OSError, UserError) as error:
            return str(error), json.loads((output / "heartbeat.json").read_text())
    raise AssertionError("it did not fail")


def test_a_run_that_dies_at_every_start_is_refused_the_fourth_time(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    found = [one_rank.apply(crash, (tmp_path / "run", store)) for _ in range(4)]
    assert [error for error, _ in found[:3]] == ["no memory"] * 3
    assert found[3][0].startswith("fault.max_stalled_restarts: the last 3 starts began at step 0")
    assert [beat["restarts"] for _, beat in found] == [0, 1, 2, 2]
    assert {beat["state"] for _, beat in found} == {"failed"}
    assert not (tmp_path / "run" / "checkpoints").exists()
