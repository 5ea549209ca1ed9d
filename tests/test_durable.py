"""A checkpoint is whole or refused by name, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest

from engine.durable import (
    durable_file,
    is_sealed,
    make_folder,
    replace_durably,
    seal,
    sha256_of,
    write_atomically,
    written_aside,
)
from engine.errors import UserError
from engine.export import find_checkpoint
from engine.train.checkpoint import commit
from engine.train.checkpoint.folder import STATE_FILE, complete_checkpoints, damage, find, newest_intact, read_state
from tests.train.checkpoint import durable_worker
from tests.train.runs import execute, losses, run

FILES = ("state.json", "index.json", "rank-00000.safetensors", "rng-rank-0.pt")


@pytest.fixture(scope="module")
def saved(one_rank: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints of one rank."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    one_rank.apply(durable_worker.make, (folder, 3))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_a_durable_file_is_what_was_written_and_knows_its_hash(tmp_path: Path) -> None:
    with durable_file(tmp_path / "file") as file:
        file.write(b"one ")
        file.write(memoryview(bytearray(range(256)) * 8192))
    content = b"one " + bytes(range(256)) * 8192
    assert (tmp_path / "file").read_bytes() == content
    assert (file.facts().bytes, file.facts().sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sha256_of(tmp_path / "file") == file.facts().sha256


def test_a_seal_shows_any_changed_byte() -> None:
    text = seal({"step": 4, "rate": 1e-5, "text": 'a "sha256": "" within'})
    assert json.loads(text)["step"] == 4
    assert is_sealed(text)
    for position in range(len(text)):
        for bit in range(7):
            assert not is_sealed(text[:position] + chr(ord(text[position]) ^ 1 << bit) + text[position + 1 :])
    assert not is_sealed(text[:-1])
    assert not is_sealed(text + "\n")
    assert not is_sealed("")


def test_a_small_file_is_replaced_in_one_rename(tmp_path: Path) -> None:
    make_folder(tmp_path / "new" / "folder")
    for content in (b"step-000001", b"step-000002"):
        replace_durably(tmp_path / "new" / "folder" / "latest", content)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["latest"]
    assert (tmp_path / "new" / "folder" / "latest").read_bytes() == b"step-000002"


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:

    def write_half(path: Path) -> None:
        path.write_text("half")
        raise OSError("the disk is full")

    table = tmp_path / "table.csv"
    write_atomically(table, "Grüße\n")
    with pytest.raises(OSError, match="full"), written_aside(table) as aside:
        write_half(aside)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert table.read_bytes() == "Grüße\n".encode()


def test_every_file_is_listed_with_its_size_and_hash(saved: Path) -> None:
    path = saved / "step-000003"
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert (saved / "latest").read_text() == path.name
    files = read_state(path).files
    assert files.keys() == set(FILES) - {STATE_FILE}
    for name, facts in files.items():
        content = (path / name).read_bytes()
        assert (facts.bytes, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def flip(position: float) -> Callable[[Path], None]:
    """Change one bit of a file, at a part of its length."""

    def damage_file(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage_file


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": flip(0),
    "byte within": flip(0.37),
    "last byte": flip(1),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damaged", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_auto_takes_the_checkpoint_before(
    folder: Path, name: str, damaged: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(folder / "step-000003" / name)
    assert name in (damage(folder / "step-000003") or "")
    assert find("auto", folder) == folder / "step-000002"
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"passed over {folder / 'step-000003'}, which is damaged: {name}")
    with pytest.raises(UserError, match=f"resume: .*{name}"):
        find(str(folder / "step-000003"), folder)
    if name != STATE_FILE:
        with pytest.raises(UserError, match=f"step-000003 is damaged .*{name}"):
            find_checkpoint(folder / "step-000003")
    assert find_checkpoint(folder.parent) == folder / "step-000002"


def test_a_file_too_many_is_named(folder: Path) -> None:
    (folder / "step-000003" / "rank-00001.safetensors").touch()
    with pytest.raises(UserError, match=r"damaged \(rank-00001\.safetensors is none of its files\)"):
        find(str(folder / "step-000003"), folder)
    assert newest_intact(folder) == folder / "step-000002"


@pytest.mark.parametrize("latest", ["", "step-000009", "\0"])
def test_what_latest_says_is_for_people(folder: Path, latest: str) -> None:
    (folder / "latest").write_text(latest)
    assert find("auto", folder) == folder / "step-000003"
    (folder / "latest").unlink()
    assert find("auto", folder) == folder / "step-000003"


def test_a_run_never_starts_anew_over_damaged_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in complete_checkpoints(folder):
        flip(0.5)(path / "index.json")
    with pytest.raises(UserError, match=r"^resume: every checkpoint in .* is damaged; restore one, or move"):
        find("auto", folder)
    assert len(capsys.readouterr().out.splitlines()) == 3
    shutil.rmtree(folder)
    assert find("auto", folder) is None


def test_parts_of_the_verification_are_dealt_among_ranks(folder: Path) -> None:
    flip(0.5)(folder / "step-000003" / "rank-00000.safetensors")
    assert [damage(folder / "step-000003", part, 3) is None for part in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("damaged", "keep", "left"),
    [
        ([], 1, [3]),
        ([], 2, [2, 3]),
        ([], 5, [1, 2, 3]),
        ([3], 1, [2, 3]),
        ([2], 2, [1, 2, 3]),
        ([2], 1, [3]),
        ([2, 3], 1, [1, 2, 3]),
        ([1, 2, 3], 1, [1, 2, 3]),
    ],
)
def test_retention_counts_whole_checkpoints_only(folder: Path, damaged: list[int], keep: int, left: list[int]) -> None:
    for step in damaged:
        os.truncate(folder / f"step-{step:06d}" / "rank-00000.safetensors", 100)
    commit.retain(folder, keep)
    assert [path.name for path in complete_checkpoints(folder)] == [f"step-{step:06d}" for step in left]
    assert not list(folder.glob(".*"))


def test_leftovers_go_and_checkpoints_stay(folder: Path) -> None:
    for name in (".partial-step-000004", ".dropped-step-000001"):
        shutil.copytree(folder / "step-000001", folder / name)
    commit.clean(folder)
    assert not list(folder.glob(".*"))
    assert len(complete_checkpoints(folder)) == 3


def test_checkpoints_that_a_run_comes_to_again_are_set_aside(folder: Path) -> None:
    told = commit.set_aside_from(folder, 1, folder / "step-000001")
    assert [path.name for path in complete_checkpoints(folder)] == ["step-000001"]
    assert len(told) == 2
    assert damage(folder / "aside-step-000003") is None
    assert commit.set_aside_from(folder, 1, folder / "step-000001") == []


def test_what_is_relied_on_is_on_the_disk_before(one_rank: Pool, tmp_path: Path) -> None:
    """The calls to the system, in order: no rename before the fsync of what it publishes."""
    events = one_rank.apply(durable_worker.traced_save, (tmp_path / "checkpoints",))
    hidden, named = ".partial-step-000001", "step-000001"
    publish = events.index(f"rename {hidden} {named}")
    for file in FILES:
        assert events.index(f"fsync {file}") < publish
    listed = events.index("rename .part-00000.json part-00000.json")
    assert (
        events.index("fsync .part-00000.json")
        < events.index(f"fsync {hidden}")
        < listed
        < events.index("fsync state.json")
    )
    last_of_hidden = max(number for number, event in enumerate(events) if event == f"fsync {hidden}")
    assert events.index("fsync state.json") < last_of_hidden < publish
    latest = events.index("rename .latest latest")
    assert publish < events.index("fsync checkpoints", publish) < latest < events.index("fsync checkpoints", latest)
    assert events.index("fsync .latest") < latest


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_a_usable_checkpoint(one_rank: Pool, tmp_path: Path, count: int) -> None:
    found = one_rank.apply(durable_worker.kills, (tmp_path / "checkpoints", count, 7))
    print(found)
    assert found["kills"] == count
    assert found["in_save"] >= (1 if count < 10 else count // 4)
    assert found["saved"] >= count


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two ranks' saves, and what each rank got."""
    folder = tmp_path_factory.mktemp("two_ranks")
    done = execute("tests/train/checkpoint/durable_worker.py", str(folder))
    assert done.returncode == 0, done.stdout
    return folder, [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("stage", durable_worker.STAGES)
def test_a_save_in_training_writes_what_one_that_waits_would(two_ranks: Any, stage: int) -> None:
    """And it is the copy that does it: without, the files hold what training made meanwhile."""
    waiting, training, views = (
        {path.name: path.read_bytes() for path in (two_ranks[0] / f"stage-{stage}" / name / "step-000001").iterdir()}
        for name in ("waiting", "training", "views")
    )
    assert len(waiting) == 6
    assert training == waiting
    assert views["rank-00001.safetensors"] != waiting["rank-00001.safetensors"]


@pytest.mark.parametrize("background", [True, False])
def test_rank_0_tells_of_a_save_that_one_rank_could_not_write(two_ranks: Any, background: bool) -> None:
    first, second = (found[f"full {background}"]["said"] for found in two_ranks[1])
    assert second == []
    (line,) = first
    assert line.startswith("warning: step-000002 was not saved in ")
    for words in ("/failures (rank 1: No space left on device); free space there", "older checkpoints are intact"):
        assert words in line
    for found in two_ranks[1]:
        full, required = found[f"full {background}"], found[f"required {background}"]
        assert required["raised"].startswith("RunError: step-000002 was not saved in ")
        assert "(rank 1: No space left on device); free space there" in required["raised"]
        assert full["seconds"] + required["seconds"] < 10
        assert full["left"] == required["left"] == ["latest", "step-000001"]


def test_rank_0_tells_of_a_folder_that_can_not_be_made(two_ranks: Any) -> None:
    first, second = (found["read-only"]["said"] for found in two_ranks[1])
    assert "(rank 0: Read-only file system); make it writable" in first[0]
    assert second == []


def test_a_defect_in_a_thread_keeps_its_type_and_ends_the_other_rank_too(two_ranks: Any) -> None:
    first, second = (found["defect"]["raised"] for found in two_ranks[1])
    assert first.startswith("RunError: step-000002 was not saved in ")
    assert "(rank 1: ZeroDivisionError: in a thread)" in first
    assert second == "ZeroDivisionError: in a thread"


def test_training_goes_on_while_a_slow_disk_is_written(two_ranks: Any) -> None:
    for found in two_ranks[1]:
        assert found["slow"]["under_way"] == 3
        assert found["slow"]["said"] == []
        assert found["slow"]["left"] == ["latest", "step-000001", "step-000002"]
    assert damage(two_ranks[0] / "failures" / "step-000002") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own, at the `checkpoints` of a run."""
    mounted = tmp_path / "run" / "checkpoints"
    mounted.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_costs_that_save_only(one_rank: Pool, small_disk: Path) -> None:
    assert one_rank.apply(durable_worker.save_on, (small_disk, 1)) == []
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\1" * (shutil.disk_usage(small_disk).free - 4 * 4096))
    (said,) = one_rank.apply(durable_worker.save_on, (small_disk, 2))
    assert f"step-000002 was not saved in {small_disk} (rank 0: No space left on device); free space there" in said
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "latest", "step-000001"]
    assert damage(small_disk / "step-000001") is None
    ballast.unlink()
    assert one_rank.apply(durable_worker.save_on, (small_disk, 2)) == []
    assert newest_intact(small_disk) == small_disk / "step-000002"


def test_a_disk_turned_read_only_costs_that_save_only(one_rank: Pool, small_disk: Path) -> None:
    assert one_rank.apply(durable_worker.save_on, (small_disk, 1)) == []
    remount(small_disk, "ro")
    (said,) = one_rank.apply(durable_worker.save_on, (small_disk, 2))
    assert f"was not saved in {small_disk} (rank 0: Read-only file system); make it writable" in said
    assert newest_intact(small_disk) == small_disk / "step-000001"
    remount(small_disk, "rw")
    assert one_rank.apply(durable_worker.save_on, (small_disk, 2)) == []
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-000001", "step-000002"]


@pytest.mark.slow
def test_a_run_goes_on_over_a_full_disk_and_ends_with_one_line_if_the_last_save_fails(
    small_disk: Path, store: Path, tmp_path: Path
) -> None:
    options = [f"--data.path={store}", "--train.steps=6", "--train.save_interval=2", "--train.keep=9"]
    remount(small_disk, "size=1200k")  # room for one checkpoint
    printed = run(tmp_path / "run", *options, code=1, ranks=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"step-000006 was not saved in {small_disk} (rank " in errors[0]
    assert "No space left on device); free space there" in errors[0]
    assert printed.count(f"warning: step-000004 was not saved in {small_disk} (rank ") == 1
    assert "Traceback" not in printed
    remount(small_disk, "size=9m")
    assert "at step 2" in run(tmp_path / "run", *options, "--resume=auto", ranks=2)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 7))
