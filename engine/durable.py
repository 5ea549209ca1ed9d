"""Files and folders that outlive a crash: on the disk before they count, with hashes that show any damage.

Hashes are SHA-256, taken of the bytes as they are written. With the processor's SHA instructions hashlib does 2 GB/s,
which is more than a disk writes; the standard library has nothing faster.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

#: what some file systems answer that keep no folders to synchronize
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
SEAL = "sha256"


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a written file."""

    bytes: int
    sha256: str


class HashingWriter:
    """Passes bytes on to a file, counting and hashing them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        self._file.write(data)

    def facts(self) -> FileFacts:
        """Size and hash of what was written so far."""
        return FileFacts(self._size, self._hash.hexdigest())


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[HashingWriter]:
    """A new file, whose content is on the disk at the end of the block; its name is after `sync_folder`.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    with path.open("wb") as file:
        yield HashingWriter(file)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, content: bytes) -> FileFacts:
    """Write a small file at once; see `durable_file`."""
    with durable_file(path) as file:
        file.write(content)
    return file.facts()


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """The hidden file beside `path` that takes its place at the end of the block: a reader sees the old or the new one.

    A block that fails leaves the old one. So does a killed process, and its hidden file is overwritten by the next.
    A crash of the machine may lose both; see `replace_durably`. One writer at a time: two would share the hidden file.
    """
    aside = path.with_name(f".{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file in one rename, text as UTF-8; see `written_aside`."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_durably(path: Path, content: bytes) -> None:
    """Give a small file new content by one rename: a reader, or a crash, finds the old one or the new one."""
    with written_aside(path) as aside:
        write_durably(aside, content)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each durable in its own."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sha256_of(path: Path) -> str:
    """The hash of a file's content.

    Raises:
        OSError: it can't be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def seal(values: dict[str, Any]) -> str:
    """JSON whose last field is the hash of its text without that hash."""
    head, tail = json.dumps({**values, SEAL: ""}, indent=1).rsplit('""', 1)
    return f'{head}"{_digest(head + tail)}"{tail}'


def is_sealed(text: str) -> bool:
    """Whether a text is as `seal` made it, to the last byte."""
    match = re.fullmatch(r'(.*)"([0-9a-f]{64})"(\n})', text, re.DOTALL)
    return match is not None and _digest(match[1] + match[3]) == match[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
