"""The files of a Hugging Face tokenizer folder, read and checked: what each says, in one place.

transformers reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, tokenizer.json, vocab.txt and two
fields of config.json, and ignores much of what they may hold; here a value that isn't understood is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.tokenizer.vocabulary import NAMES, SPECIAL_TOKENS
from engine.errors import UserError
from engine.lfs import refuse_pointer

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
SERIALISED = "tokenizer.json"
WORDS = "vocab.txt"

#: fields of tokenizer_config.json and special_tokens_map.json that name a single token, in transformers' order
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: fields that list further special tokens; the first is transformers 5's name
LISTS = ("extra_special_tokens", "additional_special_tokens")
#: options of tokenizers that split text with other programs; any value but null means that ids can't be computed here
FOREIGN = (
    "word_tokenizer_type",
    "subword_tokenizer_type",
    "mecab_kwargs",
    "sudachi_kwargs",
    "jumanpp_kwargs",
    "spm_file",
    "sp_model_kwargs",
)
#: options of which only these values are supported, because the fast tokenizers ignore all others
FIXED: Mapping[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "do_word_tokenize": (True, None),
    "do_subword_tokenize": (True, None),
    "clean_text": (True, None),
    "wordpieces_prefix": ("##", None),
    "split_special_tokens": (False, None),
    "padding_side": ("right", None),
    "truncation_side": ("right", None),
}
#: a model_max_length above this means that there is no limit: transformers writes 10^30
NO_LENGTH = 1_000_000_000


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say; a file that is not there is empty, or None."""

    path: Path
    """what the user gave"""
    config: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, Any]
    model: dict[str, Any]
    """config.json of a model"""
    serialised: dict[str, Any] | None
    words: list[str] | None
    """the tokens of vocab.txt"""

    @property
    def is_wordpiece(self) -> bool:
        """Whether the tokens are WordPiece's."""
        return self.serialised is None or self.serialised["model"].get("type", "WordPiece") == "WordPiece"

    def named(self) -> dict[str, str]:
        """Every token that the files call special, and the file and field that do."""
        tokens: dict[str, str] = {}
        for file, content in ((CONFIG, self.config), (SPECIAL_MAP, self.special)):
            for field, token in _named(content):
                tokens.setdefault(token, f"{file}: {field}")
        return tokens


def read_files(path: Path) -> TokenizerFiles:
    """Read the folder, or the one file that was given and what lies beside it.

    Raises:
        UserError: nothing there, an unreadable file, or an option that isn't supported.
    """
    if not path.exists():
        raise UserError(f"tokenizer: {path} does not exist; give vocab.txt, tokenizer.json or a Hugging Face folder")
    folder = path if path.is_dir() else path.parent
    for file in (path, *(folder / name for name in (SERIALISED, WORDS, CONFIG, SPECIAL_MAP, ADDED))):
        refuse_pointer(file, "tokenizer")
    files = TokenizerFiles(
        path=path,
        config=_read_object(folder / CONFIG),
        special=_read_object(folder / SPECIAL_MAP),
        added=_read_object(folder / ADDED),
        model=_read_object(folder / "config.json"),
        serialised=_serialised(path),
        words=_words(path),
    )
    if files.serialised is None and files.words is None:
        raise UserError(
            f"tokenizer: {path} has neither tokenizer.json nor vocab.txt; give another folder, or write "
            "tokenizer.json there by AutoTokenizer's save_pretrained"
        )
    _check_options(files)
    if files.is_wordpiece:
        _check_names(files)
        _check_agreement(files)
    return files


def max_length(files: TokenizerFiles) -> int | None:
    """`model_max_length`, or `max_len` of old folders; None where the folder sets none."""
    field = "model_max_length" if files.config.get("model_max_length") is not None else "max_len"
    value = files.config.get(field)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= NO_LENGTH):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
        raise wrong(files, CONFIG, field, value, "give a whole number of tokens")
    return int(value)


def flag(files: TokenizerFiles, field: str) -> bool | None:
    """A switch of tokenizer_config.json; None where it isn't there or null."""
    value = files.config.get(field)
    if value is not None and not isinstance(value, bool):
        raise wrong(files, CONFIG, field, value, "give true or false")
    return value


def wrong(files: TokenizerFiles, file: str, field: str, value: object, remedy: str) -> UserError:
    """The error of a field whose value isn't supported."""
    return UserError(f"tokenizer: {files.path}: {field} {value!r} in {file} is not supported; {remedy}")


