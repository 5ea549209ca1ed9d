"""A Git LFS pointer is told from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import UserError
from engine.lfs import refuse_pointer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"


@pytest.mark.parametrize(
    "content",
    [POINTER, POINTER.replace("\n", "\r\n"), "\ufeff" + POINTER, POINTER.replace("git-lfs", "hawser")],
    ids=["plain", "carriage returns", "byte order mark", "early form"],
)
def test_a_pointer_is_refused_with_field_size_and_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(
        UserError, match=r"^model\.init_from: .*model\.safetensors is .* 1,234,567 bytes .*git lfs pull"
    ):
        refuse_pointer(path, "model.init_from")


def test_a_link_to_a_pointer_is_one(tmp_path: Path) -> None:
    (tmp_path / "object").write_text(POINTER)
    (tmp_path / "link.csv").symlink_to(tmp_path / "object")
    with pytest.raises(UserError, match=r"link\.csv is a Git LFS pointer"):
        refuse_pointer(tmp_path / "link.csv", "labelled")


@pytest.mark.parametrize("content", ["", "version 2 of the text\n", POINTER + "a file that quotes a pointer\n" * 50])
def test_other_files_folders_and_missing_paths_pass(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    refuse_pointer(tmp_path / "a.txt", "source")
    refuse_pointer(tmp_path, "source")
    refuse_pointer(tmp_path / "missing", "source")
