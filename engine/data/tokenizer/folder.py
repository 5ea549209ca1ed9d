"""Hugging Face tokenizer folders -> `Vocabulary`, as transformers' AutoTokenizer would open them, without importing it.

Followed: transformers 5, `tokenization_utils_base.py` (`_from_pretrained`), `tokenization_utils_tokenizers.py` and
`models/bert/tokenization_bert.py`. A BertTokenizer is rebuilt from its tokens and the options in tokenizer_config.json,
whatever else tokenizer.json holds; a PreTrainedTokenizerFast is tokenizer.json. What they leave out silently is refused
here. `engine.data.tokenizer.check` compares the two on the user's own text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.tokenizer.files import (
    ADDED,
    CONFIG,
    NO_LENGTH,
    ROLES,
    SERIALISED,
    TokenizerFiles,
    content_of,
    flag,
    further_tokens,
    max_length,
    read_files,
    wrong,
)
from engine.data.tokenizer.subword import open_subword
from engine.data.tokenizer.vocabulary import (
    CONTINUES,
    MAX_WORD,
    SPECIAL_TOKENS,
    Vocabulary,
    bert_backend,
    normalizer_parts,
)
from engine.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

log = logging.getLogger(__name__)

#: classes that transformers 5 maps to BertTokenizer, or that only rename it; each also with "Fast"
BERT_CLASSES = (
    "BertTokenizer",
    "ConvBertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
)
#: classes that are tokenizer.json and nothing else
WHOLE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
#: models whose tokenizer is one of the above where no class is named
BERT_MODELS = (
    "bert",
    "convbert",
    "distilbert",
    "electra",
    "ernie",
    "layoutlm",
    "lxmert",
    "megatron-bert",
    "mobilebert",
    "nezha",
    "squeezebert",
)
#: options of BertTokenizer: what each is called in tokenizer.json's normaliser, and its default
OPTIONS = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def load_tokenizer(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """Open a vocab.txt, a tokenizer.json or a Hugging Face folder that holds either.

    Args:
        path: the file or folder.
        lowercase: whether to lowercase where no file tells it, as with a bare vocab.txt.

    Raises:
        UserError: nothing there, an unreadable file, not WordPiece, a missing special token, or settings that aren't
            supported or contradict each other.
    """
    files = read_files(Path(path))
    if not files.is_wordpiece:
        return open_subword(files)
    ids = _ids(files)
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(f"tokenizer: {path} lacks {', '.join(missing)}; give a BERT WordPiece vocabulary")
    backend = _whole(files) if _is_whole(files) else _rebuilt(files, ids, lowercase)
    _add(files, backend)
    backend.no_padding()
    backend.no_truncation()
    return Vocabulary(backend, max_length(files))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that `load_tokenizer` would open."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))


def with_max_length(config: dict[str, Any], positions: int) -> dict[str, Any]:
    """A tokenizer_config.json for a model with so many position embeddings: `model_max_length` is at most that.

    Without it transformers doesn't truncate, and a long text fails in the position embeddings.
    """
    given = config.get("model_max_length")
    given = config.get("max_len") if given is None else given
    limit = given if isinstance(given, (int, float)) and 1 <= given < NO_LENGTH else positions
    kept = {name: value for name, value in config.items() if name != "max_len"}
    return {**kept, "model_max_length": int(min(limit, positions))}


def _ids(files: TokenizerFiles) -> dict[str, int]:
    """The id of each token of the WordPiece model."""
    if files.serialised is None:
        assert files.words is not None
        return {token: index for index, token in enumerate(files.words)}
    return dict(files.serialised["model"]["vocab"])


def _is_whole(files: TokenizerFiles) -> bool:
    """Whether tokenizer.json is the tokenizer, rather than the tokens of a BertTokenizer.

    Raises:
        UserError: a class or a model whose tokenizer splits text in another way.
    """
    named = [(CONFIG, files.config.get("tokenizer_class")), ("config.json", files.model.get("tokenizer_class"))]
    classes = [(file, str(name)) for file, name in named if name is not None]
    for file, name in classes:
        if name.removesuffix("Fast") not in BERT_CLASSES and name not in WHOLE_CLASSES:
            remedy = "it cuts text in its own way; give a BERT WordPiece tokenizer (BertTokenizer, or a tokenizer.json)"
            raise wrong(files, file, "tokenizer_class", name, remedy)
    if classes:
        file, name = classes[0]
        if name in WHOLE_CLASSES and files.serialised is None:
            remedy = "it needs tokenizer.json; add that file, or write BertTokenizer if vocab.txt is all"
            raise wrong(files, file, "tokenizer_class", name, remedy)
        return name in WHOLE_CLASSES
    kind = files.model.get("model_type")
    if kind is not None and kind not in BERT_MODELS:
        raise wrong(files, "config.json", "model_type", kind, "give the tokenizer of a BERT")
    return kind is None and files.serialised is not None


def _whole(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer that tokenizer.json holds."""
    from tokenizers import Tokenizer

    assert files.serialised is not None
    backend = Tokenizer.from_str(json.dumps(files.serialised))
    model = files.serialised["model"]
    for field, wanted in (("continuing_subword_prefix", CONTINUES), ("unk_token", "[UNK]")):
        if model.get(field, wanted) != wanted:
            raise wrong(files, SERIALISED, field, model[field], f"only {wanted} is; give a BERT tokenizer")
    parts = normalizer_parts(files.serialised.get("normalizer"))
    berts = next((part for part in parts if part["type"] == "BertNormalizer"), None)
    lowers = any(part["type"] == "Lowercase" or part.get("lowercase", False) for part in parts)
    for field, (name, _) in OPTIONS.items():
        told = flag(files, field)
        holds = lowers if name == "lowercase" else None if berts is None else berts[name]
        holds = lowers if holds is None and name == "strip_accents" else holds
        if told is not None and holds is not None and told != holds:
            remedy = f"tokenizer.json, which is followed, says {name} {str(holds).lower()}; correct one of them"
            raise wrong(files, CONFIG, field, told, remedy)
    return backend


