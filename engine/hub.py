"""Models of the Hugging Face hub by their names: `bert-base-uncased`, `org/name`, `org/name@revision`.

A name stands for a folder of the user's cache of the hub. `fetch` asks the hub and fills the cache, once for all ranks
of a machine; `local_folder` only looks into the cache, so any rank may call it. A path that exists is never a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError, first_line

#: all that is read of a model beside its weights
CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "vocab.txt")
PLAIN_FILES = (CONFIG, *TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: weights, the first kind that a model has: whole, or in shards beside an index
WEIGHTS = (
    ("model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors")),
    ("pytorch_model.bin", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
)

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: endings of single files, which some options take too: a name with one is a misspelt path
_FILES = (".txt", ".json", ".safetensors", ".bin")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub."""

    name: str
    revision: str | None = None
    """a branch, tag or commit; None: the branch main"""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def at(self, folder: Path) -> HubModel:
        """The same model at the commit whose files `folder` holds, a folder of the cache."""
        return HubModel(self.name, folder.name)


def hub_model(text: str, field: str = "model.init_from") -> HubModel | None:
    """The model of the hub that a user's text names; None for a path that exists, and for what can't be such a name.

    Args:
        field: names the option, for the message.

    Raises:
        UserError: a name whose revision can't be one.
    """
    name, at, revision = text.partition("@")
    if Path(text).exists() or not _NAME.fullmatch(name) or name.endswith((".", "-", *_FILES)):
        return None
    if "--" in name or ".." in name:
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/")):
        raise UserError(f"{field}: {text!r} has {revision!r} as its revision; give a branch, tag or commit of {name}")
    return HubModel(name, revision if at else None)


def wanted_files(names: Collection[str], *, weights: bool) -> list[str]:
    """Those of a model's files that are read: pickled weights only where it has no safetensors."""
    files = [name for name in PLAIN_FILES if name in names]
    for whole, shard in WEIGHTS if weights else ():
        if whole in names:
            return [*files, whole]
        if f"{whole}.index.json" in names:
            return [*files, f"{whole}.index.json", *sorted(name for name in names if shard.fullmatch(name))]
    return files


def missing_part(names: Collection[str], *, weights: bool) -> str | None:
    """What a folder of these files lacks of a model, in words; None if nothing."""
    files = wanted_files(names, weights=weights)
    if weights and CONFIG not in files:
        return CONFIG
    if not set(files) & set(TOKENIZER):
        return " or ".join(TOKENIZER)
    if weights and not set(files) - set(PLAIN_FILES):
        return " or ".join(whole for whole, _ in WEIGHTS)
    return None


def cached_folder(model: HubModel) -> Path | None:
    """The cache's folder of a model, perhaps with a part of its files; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    files = (try_to_load_from_cache(model.name, name, revision=model.revision) for name in PLAIN_FILES)
    return next((Path(file).parent for file in files if isinstance(file, str)), None)


def _is_whole(folder: Path, *, weights: bool) -> bool:
    names = {path.name for path in folder.iterdir() if path.exists()}  # a link whose file has gone does not exist
    if missing_part(names, weights=weights):
        return False
    for index in folder.glob("*.index.json") if weights else ():
        if index.name in wanted_files(names, weights=True):
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
            return set(shards) <= names
    return True


def fetch(model: HubModel, field: str = "model.init_from", *, weights: bool = True) -> Path:
    """The folder of a model, which is downloaded into the user's cache of the hub unless it is there.

    The hub is not asked for a commit that the cache holds. Where it can't be asked, the cache's copy is taken, and a
    line says so.

    Args:
        field: names the option, for the messages.
        weights: false leaves the weights out: only the tokenizer is wanted.

    Raises:
        UserError: there is no such model or revision, it lacks a part, or it is neither there nor to be had.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    held = cached_folder(model)
    if held is not None and not _is_whole(held, weights=weights):
        held = None
    if held is not None and (model.is_pinned or constants.HF_HUB_OFFLINE):
        return held
    # of the HTTP library, which is not the same in all versions of huggingface_hub
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        return _download(model, field, weights)
    except (OSError, transport_error) as error:
        mistake = _explained(error, model, field)
        if held is None:
            raise mistake from error
        print(f"note: {mistake}; taken from the cache: {model.at(held)}", flush=True)
        return held


def _download(model: HubModel, field: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    info = HfApi().model_info(model.name, revision=model.revision, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
    names = [file.rfilename for file in info.siblings or ()]
    missing = missing_part(names, weights=weights)
    if missing:
        raise UserError(f"{field}: {str(model)!r} has no {missing} on the hub; give another model")
    files = wanted_files(names, weights=weights)
    return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=files))


def local_folder(text: str) -> Path:
    """The folder that model.init_from names; one of the hub's must be in the cache by now.

    Raises:
        UserError: it isn't.
    """
    model = hub_model(text)
    if model is None:
        return Path(text)
    folder = cached_folder(model)
    if folder is None:
        raise _absent(model, "model.init_from", "it is not in the cache")
    return folder


def _explained(error: Exception, model: HubModel, field: str) -> UserError:
    """Why a model couldn't be had, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{model.name}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{field}: {str(model)!r} asks for its terms to be accepted; do so at {page}, and hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"{field}: {str(model)!r} is no such folder here, nor a model at {page}; correct the path or the name, or "
            "run hf auth login if the model is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{field}: {str(model)!r} names a revision that {page} doesn't have; give a branch, tag or commit of it"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return _absent(model, field, "HF_HUB_OFFLINE forbids to ask the hub")
    reason = first_line(error)
    return _absent(model, field, f"{constants.ENDPOINT} did not give it ({reason})")


def _absent(model: HubModel, field: str, reason: str) -> UserError:
    from huggingface_hub import constants

    revision = f" --revision {model.revision}" if model.revision else ""
    folder = model.name.rpartition("/")[2]
    return UserError(
        f"{field}: {str(model)!r} is no such folder here, {constants.HF_HUB_CACHE} does not hold the whole model, and "
        f"{reason}; where there is network run hf download {model.name}{revision} --local-dir {folder}, copy that "
        f"folder here and give its path"
    )