def content_of(token: object) -> str | None:
    """The text of a token that is written as a string or as an object; None for anything else."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def further_tokens(content: Mapping[str, Any]) -> list[Any]:
    """The entries of the first list of further special tokens that is not empty, strings or objects."""
    return next((_values(content[field]) for field in LISTS if content.get(field)), [])


def _values(listed: Any) -> list[Any]:
    """The tokens of a list, or of an object that gives them names."""
    return list(listed.values() if isinstance(listed, dict) else listed or [])


def _named(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field, value in content.items():
        if field.endswith("_token") and (token := content_of(value)) is not None:
            yield field, token
    for field in LISTS:
        for value in _values(content.get(field)):
            if (token := content_of(value)) is not None:
                yield field, token


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"tokenizer: {path} is not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"tokenizer: {path} is not a JSON object; get the file again")
    return content


def _serialised(path: Path) -> dict[str, Any] | None:
    from tokenizers import Tokenizer, models

    file = path / SERIALISED if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        return None
    try:
        model = Tokenizer.from_file(str(file)).model
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer: {file} is not a tokenizer.json ({error}); get the file again") from error
    if not isinstance(model, (models.WordPiece, models.BPE, models.Unigram)):
        raise UserError(f"tokenizer: {file} is {type(model).__name__}; give WordPiece, byte-level BPE or SentencePiece")
    return _read_object(file)


def _words(path: Path) -> list[str] | None:
    file = path / WORDS if path.is_dir() else path
    if not file.is_file() or file.suffix == ".json":
        return None
    try:
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer: {file} is not UTF-8 ({error.reason}); give a vocab.txt") from error
    # The tokenizers library strips the white space after a token.
    tokens = [line.rstrip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated and not (path / SERIALISED).is_file():
        what = repr(repeated[0]) if repeated[0] else "an empty line"
        raise UserError(f"tokenizer: {file} has {what} more than once; give a vocab.txt, a token a line")
    return tokens


def _check_options(files: TokenizerFiles) -> None:
    """Refuse options that would split text otherwise than BERT does."""
    remedy = "its ids can't be computed here; give a BERT WordPiece tokenizer"
    for field in FOREIGN:
        if files.config.get(field) is not None:
            raise wrong(files, CONFIG, field, files.config[field], remedy)
    code = files.config.get("auto_map")
    if code and (not isinstance(code, dict) or code.get("AutoTokenizer")):
        raise wrong(files, CONFIG, "auto_map", code, "it is code of its own, which is not run; " + remedy)
    for field, allowed in FIXED.items():
        if field in files.config and files.config[field] not in allowed:
            value = files.config[field]
            raise wrong(files, CONFIG, field, value, f"only {allowed[0]!r} is; correct it or give another tokenizer")
    never = files.config.get("never_split") or []
    for token in never if isinstance(never, list) else [never]:
        if content_of(token) not in SPECIAL_TOKENS and content_of(token) not in map(content_of, _listed(files)):
            raise wrong(files, CONFIG, "never_split", never, f"list {token!r} in additional_special_tokens instead")


def _listed(files: TokenizerFiles) -> list[Any]:
    return [*further_tokens(files.config), *further_tokens(files.special)]


def _check_names(files: TokenizerFiles) -> None:
    """BERT's five special tokens go by their own names; lists hold tokens."""
    for file, content in ((CONFIG, files.config), (SPECIAL_MAP, files.special)):
        for field, name in NAMES.items():
            if field in content and content_of(content[field]) != name:
                remedy = f"only {name} is; give a tokenizer with BERT's special tokens"
                raise wrong(files, file, field, content[field], remedy)
        for field in LISTS:
            listed = content.get(field)
            valid = listed is None or isinstance(listed, (list, dict))
            if not valid or not all(content_of(token) for token in _values(listed)):
                raise wrong(files, file, field, listed, "give a list of tokens")


def _check_agreement(files: TokenizerFiles) -> None:
    """Refuse a vocab.txt and a tokenizer.json that contradict each other, as when only one of them was edited."""
    if files.serialised is None or files.words is None:
        return
    ids = dict(files.serialised["model"]["vocab"])
    ids.update({token["content"]: token["id"] for token in files.serialised.get("added_tokens") or []})
    by_id = {index: token for token, index in ids.items()}
    for index, token in enumerate(files.words):
        other = by_id.get(index)
        if other is None or other.rstrip() != token:
            raise UserError(
                f"tokenizer: {files.path}: id {index} is {token!r} in vocab.txt and {other!r} in tokenizer.json; "
                "remove the file that is out of date"
            )
