"""WordPiece vocabularies: deterministic training, every way of loading, and agreement with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer

from engine.data.store.wordcache import WordCache
from engine.data.text.embedded import embedded_documents
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError

PROBES = ["Unbelievably, Héllo wörld!", "naïve 漢字 mixed-in\ttext 3.14", "[MASK] and [E1] stay whole", "", "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(embedded_documents()[:100], folder, 1500, special_tokens=["[E1]"])
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> Vocabulary:
    return load_tokenizer(folder)


def test_equal_documents_give_an_equal_vocabulary(tmp_path: Path) -> None:
    texts = embedded_documents()[:40]
    vocabularies = [train_wordpiece(texts, tmp_path, 800).tokens for _ in range(4)]
    assert all(tokens == vocabularies[0] for tokens in vocabularies)


def test_a_trained_vocabulary_has_the_size_asked_and_special_tokens_first(words: Vocabulary) -> None:
    assert words.vocab_size == 1500
    assert words.tokens[:6] == [*SPECIAL_TOKENS, "[E1]"]
    assert [words.pad_id, words.unk_id, words.cls_id, words.sep_id, words.mask_id] == [0, 1, 2, 3, 4]
    assert words.regular_ids.tolist() == list(range(6, 1500))


def test_casing_follows_the_option(tmp_path: Path) -> None:
    texts = ["Python likes Python. The python. " * 3]
    assert "python" in train_wordpiece(texts, tmp_path, 100).tokens
    cased = train_wordpiece(texts, tmp_path, 100, lowercase=False)
    assert "Python" in cased.tokens
    assert not load_tokenizer(tmp_path).lowercase


def test_continuing_pieces_are_marked(words: Vocabulary) -> None:
    ids = words.encode_batch(["unquestionableness"])[0]
    flags = words.continues_word[ids]
    assert words.continues_word.shape == (1500,)
    assert not flags[0]
    assert len(flags) > 1
    assert flags[1:].all()
    assert words.decode(ids) == "unquestionableness"


def test_transformers_opens_the_folder_and_encodes_the_same(folder: Path, words: Vocabulary) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(theirs) == words.vocab_size
    texts = [text for text in [*PROBES, *embedded_documents()[:20]] if "[MASK]" not in text]
    assert words.encode_batch(texts) == theirs(texts, add_special_tokens=False).input_ids
    pair = theirs("first text", "second")
    assert pair.input_ids == words.backend.encode("first text", "second").ids
    assert pair.token_type_ids == words.backend.encode("first text", "second").type_ids
    assert theirs.mask_token_id == words.mask_id


def test_every_way_of_loading_gives_the_same_tokenizer(folder: Path, words: Vocabulary, tmp_path: Path) -> None:
    loaded = [load_tokenizer(folder / name) for name in ("vocab.txt", "tokenizer.json")]
    words.save(tmp_path)
    loaded.append(load_tokenizer(tmp_path))
    for other in loaded:
        assert other.fingerprint == words.fingerprint
        assert other.encode_batch(PROBES) == words.encode_batch(PROBES)


def test_the_fingerprint_tells_casing_and_vocabulary_apart(folder: Path, words: Vocabulary, tmp_path: Path) -> None:
    bare = tmp_path / "vocab.txt"
    bare.write_bytes((folder / "vocab.txt").read_bytes().replace(b"\nthe\n", b"\neht\n"))
    prints = {load_tokenizer(bare).fingerprint, load_tokenizer(bare, lowercase=False).fingerprint, words.fingerprint}
    assert len(prints) == 3


def test_padding_and_truncation_of_a_loaded_tokenizer_are_off(words: Vocabulary, tmp_path: Path) -> None:
    words.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_batch(["one two three four five six"]) == words.encode_batch(["one two three four five six"])
    assert loaded.fingerprint == words.fingerprint


def test_unused_tokens_are_not_regular(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[unused0]", *SPECIAL_TOKENS[1:], "a", "##a"]) + "\n")
    words = load_tokenizer(tmp_path / "vocab.txt")
    np.testing.assert_array_equal(words.regular_ids, [6, 7])
    assert words.unk_id == 2


def test_text_without_enough_pieces_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    assert train_wordpiece(["ab ab"], tmp_path, 500).tokens == [*SPECIAL_TOKENS, "a", "b", "##b", "ab"]


def test_text_without_words_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text to learn a vocabulary"):
        train_wordpiece([" ", "\n"], tmp_path, 500)
    with pytest.raises(UserError, match="vocab_size: 10 is too small"):
        train_wordpiece(["some text"], tmp_path, 10)


def looked_up(cache: WordCache, texts: list[str]) -> list[list[int]]:
    encoded = cache.encode(texts)
    assert len(encoded.lengths) == len(texts)
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths))[:-1]]


ODD = "aé\u0301 \t\n\0\1\x0b\x0c\x1c\x85\u00a0\u2028\u3000\u200b\ufffd漢.,()\"'[]MASKE1#"


@hypothesis.given(st.lists(st.text(alphabet=st.sampled_from(ODD), max_size=40), min_size=1, max_size=3))
@hypothesis.settings(max_examples=300, deadline=None)
def test_looking_words_up_encodes_as_the_tokenizer_does(words: Vocabulary, found: list[str]) -> None:
    texts = [*found, f"[MASK] {found[0]} [E1]", ""]
    cache = WordCache(words)
    assert looked_up(cache, texts) == words.encode_batch(texts)
    assert looked_up(cache, texts) == words.encode_batch(texts)


def variant(words: Vocabulary, added: str | None = None, **normalizer: object) -> Vocabulary:
    """The tokenizer with another added token and other options of its normaliser."""
    state = json.loads(words.backend.to_str())
    state["normalizer"].update(normalizer)
    backend = Tokenizer.from_str(json.dumps(state))
    if added is not None:
        backend.add_tokens([AddedToken(added, normalized=True)])
    return Vocabulary(backend)


VARIANTS: dict[str, tuple[str | None, dict[str, object]]] = {
    "cased": (None, {"lowercase": False}),
    "accents kept": (None, {"lowercase": False, "strip_accents": False}),
    "control characters kept": (None, {"clean_text": False}),
    "a token with punctuation": ("e.g.", {}),
    "a token within words": ("ab", {}),
    "a token with a control character": ("a\x1cb", {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_tokenizers_are_looked_up_alike(words: Vocabulary, name: str) -> None:
    other = variant(words, VARIANTS[name][0], **VARIANTS[name][1])
    texts = ["Say, e.g. (this), cab Ab. é.\u0301 ab", 'a\x1cb "c\x0cd\x85" \0 e\0f', *embedded_documents()[:3]]
    cache = WordCache(other)
    for _ in range(2):
        assert looked_up(cache, texts) == other.encode_batch(texts)


def test_a_text_that_turns_into_sep_is_no_end_of_a_word(words: Vocabulary) -> None:
    """[SEP] is found in the normalised text too where a tokenizer says so; then words are encoded one by one."""
    state = json.loads(words.backend.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = True
    other = Vocabulary(Tokenizer.from_str(json.dumps(state)))
    texts = ["some [sep] text, [Sep]", "more"]
    assert other.sep_id in other.encode_batch(texts)[0]
    assert looked_up(WordCache(other), texts) == other.encode_batch(texts)


def test_ids_have_the_narrowest_type(words: Vocabulary) -> None:
    assert WordCache(words).encode(["some text"]).ids.dtype == np.uint16
    large = Tokenizer.from_str(words.backend.to_str())
    large.add_tokens([f"token{number}" for number in range(1 << 16)])
    encoded = WordCache(Vocabulary(large)).encode(["token65535"])
    assert encoded.ids.dtype == np.uint32
    assert encoded.ids.tolist() == [words.vocab_size + (1 << 16) - 1]


def test_a_full_word_cache_still_encodes_new_words(words: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.store.wordcache.CACHED_WORDS", 50)
    cache = WordCache(words)
    for text in embedded_documents()[:5] * 2:
        assert looked_up(cache, [text]) == words.encode_batch([text])


def test_words_are_not_looked_up_where_a_token_spans_a_space(words: Vocabulary) -> None:
    other = Tokenizer.from_str(words.backend.to_str())
    other.add_special_tokens(["[TWO WORDS]"])
    spanning = Vocabulary(other)
    assert words.splits_at_spaces
    assert not spanning.splits_at_spaces
    assert looked_up(WordCache(spanning), ["a [TWO WORDS] b"]) == spanning.encode_batch(["a [TWO WORDS] b"])


BAD = {
    "vocab.txt": {
        "lacks [MASK]": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n",
        "has 'a' more than once": "\n".join([*SPECIAL_TOKENS, "a", "a"]),
    },
    "tokenizer.json": {
        "is not a tokenizer.json": "{",
        "has no pad_token ('<pad>')": json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
        ),
    },
}


@pytest.mark.parametrize(("name", "message"), [(name, message) for name, cases in BAD.items() for message in cases])
def test_a_bad_tokenizer_file_is_a_user_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text(BAD[name][message])
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)


def test_a_missing_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)


def test_a_special_token_quoted_in_the_text_is_plain_text(words: Vocabulary) -> None:
    (quoted,) = words.encode_batch(["the [MASK] and [SEP]"])
    assert set(quoted).issubset([*words.regular_ids.tolist(), words.unk_id])
    assert quoted == words.encode_batch(["the [ MASK ] and [ SEP ]"])[0]
    assert looked_up(WordCache(words), ["the [MASK] and [SEP]"]) == [quoted]
