"""Where predictions go: a file that a killed run goes on with, or the standard output.

Beside FILE lies FILE.progress.json: how many rows, and bytes, of it are on the disk, the hash of these rows of the
input, and what they were made with. What the file holds beyond is cut off when a run goes on. A chunk is on the disk
before the journal counts it, so whatever kills the run or the machine, the journal tells of no row that isn't there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from engine.durable import is_sealed, make_folder, replace_durably, seal, sync_folder
from engine.errors import RunError, UserError

FORMAT = 1
ANOTHER = "give another output, or overwrite"


@dataclass(frozen=True)
class Progress:
    """How far a file has come."""

    rows: int = 0
    bytes: int = 0
    digest: str = ""
    """sha256 of the input's rows so far"""
    truncated: int = 0
    """rows so far whose text was cut"""
    whole: bool = False
    """whether these are all rows"""


class Sink(Protocol):
    """Where chunks go, in order."""

    progress: Progress

    def write(self, content: bytes, rows: int, digest: str, truncated: int) -> None:
        """Add a chunk."""
        ...

    def finish(self) -> None:
        """All rows are there."""
        ...


class StandardOutput:
    """Sends chunks on at once."""

    def __init__(self) -> None:
        self.progress = Progress()

    def write(self, content: bytes, rows: int, digest: str, truncated: int) -> None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        self.progress = added(self.progress, content, rows, digest, truncated)

    def finish(self) -> None:
        """Nothing is left to do."""


class Journal:
    """Adds chunks to a file, each durably; a context manager."""

    def __init__(self, path: Path, made_with: Mapping[str, Any], *, overwrite: bool) -> None:
        """Open the file where an earlier run left it, or a new one.

        Args:
            made_with: what decides the file's content beside the input, as JSON.
            overwrite: whether what is there may go.

        Raises:
            UserError: what is there is no run's, or was made with something else, or is damaged.
        """
        self.path, self.sidecar, self._made_with = path, sidecar_of(path), dict(made_with)
        self.progress = Progress() if overwrite else self._earlier()
        try:
            make_folder(path.parent)
            self._file: BinaryIO = path.open("r+b" if self.progress.rows else "wb")
            self._file.truncate(self.progress.bytes)
            self._file.seek(self.progress.bytes)
            sync_folder(path.parent)
            self._record()  # so that an interrupted first chunk is known for a beginning of ours
        except OSError as error:
            raise UserError(f"output: {str(path)!r} can't be written ({error.strerror}); {ANOTHER}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None and not self.progress.rows:  # a mistake leaves nothing behind
            self.path.unlink(missing_ok=True)
            self.sidecar.unlink(missing_ok=True)

    def write(self, content: bytes, rows: int, digest: str, truncated: int) -> None:
        try:
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.progress = added(self.progress, content, rows, digest, truncated)
            self._record()
        except OSError as error:
            remedy = "make room and give the command again: it goes on"
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); {remedy}") from error

    def finish(self) -> None:
        self.progress = replace(self.progress, whole=True)
        self._record()

    def _record(self) -> None:
        values = {"format": FORMAT, "made_with": self._made_with, **asdict(self.progress)}
        replace_durably(self.sidecar, seal(values).encode())

    def _earlier(self) -> Progress:
        """What an earlier run left."""
        shown = str(self.path)
        if self.path.is_dir():
            raise UserError(f"output: {shown!r} is a folder; give a file")
        if not self.path.exists():
            return Progress()
        if not self.sidecar.is_file():
            raise UserError(f"output: {shown!r} exists and {self.sidecar.name} doesn't, so no run can go on; {ANOTHER}")
        text = self.sidecar.read_text(encoding="utf-8", errors="replace")
        values = json.loads(text) if is_sealed(text) else {}
        if values.get("format") != FORMAT:
            raise UserError(f"output: {self.sidecar} is damaged or of another version; {ANOTHER}")
        for name, value in self._made_with.items():
            earlier = values["made_with"].get(name)
            if earlier != value:
                raise UserError(
                    f"output: {shown!r} was made with {name} {_shown(earlier)}, and {_shown(value)} is given; {ANOTHER}"
                )
        progress = Progress(**{name: values[name] for name in asdict(Progress())})
        if self.path.stat().st_size < progress.bytes:
            raise UserError(f"output: {shown!r} is shorter than what was written there; {ANOTHER}")
        return progress if progress.rows else Progress()


def sidecar_of(path: Path) -> Path:
    """The journal of an output."""
    return path.with_name(f"{path.name}.progress.json")


def added(progress: Progress, content: bytes, rows: int, digest: str, truncated: int) -> Progress:
    """The progress after another chunk."""
    return Progress(progress.rows + rows, progress.bytes + len(content), digest, progress.truncated + truncated)


def _shown(value: object) -> str:
    text = str(value)
    return f"sha256 {text[:12]}" if len(text) == 64 else repr(value)
