"""Small corpora to prepare, and what a preparation of them makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.data.store.prepare import PrepareConfig
from engine.data.text.embedded import embedded_documents

TEXTS = list(embedded_documents()[:60])


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config(source: Path, output: Path, **options: Any) -> PrepareConfig:
    return PrepareConfig(
        **{"vocab_size": 600, "shard_mb": 1, "source": [str(source)], "output": str(output), **options}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
