"""How an encoder's states become one vector of a text, in the files by which sentence-transformers knows it.

A configuration keeps it as `sentence_embedding`, an object in config.json: "pooling", "normalize" (whether vectors have
length 1) and "max_length" (tokens of a text). Beside it an export has the files of Reimers and Gurevych's library: the
modules that it runs one after the other (modules.json), the pooling of the second, and the length of the first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from engine.config.data import Pooling
from engine.errors import UserError

FIELD = "sentence_embedding"
MODULES_FILE, TRANSFORMER_FILE, PROMPTS_FILE = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
POOLING_FOLDER, POOLING_FILE = "1_Pooling", "1_Pooling/config.json"
#: what an export has beside a model's files
SENTENCE_FILES = (MODULES_FILE, TRANSFORMER_FILE, PROMPTS_FILE, POOLING_FILE)
#: what files of releases before 6 call the ways of pooling
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class SentenceConfig:
    """How states become a vector."""

    pooling: Pooling = "mean"
    normalize: bool = True
    """whether vectors have length 1"""
    max_length: int | None = None
    """tokens of a text; None where only the positions bound them"""

    def put_into(self, config: Any) -> None:
        """Keep it in a transformers configuration."""
        setattr(config, FIELD, asdict(self))


def pooling_of(config: Any) -> Pooling:
    """The pooling that a configuration keeps."""
    values = getattr(config, FIELD, None) or {}
    pooling: Pooling = values.get("pooling", SentenceConfig.pooling)
    return pooling


def sentence_files(config: Any) -> dict[str, bytes]:
    """The files of sentence-transformers for a model whose configuration tells of embeddings; none of another.

    They are of the form that all of its releases read.
    """
    values = getattr(config, FIELD, None)
    if values is None:
        return {}
    kinds = [("", "Transformer"), (POOLING_FOLDER, "Pooling")]
    kinds += [("2_Normalize", "Normalize")] if values["normalize"] else []
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    flags = {flag: mode == values["pooling"] for mode, flag in FLAGS.items()}
    contents = {
        MODULES_FILE: modules,
        TRANSFORMER_FILE: {"max_seq_length": values["max_length"], "do_lower_case": False},
        PROMPTS_FILE: {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        POOLING_FILE: {"word_embedding_dimension": config.hidden_size, **flags},
    }
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in contents.items()}


def read_sentence_config(folder: Path) -> SentenceConfig | None:
    """What the files of sentence-transformers in a folder say; None where it has none.

    Raises:
        UserError: a file is damaged, or asks for what our modules don't compute; names it.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return None
    modules = _read(path, list)
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules if isinstance(each, dict)]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        shown = ", ".join(kinds) or "none"
        raise UserError(f"{path}: modules {shown} are not supported; give a model of Transformer, Pooling, Normalize")
    if modules[0].get("path"):
        raise UserError(f"{path}: the encoder is in {modules[0]['path']!r}; give a model with its files in {folder}")
    length = _check_transformer(folder)
    return SentenceConfig(_pooling(folder / str(modules[1].get("path")) / "config.json"), len(kinds) > 2, length)


def _check_transformer(folder: Path) -> int | None:
    """The tokens of a text; refuses what would change texts before they are encoded."""
    own, prompts = (
        _read(folder / name, dict) if (folder / name).is_file() else {} for name in (TRANSFORMER_FILE, PROMPTS_FILE)
    )
    if own.get("do_lower_case"):
        remedy = "put false there where its tokenizer makes lower case by itself, and else give another model"
        raise UserError(f"{folder / TRANSFORMER_FILE}: do_lower_case true is not supported; {remedy}")
    name = prompts.get("default_prompt_name")
    if name is not None and (prompts.get("prompts") or {}).get(name):
        remedy = "put null there, and the prompt before your texts"
        raise UserError(f"{folder / PROMPTS_FILE}: default_prompt_name {name!r} is not supported; {remedy}")
    length = own.get("max_seq_length")
    return length if isinstance(length, int) else None


def _pooling(path: Path) -> Pooling:
    values = _read(path, dict)
    named = values.get("pooling_mode") or [mode for mode, flag in FLAGS.items() if values.get(flag)] or ["mean"]
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in get_args(Pooling):
        shown = " + ".join(map(str, modes))
        raise UserError(f"{path}: pooling {shown!r} is not supported; give a model that pools by mean or cls")
    return cast(Pooling, modes[0])


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from error
    if not isinstance(values, kind):
        raise UserError(f"{path}: not a JSON {'list' if kind is list else 'object'}; copy the file again")
    return values
