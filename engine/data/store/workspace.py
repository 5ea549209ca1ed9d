"""The folder of a store while it is being made.

Everything is written under `<output>/.partial` and moved up at the end, the manifest last: a killed run leaves
nothing that looks complete, and the next one finds the finished shards. A store that is being overwritten
stays whole until the new one is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.data.store.manifest import MANIFEST_NAME, Manifest, StoreShard, read_manifest
from engine.data.store.store import TOKENIZER_FOLDER
from engine.data.text.corpus import SourceRecord
from engine.durable import sha256_of, write_atomically
from engine.errors import UserError

PARTIAL = ".partial"
SETTINGS_NAME = "settings.json"
RECORDS = "records"
LOCK = "lock"
#: what settings were in stores that don't record them: the version that made these knew no other values
UNSAID: dict[str, Any] = {"tokenizer": None, "vocabulary": "wordpiece", "lines": "wrapped", "by_content": []}


def identity(settings: dict[str, Any], sources: Sequence[SourceRecord]) -> dict[str, Any]:
    """What two preparations must share to give the same store; a source is its content, not its place."""
    return {**UNSAID, **settings, "source": [source.sha256 for source in sources]}


def check_same(settings: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Raise unless a store (or a part of one) was made with the wanted settings."""
    for name, value in wanted.items():
        if settings.get(name) != value:
            detail = "other content" if name == "source" else f"{settings.get(name)!r}, not {value!r}"
            raise UserError(
                f"{name}: {output} was prepared with {detail}; pass --overwrite or choose another output folder"
            )


def find_complete(output: Path, wanted: dict[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest of a complete store that has the wanted settings; None where there is none or it has to go.

    Raises:
        UserError: a store with other settings, or a folder of other files.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; choose a folder")
    if not (output / MANIFEST_NAME).is_file():
        others = [path.name for path in output.iterdir() if path.name != PARTIAL] if output.is_dir() else []
        # A run that is killed while it moves the files up leaves shards beside the partial folder.
        if others and not (output / PARTIAL).is_dir():
            raise UserError(f"output: {output} holds other files, e.g. {others[0]}; choose a new or empty folder")
        return None
    if overwrite:
        return None
    manifest = read_manifest(output)
    check_same(identity(manifest.settings, manifest.sources), wanted, output)
    return manifest


class Workspace:
    """The locked `<output>/.partial`; a context manager.

    `resumed` tells whether it goes on with an earlier run's. Otherwise a user's error removes the folder again;
    any other way out keeps it for the next run.
    """

    def __init__(self, output: Path, wanted: dict[str, Any], overwrite: bool) -> None:
        self.output, self.folder = output, output / PARTIAL
        self._wanted, self._overwrite = wanted, overwrite
        self._created = [path for path in (output, *output.parents) if not path.exists()]
        self.resumed = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a+")
        except OSError as error:
            raise UserError(f"output: {self.output} can't be written ({error.strerror}); choose another") from error
        self._acquire(self._lock)
        try:
            self._claim()
        except UserError:
            self._lock.close()
            raise
        return self

    def _acquire(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"output: {self.output} is being prepared by {lock.read().strip()}; wait for it or choose another"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()

    def _claim(self) -> None:
        """Take over what an earlier run left, or start anew."""
        settings = self.folder / SETTINGS_NAME
        earlier = {**UNSAID, **json.loads(settings.read_text(encoding="utf-8"))} if settings.is_file() else None
        if earlier is not None and earlier != self._wanted:
            if not self._overwrite:
                check_same(earlier, self._wanted, self.output)
            self._empty()
            earlier = None
        self.resumed = earlier is not None
        (self.folder / RECORDS).mkdir(exist_ok=True)
        write_atomically(settings, json.dumps(self._wanted, ensure_ascii=False, sort_keys=True))

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK:
                remove(path)

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER_FOLDER

    def recorded(self, block: int) -> bool:
        """Whether an earlier run finished a block of this number."""
        return _record_of(self.folder, block).is_file()

    def finished(self, block: int, text_sha256: str) -> dict[str, StoreShard] | None:
        """The shards of a recorded block, if they are intact and made from the same text."""
        record = json.loads(_record_of(self.folder, block).read_text(encoding="utf-8"))
        shards = {split: StoreShard(**shard) for split, shard in record["shards"].items()}
        intact = record["text_sha256"] == text_sha256 and all(map(self._is_intact, shards.values()))
        return shards if intact else None

    def _is_intact(self, shard: StoreShard) -> bool:
        path = self.folder / shard.name
        return path.is_file() and path.stat().st_size == shard.bytes and sha256_of(path) == shard.sha256

    def publish(self, manifest: Manifest) -> None:
        """Move the store to its final place, replacing an older one; the manifest comes last."""
        (self.output / MANIFEST_NAME).unlink(missing_ok=True)
        for path in [*self.output.glob("*.arrow"), self.output / TOKENIZER_FOLDER]:
            remove(path)
        for shard in (shard for shards in manifest.splits.values() for shard in shards):
            (self.folder / shard.name).rename(self.output / shard.name)
        self.tokenizer.rename(self.output / TOKENIZER_FOLDER)
        write_atomically(self.output / MANIFEST_NAME, manifest.to_json())
        shutil.rmtree(self.folder)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._lock is not None
        self._lock.close()
        if isinstance(error, UserError) and not self.resumed:
            shutil.rmtree(self.folder)
            for path in self._created:
                with contextlib.suppress(OSError):  # another run may use it by now
                    path.rmdir()


def record_block(folder: Path, block: int, text_sha256: str, shards: dict[str, StoreShard]) -> None:
    """Note that a block's shards are complete."""
    content = {"text_sha256": text_sha256, "shards": {split: asdict(shard) for split, shard in shards.items()}}
    write_atomically(_record_of(folder, block), json.dumps(content))


def _record_of(folder: Path, block: int) -> Path:
    return folder / RECORDS / f"{block:05d}.json"


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
