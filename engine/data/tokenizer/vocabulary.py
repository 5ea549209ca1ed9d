"""A vocabulary with its special tokens, and the facts that the rest of the pipeline needs of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

#: ids 0 to 4 of a trained vocabulary, in this order
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: what transformers calls them
NAMES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
CONTINUES = "##"
#: characters of the longest word that WordPiece splits; a longer one is [UNK] (Devlin et al. 2019, tokenization.py)
MAX_WORD = 100
#: special tokens that a text quotes; taken for real ones, they would count as masked or end a segment
_LITERAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")
#: by the type of splitter, what begins a word: space, line break, tab and carriage return of byte-level BPE
_MARKS = {"ByteLevel": ("\u0120", "\u010a", "\u0109", "\u010d"), "Metaspace": ("\u2581",)}
_LINE_BREAK = re.compile(r"\s*\n\s*")
_UNUSED = re.compile(r"\[unused\d+\]")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with a special token for each role: WordPiece, byte-level BPE or SentencePiece.

    Open one with `load_tokenizer` or make one with `train_wordpiece`.
    """

    backend: Tokenizer
    max_length: int | None = None
    """tokens that its folder says a model of it takes (`model_max_length`); None where it says nothing"""
    names: Mapping[str, str] = field(default_factory=NAMES.copy)
    """the special token of each role: pad_token, unk_token, cls_token, sep_token, mask_token"""

    @cached_property
    def tokens(self) -> list[str]:
        """The token of each id; ids that the tokenizer leaves out are empty strings."""
        ids = self.backend.get_vocab(with_added_tokens=True)
        tokens = [""] * (max(ids.values()) + 1)
        for token, index in ids.items():
            tokens[index] = token
        return tokens

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def listed(self) -> int:
        """Tokens of the word list alone; tokens that were added later follow."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def id_dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def id_of(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        assert index is not None, token
        return index

    @property
    def pad_id(self) -> int:
        return self.id_of(self.names["pad_token"])

    @property
    def unk_id(self) -> int:
        return self.id_of(self.names["unk_token"])

    @property
    def cls_id(self) -> int:
        return self.id_of(self.names["cls_token"])

    @property
    def sep_id(self) -> int:
        return self.id_of(self.names["sep_token"])

    @property
    def mask_id(self) -> int:
        return self.id_of(self.names["mask_token"])

    @cached_property
    def regular_ids(self) -> NDArray[np.int64]:
        """Ids of ordinary word pieces, ascending: no special token, no [unusedN]."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        excluded = added.union(self.names.values(), [""])
        regular = [i for i, token in enumerate(self.tokens) if token not in excluded and not _UNUSED.fullmatch(token)]
        return np.array(regular, dtype=np.int64)

    @cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """[vocab_size] bool: true for pieces that continue a word: ##..., or without the mark of a word's beginning."""
        if not self.is_wordpiece:
            assert self.marker is not None
            named = set(self.names.values())
            return np.array([not token.startswith(self.marker) and token not in named for token in self.tokens])
        return np.array([token.startswith(CONTINUES) and len(token) > 2 for token in self.tokens])

    @cached_property
    def is_wordpiece(self) -> bool:
        """Whether words are cut by WordPiece."""
        return bool(self.components["model"].get("type", "WordPiece") == "WordPiece")

    @cached_property
    def marker(self) -> tuple[str, ...] | None:
        """What a word begins with: white space as bytes are written, or SentencePiece's; None where nothing tells."""
        splitters = _parts(self.components["pre_tokenizer"], "pretokenizers")
        found = [_MARKS[part["type"]] for part in splitters if part["type"] in _MARKS]
        return found[0] if found else None

    @cached_property
    def joint(self) -> str:
        """What stands before a sentence that follows another: byte-level pieces know a word by the space before it."""
        splitters = _parts(self.components["pre_tokenizer"], "pretokenizers")
        return " " if any(part["type"] == "ByteLevel" for part in splitters) else ""

    def joined(self, sentences: list[str]) -> list[str]:
        """A document's sentences as they are encoded: of pieces that see white space, each line break is one space."""
        if self.is_wordpiece:
            return sentences
        spaced = [join_lines(sentence) for sentence in sentences]
        return [*spaced[:1], *(self.joint + sentence for sentence in spaced[1:])]

    @cached_property
    def pair_frame(self) -> list[int] | None:
        """Ids of a pair of empty texts by the tokenizer's own template; None of WordPiece, which always gets BERT's."""
        return None if self.is_wordpiece else list(self.backend.encode("", "", add_special_tokens=True).ids)

    def text_of(self, index: int) -> str:
        """A token as people read it; of WordPiece as it is."""
        token = self.tokens[index]
        decoder = self.backend.decoder
        return token if self.is_wordpiece or decoder is None else decoder.decode([token]).strip()

    @cached_property
    def components(self) -> dict[str, Any]:
        """The serialised tokenizer without its vocabulary: normalizer, pre_tokenizer, model's options."""
        state = json.loads(self.backend.to_str())
        model = {name: value for name, value in state["model"].items() if name != "vocab"}
        return {"normalizer": state["normalizer"], "pre_tokenizer": state["pre_tokenizer"], "model": model}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides how text becomes ids: vocabulary, added tokens, normaliser, splitter.

        Equal for every way of storing the same tokenizer; padding, truncation and templates don't count.
        """
        parts = self.components
        if not self.is_wordpiece:
            state = json.loads(self.backend.to_str())
            rules = [state[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
            text = json.dumps([self.tokens, dict(self.names), *rules], sort_keys=True, ensure_ascii=True)
            return hashlib.sha256(text.encode()).hexdigest()
        model = {key: parts["model"].get(key) for key in ("type", "unk_token", "max_input_chars_per_word")}
        special = sorted(set(range(self.vocab_size)) - set(self.regular_ids.tolist()))
        content = [self.tokens, special, parts["normalizer"], parts["pre_tokenizer"], model]
        if unusual := self._unusual_added_tokens():
            content.append(unusual)
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def _unusual_added_tokens(self) -> list[dict[str, Any]]:
        """The added tokens that their ids alone don't describe: those with options of their own, and [unusedN]."""
        added = self.backend.get_added_tokens_decoder()
        described = [{"id": index, **describe_added(added[index])} for index in sorted(added)]
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        return [
            token
            for token in described
            if not token["special"] or _UNUSED.fullmatch(token["content"]) or any(token[flag] for flag in flags)
        ]

    @cached_property
    def added_tokens(self) -> list[str]:
        """The tokens that are found before the text is normalised and split, such as [MASK]."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    @cached_property
    def lowercase(self) -> bool:
        """Whether the normaliser lowercases the text."""
        return any(
            part["type"] == "Lowercase" or part.get("lowercase", False)
            for part in normalizer_parts(self.components["normalizer"])
        )

    @cached_property
    def is_berts(self) -> bool:
        """Whether BERT's own components around a list of tokens, as `bert_backend` sets them up, give the same ids."""
        if not self.is_wordpiece:
            return False
        parts, tokens = self.components, self.tokens
        normalizer, splitter, model = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}, parts["model"]
        usual = model["continuing_subword_prefix"] == CONTINUES and model["max_input_chars_per_word"] == MAX_WORD
        cleaning = normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]
        listed = all(token and token == token.rstrip() for token in tokens)
        return bool(usual and cleaning and splitter.get("type") == "BertPreTokenizer" and listed)

    @cached_property
    def splits_at_spaces(self) -> bool:
        """True if the ids of a text are those of its space-separated words, as with BERT's own components.

        It also tells that the normaliser deletes control characters.
        """
        normalizer, splitter = self.components["normalizer"] or {}, self.components["pre_tokenizer"] or {}
        whole = all(token.isprintable() and " " not in token for token in self.added_tokens)
        cleaning = normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]
        return bool(self.is_wordpiece and whole and cleaning and splitter.get("type") == "BertPreTokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around them; a literal [MASK] in the text is three plain pieces."""
        return self.encode_with_special(self.unquote(texts))

    def unquote(self, texts: Iterable[str]) -> list[str]:
        """The texts with quoted special tokens taken apart: [MASK] becomes [ MASK ], <mask> becomes < mask >."""
        if self.is_wordpiece:
            return unquote(texts)
        quoted = re.compile("|".join(map(re.escape, sorted(self.names.values(), key=len, reverse=True))))
        return [quoted.sub(lambda found: f"{found[0][0]} {found[0][1:-1]} {found[0][-1]}", text) for text in texts]

    def encode_with_special(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, but special tokens in the texts become their own ids."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of the ids, word pieces joined."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def with_special_tokens(self, tokens: Sequence[str]) -> Vocabulary:
        """The tokenizer with further special tokens: one that it knows keeps its id, others are appended in order.

        Raises:
            UserError: a token that can't be found in a text, or ids that would not follow the last one.
        """
        from tokenizers import AddedToken, Tokenizer

        check_special_tokens(tokens)
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        extended = Vocabulary(backend, self.max_length, self.names)
        new = [token for token in dict.fromkeys(tokens) if token not in set(self.tokens)]
        if extended.tokens != [*self.tokens, *new]:
            raise UserError(
                f"special_tokens: {', '.join(new)} can't follow the {self.vocab_size} ids of the tokenizer, which "
                "leaves some out; give one without gaps"
            )
        return extended

    def extends(self, base: Vocabulary) -> bool:
        """Whether this is `base`, or `base` with further special tokens: every id of `base` means the same here."""
        if self.fingerprint == base.fingerprint:
            return True
        added, known = self.backend.get_added_tokens_decoder(), base.backend.get_added_tokens_decoder()
        special = {token.content for token in known.values() if token.special}
        more = [added[index].content for index in sorted(added) if added[index].special]
        try:
            extended = base.with_special_tokens([token for token in more if token not in special])
        except UserError:
            return False
        return extended.fingerprint == self.fingerprint

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that `AutoTokenizer.from_pretrained` opens offline, with the same ids.

        transformers rebuilds a BertTokenizer from the options in tokenizer_config.json, so these are the normaliser's;
        a tokenizer with other components is declared as one that is read from tokenizer.json whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        if self.is_berts:
            (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")
        text = json.dumps(self._transformers_config(), indent=2, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _transformers_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        added = self.backend.get_added_tokens_decoder()
        further = [
            token.content for token in added.values() if token.special and token.content not in self.names.values()
        ]
        config: dict[str, Any] = {
            "tokenizer_class": "BertTokenizer" if self.is_berts else "PreTrainedTokenizerFast",
            "additional_special_tokens": further,
            "added_tokens_decoder": {str(index): describe_added(added[index]) for index in sorted(added)},
            **self.names,
        }
        if self.is_berts:
            normalizer = self.components["normalizer"]
            config["do_lower_case"] = normalizer["lowercase"]
            config["strip_accents"] = normalizer["strip_accents"]
            config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
        return config if self.max_length is None else {**config, "model_max_length": self.max_length}


def describe_added(token: AddedToken) -> dict[str, Any]:
    """An added token as Hugging Face's files hold it."""
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}


def normalizer_parts(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a serialised normaliser in order."""
    return _parts(normalizer, "normalizers")


def _parts(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a serialised component in order; a Sequence, whose list has the name, is flattened."""
    if component is None:
        return []
    if component.get("type") == "Sequence":
        return [part for inner in component[name] for part in _parts(inner, name)]
    return [component]


def check_special_tokens(tokens: Iterable[str]) -> None:
    """Raise a `UserError` for a special token that no text could hold, or that a word list can't."""
    for token in tokens:
        if not token or not token.isprintable() or token.split() != [token]:
            raise UserError(f"special_tokens: {token!r} is not allowed; give tokens without spaces, such as [DEID]")


def unquote(texts: Iterable[str]) -> list[str]:
    """The texts with quoted special tokens taken apart: [MASK] becomes [ MASK ]."""
    return [_LITERAL.sub(r"[ \1 ]", text) if "[" in text else text for text in texts]


def join_lines(text: str) -> str:
    """The text on one line: a line break, with the white space around it, is a space."""
    return _LINE_BREAK.sub(" ", text.strip())


def bert_template(ids: Mapping[str, int]) -> TemplateProcessing:
    """[CLS] and [SEP] around a text and behind each text of a pair, whose second one is segment 1."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )


def bert_backend(
    ids: dict[str, int], lowercase: bool = True, strip_accents: bool | None = None, chinese: bool = True
) -> Tokenizer:
    """BERT's tokenizer of these tokens: normaliser, splitter, template and decoder, as transformers' BertTokenizer.

    Args:
        ids: the id of each token, [CLS] and [SEP] among them.
        strip_accents: None strips them where the text is lowercased.
        chinese: put spaces around Chinese characters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = bert_template(ids)
    backend.decoder = decoders.WordPiece(prefix=CONTINUES)
    return backend