def _rebuilt(files: TokenizerFiles, ids: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's own components around the tokens, with the options of tokenizer_config.json."""
    told = {field: flag(files, field) for field in OPTIONS}
    default = lowercase if files.serialised is None else True
    values = {field: value for field, (_, value) in OPTIONS.items()} | {"do_lower_case": default}
    values |= {field: value for field, value in told.items() if value is not None}
    if files.serialised is not None:
        _check_components(files, values)
    lower, chinese = bool(values["do_lower_case"]), bool(values["tokenize_chinese_chars"])
    return bert_backend(ids, lower, values["strip_accents"], chinese)


def _check_components(files: TokenizerFiles, values: dict[str, bool | None]) -> None:
    """Refuse a tokenizer.json that is more than the tokens of a BertTokenizer, since transformers drops the rest."""
    content = files.serialised
    assert content is not None
    model, normalizer = content["model"], content.get("normalizer") or {}
    splitter = (content.get("pre_tokenizer") or {}).get("type")
    checks = (
        ("normalizer", normalizer.get("type"), "BertNormalizer"),
        ("clean_text", normalizer.get("clean_text", True), True),
        ("pre_tokenizer", splitter, "BertPreTokenizer"),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix", CONTINUES), CONTINUES),
        ("max_input_chars_per_word", model.get("max_input_chars_per_word", MAX_WORD), MAX_WORD),
        ("unk_token", model.get("unk_token", "[UNK]"), "[UNK]"),
    )
    for field, value, wanted in checks:
        if value != wanted:
            remedy = f"a BertTokenizer has {wanted!r}; to keep it, write PreTrainedTokenizerFast as tokenizer_class"
            raise wrong(files, SERIALISED, field, value, f"{remedy} to {CONFIG}")
    for field, (name, _) in OPTIONS.items():
        taken, held = values[field], normalizer.get(name)
        if taken == held or (name == "strip_accents" and held == values["do_lower_case"] and taken is None):
            continue
        if field not in files.config:
            remedy = f"a BertTokenizer takes {json.dumps(taken)} unless {CONFIG} says otherwise: write {field} there"
            raise wrong(files, SERIALISED, name, held, remedy)
        log.warning("%s: %s of %s wins over tokenizer.json, as in transformers", files.path, field, CONFIG)


def _add(files: TokenizerFiles, backend: Tokenizer) -> None:
    """Add the tokens that are found before the text is split, in transformers' order.

    Raises:
        UserError: a token gets another id than its file says, or is named and never added.
    """
    added = _numbered(files)
    known = {token.content for token in added.values()}
    known |= {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = [added[index] for index in sorted(added)]
    for token in _unnumbered(files, set(added)):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)
    for index, token in added.items():
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"tokenizer: {files.path}: {token.content!r} has id {index} in its files, where the vocabulary gives "
                f"it {backend.token_to_id(token.content)}; correct the ids in {ADDED} or {CONFIG}"
            )
    _check_complete(files, {token.content for token in backend.get_added_tokens_decoder().values()})


