"""What a prepared store says about itself: counts, hashes, where the text came from and how it was cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.data.text.corpus import SourceRecord
from engine.errors import UserError

#: 2 counts [UNK]
FORMAT_VERSION = 2
READABLE = (1, 2)
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class StoreShard:
    """One Arrow file of a split."""

    name: str
    sha256: str
    bytes: int
    documents: int
    sentences: int
    tokens: int
    unknown: int | None = None
    """[UNK] among the tokens; None where an older version didn't count them"""


@dataclass(frozen=True)
class Counts:
    """Size of a split."""

    documents: int
    sentences: int
    tokens: int
    unknown: int | None
    """[UNK] among the tokens; None where that is not known of every shard"""


@dataclass(frozen=True)
class Manifest:
    """The index of a store; its presence is what makes a store complete."""

    format_version: int
    splits: dict[str, list[StoreShard]]
    sources: list[SourceRecord]
    settings: dict[str, Any]
    """options that decide the content: equal sources and settings make an equal store"""
    tokenizer_fingerprint: str
    vocab_size: int
    versions: dict[str, str]
    """versions of the libraries that made it"""

    def counts(self, split: str) -> Counts:
        return count(self.splits[split])

    @property
    def fingerprint(self) -> str:
        """sha256 of the content: every shard of every split and the tokenizer; pins a run to its data."""
        hashes = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        content = json.dumps([self.tokenizer_fingerprint, hashes], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        totals = {split: asdict(self.counts(split)) for split in self.splits}
        content = {**asdict(self), "totals": totals, "fingerprint": self.fingerprint}
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def count(shards: Sequence[StoreShard]) -> Counts:
    """Totals over shards."""
    unknown = [shard.unknown for shard in shards if shard.unknown is not None]
    return Counts(
        documents=sum(shard.documents for shard in shards),
        sentences=sum(shard.sentences for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        unknown=sum(unknown) if len(unknown) == len(shards) else None,
    )


def numbered(sources: Sequence[SourceRecord]) -> list[SourceRecord]:
    """The sources with numbers for names, since names may tell more than a store should: a patient's, a customer's."""
    return [replace(source, name=f"source-{number}") for number, source in enumerate(sources, 1)]


def read_manifest(folder: Path) -> Manifest:
    """Read a store's manifest.

    Raises:
        UserError: the folder isn't there, isn't a complete store, or was made by a newer version.
    """
    remedy = "make it with `zerobert prepare`"
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"data: {folder} does not exist; {remedy}")
    if not path.is_file():
        raise UserError(f"data: {folder} is no complete store (no {MANIFEST_NAME}); {remedy} or let that finish")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version not in READABLE:
            raise UserError(
                f"data: {folder} has store format {version}, this zerobert reads {FORMAT_VERSION}; "
                "use the zerobert that made it or prepare it again"
            )
        return Manifest(
            format_version=version,
            splits={name: [StoreShard(**shard) for shard in shards] for name, shards in content["splits"].items()},
            sources=[SourceRecord(**source) for source in content["sources"]],
            settings=content["settings"],
            tokenizer_fingerprint=content["tokenizer_fingerprint"],
            vocab_size=content["vocab_size"],
            versions=content["versions"],
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data: {path} is damaged ({error}); prepare the store again with --overwrite") from error
