"""Where compiled kernels stay."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where built libraries stay, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zerobert" / "kernels"