def _numbered(files: TokenizerFiles) -> dict[int, AddedToken]:
    """The added tokens that files give an id, by id: those of tokenizer_config.json, else those of older files."""
    if "added_tokens_decoder" in files.config:
        listed = files.config["added_tokens_decoder"]
        try:
            tokens = {int(index): _token(value, normalized=True, special=False) for index, value in listed.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise wrong(files, CONFIG, "added_tokens_decoder", listed, "give tokens by id") from error
    else:
        tokens = _numbered_of_old(files)
    for token in tokens.values():
        token.special = token.special or token.content in _role_tokens(files)
    return tokens


def _numbered_of_old(files: TokenizerFiles) -> dict[int, AddedToken]:
    """Those of added_tokens.json and tokenizer.json."""
    special = set(files.named())
    # transformers matches a token in the text before normalisation only where one of these fields names it.
    exact = _role_tokens(files).union(map(content_of, further_tokens(files.config)))
    exact.update(map(content_of, files.special.get("extra_special_tokens") or []))
    tokens = {}
    for content, index in files.added.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise wrong(files, ADDED, content, index, "give the id of the token")
        tokens[index] = _token(content, normalized=content not in exact, special=content in special)
    for value in (files.serialised or {}).get("added_tokens") or []:
        tokens[value["id"]] = _token(value, normalized=True, special=False)
    return tokens


def _role_tokens(files: TokenizerFiles) -> set[str | None]:
    """What the files name as a role: transformers takes such tokens for special."""
    contents = (content_of(source.get(field)) for source in (files.config, files.special) for field in ROLES)
    return {*SPECIAL_TOKENS, *(content for content in contents if content)}


def _unnumbered(files: TokenizerFiles, numbered: Iterable[int]) -> list[AddedToken]:
    """The tokens that files name without an id: roles, then further special tokens."""
    # transformers reads special_tokens_map.json only where tokenizer_config.json doesn't number its added tokens
    sources = [files.config] if "added_tokens_decoder" in files.config else [files.special, files.config]
    roles: list[Any] = list(SPECIAL_TOKENS)
    for field in ROLES:
        roles += [source[field] for source in sources if content_of(source.get(field)) is not None][:1]
    own = [
        value
        for source in sources
        for field, value in source.items()
        if field.endswith("_token") and field not in ROLES and content_of(value) is not None
    ]
    further = [token for source in sources for token in further_tokens(source)]
    return [_token(value, normalized=False, special=True) for value in (*roles, *own, *further)]


def _token(value: Any, *, normalized: bool, special: bool) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, normalized=normalized, special=special)
    flags = {name: bool(value[name]) for name in ("lstrip", "rstrip", "single_word") if name in value}
    special = bool(value.get("special", special))
    # the library's own default
    normalized = bool(value.get("normalized", not special))
    return AddedToken(value["content"], normalized=normalized, special=special, **flags)


def _check_complete(files: TokenizerFiles, added: set[str]) -> None:
    """Every token that any file calls special or added is one."""
    named = dict(files.named())
    named |= dict.fromkeys(files.added, ADDED)
    named |= {token["content"]: SERIALISED for token in (files.serialised or {}).get("added_tokens") or []}
    for token, place in named.items():
        if token not in added:
            raise UserError(
                f"tokenizer: {files.path}: {token!r} of {place} is not in added_tokens_decoder of {CONFIG}, so that "
                "transformers leaves it out; add it there, or remove it here"
            )
