"""A folder that holds something already: of a killed run, a finished store, other settings, other files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from engine.data.store.executor import InlineExecutor, open_executor
from engine.data.store.manifest import MANIFEST_NAME
from engine.data.store.prepare import prepare
from engine.data.store.store import open_store
from engine.errors import UserError
from tests.data.store.corpora import TEXTS, config, content, write_corpus


class KilledExecutor(Executor):
    """Runs `alive` blocks and then behaves as if the process were interrupted."""

    def __init__(self, alive: int) -> None:
        self.alive, self.inner = alive, InlineExecutor()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.alive == 0:
            raise KeyboardInterrupt
        self.alive -= 1
        return self.inner.submit(fn, *args, **kwargs)


@pytest.mark.usefixtures("small_shards")
def test_a_killed_run_leaves_no_store_and_the_next_goes_on(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, output), KilledExecutor(3))
    with pytest.raises(UserError, match="is no complete store"):
        open_store(output)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / ".partial").glob("train-*.arrow")}
    assert len(finished) == 3

    prepare(config(corpus, output))
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    prepare(config(corpus, tmp_path / "fresh"))
    assert content(output) == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_of_a_killed_run_is_made_again(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, output), KilledExecutor(2))
    (output / ".partial" / "train-00000.arrow").write_bytes(b"cut")
    (output / ".partial" / "train-00001.arrow").unlink()
    prepare(config(corpus, output))
    open_store(output, verify=True)


def test_a_killed_run_with_other_settings_is_refused_or_overwritten(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, tmp_path / "store"), KilledExecutor(0))
    with pytest.raises(UserError, match=r"seed: .* was prepared with 1, not 2; pass --overwrite"):
        prepare(config(corpus, tmp_path / "store", seed=2))
    prepare(config(corpus, tmp_path / "store", seed=2, overwrite=True))
    assert open_store(tmp_path / "store").manifest.settings["seed"] == 2


def test_a_store_is_complete_only_with_its_manifest(corpus: Path, tmp_path: Path) -> None:
    """Killed while files are moved into place: the next run makes a whole store."""
    output = tmp_path / "store"
    manifest = prepare(config(corpus, output))
    before = content(output)
    (output / ".partial").mkdir()
    (output / MANIFEST_NAME).unlink()
    assert prepare(config(corpus, output)) == manifest
    assert content(output) == before


def test_a_dead_worker_is_explained_and_the_next_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    with open_executor(2) as opened:
        assert opened is not None
        opened[0].submit(os._exit, 1)
        with pytest.raises(UserError, match="workers: a worker process died"):
            prepare(config(corpus, tmp_path / "store"), *opened)
    prepare(config(corpus, tmp_path / "store"))


def test_two_preparations_of_one_folder_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / ".partial").mkdir(parents=True)
    with (tmp_path / "store" / ".partial" / "lock").open("w") as lock:
        lock.write("process 17 on node3")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being prepared by process 17 on node3; wait for it"):
            prepare(config(corpus, tmp_path / "store"))
    prepare(config(corpus, tmp_path / "store"))


def test_a_finished_store_is_not_made_again(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    moved = corpus.rename(tmp_path / "moved.jsonl")
    assert prepare(config(moved, tmp_path / "store"), KilledExecutor(0)) == manifest
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 500}, r"vocab_size: .* was prepared with 600, not 500; pass --overwrite"),
        ({"lowercase": False}, r"lowercase: .* was prepared with True, not False"),
        ({"shard_mb": 2}, r"shard_mb: .* was prepared with 1, not 2"),
    ],
)
def test_another_setting_is_refused_by_name(
    corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, tmp_path / "store", **options))
    assert content(tmp_path / "store") == before


def test_other_text_is_refused_and_overwrite_replaces_it(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    other = write_corpus(tmp_path / "other.jsonl", TEXTS[:30])
    with pytest.raises(UserError, match=r"source: .* was prepared with other content; pass --overwrite"):
        prepare(config(other, tmp_path / "store"))
    prepare(config(other, tmp_path / "store", overwrite=True))
    prepare(config(other, tmp_path / "fresh"))
    assert content(tmp_path / "store") == content(tmp_path / "fresh")


def test_a_failed_overwrite_keeps_the_old_store(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b"{\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:61: not JSON"):
        prepare(config(bad, tmp_path / "store", overwrite=True))
    assert content(tmp_path / "store") == before


def test_a_folder_of_other_files_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"output: .* holds other files, e\.g\. thesis\.txt"):
            prepare(config(corpus, tmp_path / "mine", overwrite=overwrite))
    assert content(tmp_path / "mine") == {"thesis.txt": b"precious"}


def test_a_store_with_names_is_no_answer_to_who_wants_none(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    with pytest.raises(UserError, match=r"^source_names: .* was prepared with None, not False; pass --overwrite"):
        prepare(config(corpus, tmp_path / "store", source_names=False))
    prepare(config(corpus, tmp_path / "store", source_names=False, overwrite=True))
    assert not any(b"corpus.jsonl" in data for data in content(tmp_path / "store").values())
    assert prepare(config(corpus, tmp_path / "store", source_names=False)).sources[0].name == "source-1"
