"""WordPiece: train a vocabulary, or load one, and what the rest of the pipeline asks of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: ids 0 to 4 of a trained vocabulary, in this order
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
MAX_ALPHABET = 1000
MIN_VOCAB_SIZE = 64
MIN_FREQUENCY = 2
#: text that quotes a special token; taken for one, it would be masked or end a segment
_LITERAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")
_UNUSED = re.compile(r"\[unused\d+\]")


@dataclass(frozen=True)
class Vocabulary:
    """A WordPiece tokenizer with BERT's special tokens.

    Open one with `load_tokenizer` or make one with `train_wordpiece`.
    """

    backend: Tokenizer
    lowercase: bool

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
    def id_dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def id_of(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        assert index is not None, token
        return index

    @property
    def pad_id(self) -> int:
        return self.id_of("[PAD]")

    @property
    def unk_id(self) -> int:
        return self.id_of("[UNK]")

    @property
    def cls_id(self) -> int:
        return self.id_of("[CLS]")

    @property
    def sep_id(self) -> int:
        return self.id_of("[SEP]")

    @property
    def mask_id(self) -> int:
        return self.id_of("[MASK]")

    @cached_property
    def regular_ids(self) -> NDArray[np.int64]:
        """Ids of real text pieces, ascending: no special token, no [unusedN]."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        excluded = added.union(SPECIAL_TOKENS, [""])
        regular = [i for i, token in enumerate(self.tokens) if token not in excluded and not _UNUSED.fullmatch(token)]
        return np.array(regular, dtype=np.int64)

    @cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """[vocab_size]: True where the piece continues the word before it (##...)."""
        return np.array([token.startswith(CONTINUES) and len(token) > 2 for token in self.tokens])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides how text becomes ids: vocabulary, special tokens, normaliser, splitter.

        Equal for every way of storing the same tokenizer; padding, truncation and templates don't count.
        """
        state = json.loads(self.backend.to_str())
        model = {key: state["model"].get(key) for key in ("type", "unk_token", "max_input_chars_per_word")}
        special = sorted(set(range(self.vocab_size)) - set(self.regular_ids.tolist()))
        content = [self.tokens, special, state["normalizer"], state["pre_tokenizer"], model]
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    @cached_property
    def added_tokens(self) -> list[str]:
        """The tokens that are found before the text is normalised and split, such as [MASK]."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    @cached_property
    def splits_at_spaces(self) -> bool:
        """True if the ids of a text are those of its space-separated words, as with BERT's own components.

        It also tells that the normaliser deletes control characters.
        """
        state = json.loads(self.backend.to_str())
        normalizer, splitter = state["normalizer"] or {}, state["pre_tokenizer"] or {}
        whole = all(token.isprintable() and " " not in token for token in self.added_tokens)
        cleaning = normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]
        return bool(whole and cleaning and splitter.get("type") == "BertPreTokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around them; a literal [MASK] in the text is three plain pieces."""
        return self.encode_with_special(unquote(texts))

    def encode_with_special(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, but special tokens in the texts are taken for such."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of the ids, word pieces joined."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that `AutoTokenizer.from_pretrained` opens offline."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")
        special = [self.tokens[i] for i in self.backend.get_added_tokens_decoder()]
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "additional_special_tokens": [token for token in special if token not in SPECIAL_TOKENS],
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def unquote(texts: Iterable[str]) -> list[str]:
    """The texts with quoted special tokens taken apart: [MASK] becomes [ MASK ]."""
    return [_LITERAL.sub(r"[ \1 ]", text) if "[" in text else text for text in texts]


def load_tokenizer(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """Open a vocab.txt, a tokenizer.json or a Hugging Face folder that holds either.

    Args:
        lowercase: casing of a bare vocab.txt, which doesn't tell; a tokenizer_config.json beside it wins.

    Raises:
        UserError: nothing there, an unreadable file, not WordPiece, or a missing special token.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer: {path} does not exist; give vocab.txt, tokenizer.json or a Hugging Face folder")
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"tokenizer: {path} has neither tokenizer.json nor vocab.txt; give another folder")
    options = _read_options(file.with_name("tokenizer_config.json"))
    lowercase = bool(options.get("do_lower_case", lowercase))
    if file.suffix == ".json":
        return _from_json(file)
    return _assemble(_read_vocab(file), lowercase, options.get("additional_special_tokens") or (), options)


def _read_options(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not JSON ({error}); get the file again") from error


def _read_vocab(path: Path) -> list[str]:
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer: {path} is not UTF-8 ({error.reason}); give a vocab.txt") from error
    tokens = tokens[:-1] if tokens[-1] == "" else tokens
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(f"tokenizer: {path} has {repeated[0]!r} more than once; give a vocab.txt, a token a line")
    _check_special(path, tokens)
    return tokens


def _from_json(path: Path) -> Vocabulary:
    from tokenizers import Tokenizer, models

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer: {path} is not a tokenizer.json ({error}); get the file again") from error
    if not isinstance(backend.model, models.WordPiece):
        raise UserError(f"tokenizer: {path} is {type(backend.model).__name__}, not WordPiece; give a BERT tokenizer")
    _check_special(path, backend.get_vocab())
    backend.no_padding()
    backend.no_truncation()
    normalizer = json.loads(backend.to_str())["normalizer"] or {}
    return Vocabulary(backend, bool(normalizer.get("lowercase", False)))


def _check_special(path: Path, tokens: Iterable[str]) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in set(tokens)]
    if missing:
        raise UserError(f"tokenizer: {path} lacks {', '.join(missing)}; give a BERT WordPiece vocabulary")


def train_wordpiece(
    documents: Iterable[str],
    out_dir: Path,
    vocab_size: int,
    lowercase: bool = True,
    special_tokens: Sequence[str] = (),
) -> Vocabulary:
    """Learn a WordPiece vocabulary with BERT's normaliser and splitter, and save it to `out_dir`.

    `documents` is read twice (characters, then words), so it is a list or another thing that starts anew.

    Ids: the five special tokens, `special_tokens`, single characters, ##characters, then pieces in the order
    in which they were learned. Equal documents give an equal vocabulary. It is smaller than `vocab_size` when
    the text has too few pieces that occur twice.

    Raises:
        UserError: the documents hold no text.
    """
    from tokenizers import trainers

    assert iter(documents) is not documents, "documents are read twice"
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size: {vocab_size} is too small; give at least {MIN_VOCAB_SIZE}")
    backend = _assemble([*SPECIAL_TOKENS, *special_tokens], lowercase).backend
    initial, continuing = _alphabet(documents, backend, min(MAX_ALPHABET, vocab_size // 4))
    # The trainer numbers characters in the order of a hash map with random seeds. Ids break ties between merges,
    # so they are fixed first: tokens given as special get theirs in the order given.
    fixed = [*SPECIAL_TOKENS, *special_tokens, *initial, *(CONTINUES + character for character in continuing)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=fixed,
        initial_alphabet=initial,
        limit_alphabet=len(initial),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    ids = backend.get_vocab(with_added_tokens=False)
    vocabulary = _assemble(sorted(ids, key=ids.__getitem__), lowercase, special_tokens)
    vocabulary.save(out_dir)
    return vocabulary


def _alphabet(documents: Iterable[str], backend: Tokenizer, limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters, and those of them that occur inside a word; both sorted."""
    characters: Counter[str] = Counter()
    chunks: set[str] = set()
    for document in documents:
        text = backend.normalizer.normalize_str(document)
        characters.update(text)
        chunks.update(text.split())
    ranked = sorted((-count, character) for character, count in characters.items() if not character.isspace())
    if not ranked:
        raise UserError("source: holds no text to learn a vocabulary from; give more text")
    initial = sorted(character for _, character in ranked[:limit])
    words = (word for chunk in chunks for word, _ in backend.pre_tokenizer.pre_tokenize_str(chunk))
    return initial, sorted({character for word in words for character in word[1:]}.intersection(initial))


def _assemble(
    tokens: Sequence[str], lowercase: bool, special_tokens: Sequence[str] = (), options: dict[str, Any] | None = None
) -> Vocabulary:
    """A BERT tokenizer of these tokens (id = position): normaliser, splitter, template, decoder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    options = options or {}
    ids = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    backend.decoder = decoders.WordPiece(prefix=CONTINUES)
    added = [*SPECIAL_TOKENS, *special_tokens]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return Vocabulary(backend, lowercase)
