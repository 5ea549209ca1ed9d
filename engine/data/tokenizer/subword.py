"""Byte-level BPE and SentencePiece tokenizers of Hugging Face folders: tokenizer.json whole.

`engine.data.tokenizer.check` compares it with what transformers' class makes of the folder.
"""

from __future__ import annotations

import json

from engine.data.tokenizer.files import CONFIG, SERIALISED, TokenizerFiles, content_of, max_length, wrong
from engine.data.tokenizer.vocabulary import NAMES, Vocabulary
from engine.errors import UserError

#: classes of transformers, each also with "Fast", that are a tokenizer.json or rebuild it with the same ids
CLASSES = ("RobertaTokenizer", "XLMRobertaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
#: special tokens by role where no file names them: RoBERTa's
ROBERTA_NAMES = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def open_subword(files: TokenizerFiles) -> Vocabulary:
    """The tokenizer of a tokenizer.json that isn't WordPiece.

    Raises:
        UserError: another kind of tokenizer, a role without a token, or a template that doesn't frame texts.
    """
    from tokenizers import Tokenizer

    assert files.serialised is not None
    named = files.config.get("tokenizer_class")
    if named is not None and str(named).removesuffix("Fast") not in CLASSES:
        raise wrong(files, CONFIG, "tokenizer_class", named, f"give one of {', '.join(CLASSES)}")
    if dropout := files.serialised["model"].get("dropout"):
        raise wrong(files, SERIALISED, "dropout", dropout, "ids would be random; write null there")
    backend = Tokenizer.from_str(json.dumps(files.serialised))
    backend.no_padding()
    backend.no_truncation()
    vocabulary = Vocabulary(backend, max_length(files), _names(files, backend.get_vocab(with_added_tokens=True)))
    if vocabulary.marker is None:
        remedy = "give WordPiece, byte-level BPE or SentencePiece, which tell where words begin"
        raise wrong(files, SERIALISED, "pre_tokenizer", _kind(files), remedy)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token, place in files.named().items():
        if token not in added:
            raise UserError(f"tokenizer: {files.path}: {token!r} of {place} is not in {SERIALISED}; add it there")
    frame = backend.encode("", add_special_tokens=True).ids
    if frame != [vocabulary.cls_id, vocabulary.sep_id]:
        remedy = f"a text must stand between {vocabulary.names['cls_token']} and {vocabulary.names['sep_token']}"
        raise wrong(files, SERIALISED, "post_processor", [vocabulary.tokens[index] for index in frame], remedy)
    return vocabulary


def _names(files: TokenizerFiles, ids: dict[str, int]) -> dict[str, str]:
    """The special token of each role: as the files name it, else RoBERTa's."""
    names = {}
    for role in NAMES:
        given = content_of(files.config.get(role)) or content_of(files.special.get(role))
        token = given or ROBERTA_NAMES[role]
        if token not in ids or len(token) < 3:
            raise UserError(
                f"tokenizer: {files.path} has no {role} ({token!r}); give the tokenizer of a masked language model"
            )
        names[role] = token
    return names


def _kind(files: TokenizerFiles) -> object:
    return ((files.serialised or {}).get("pre_tokenizer") or {}).get("type")
