"""Git LFS pointers: the few lines that a clone holds in a large file's place until `git lfs pull` brings the file."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import UserError

#: first line of a pointer of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, and of its early forms
_POINTER = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?version https?://(git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/"
)
_SIZE = re.compile(rb"^size (\d+)", re.MULTILINE)
#: a pointer is smaller than this, says its specification
_MOST_BYTES = 1024


def refuse_pointer(path: Path, field: str) -> None:
    """Raise if a file is a Git LFS pointer; a path that is no file, or can't be read, is left to who opens it.

    Args:
        field: names what the user gave, for the message.

    Raises:
        UserError: the file is a pointer.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(_MOST_BYTES + 1)
    except OSError:
        return
    if len(start) > _MOST_BYTES or not _POINTER.match(start):
        return
    size = _SIZE.search(start)
    meant = f"the file of {int(size[1]):,} bytes" if size else "the file"
    raise UserError(
        f"{field}: {path} is a Git LFS pointer, not {meant} that it stands for; run `git lfs pull` where it was cloned"
    )
