"""Hugging Face tokenizer folders: what each file says is obeyed as AutoTokenizer does, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from engine.data.tokenizer.check import check_texts, check_vocabulary, open_with_transformers
from engine.data.tokenizer.folder import has_tokenizer, with_max_length
from engine.data.tokenizer.vocabulary import bert_backend
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, Vocabulary, load_tokenizer
from engine.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDHIJTöéß今日.,![]"
WORDS = [*LETTERS, *("##" + letter for letter in LETTERS), "hello", "Hello", "möchte", "mochte", "今日", "john"]
TOKENS = [*SPECIAL_TOKENS, *WORDS]
PROBES = [
    "Hello möchte MÖCHTE mochte.",
    "今日 今x日",
    "Hello[DEID], a [deid] jOhN john. <s> ab",
    "e\u0301 tab\there\x01, " + "a" * 120,
    "Hello John, hello.John!",
]


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def serialised(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of the tokens, as the tokenizers library writes it, with other options of the normaliser."""
    vocabulary = Vocabulary(bert_backend({token: index for index, token in enumerate(TOKENS)}))
    state: dict[str, Any] = json.loads(vocabulary.with_special_tokens(SPECIAL_TOKENS).backend.to_str())
    state["normalizer"].update(changes)
    return state


def make(folder: Path, files: dict[str, object]) -> Path:
    """A folder of a BERT (config.json) with these tokenizer files."""
    write(folder, "config.json", {"model_type": "bert"})
    for name, content in files.items():
        write(folder, name, content)
    return folder


def txt(*more: str) -> str:
    return "".join(f"{token}\n" for token in [*TOKENS, *more])


def added(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | flags


CONFIG, MAP, ADDED, JSON, TXT = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.txt",
)
N = len(TOKENS)

#: files that AutoTokenizer opens, and what is obeyed of them
OBEYED: dict[str, dict[str, object]] = {
    "a word list alone": {TXT: txt()},
    "windows line ends": {TXT: txt().replace("\n", "\r\n")},
    "white space after a token": {TXT: txt().replace("\nhello\n", "\nhello  \n")},
    "cased": {TXT: txt(), CONFIG: {"do_lower_case": False}},
    "accents kept": {TXT: txt(), CONFIG: {"tokenizer_class": "BertTokenizer", "strip_accents": False}},
    "accents stripped, case kept": {TXT: txt(), CONFIG: {"do_lower_case": False, "strip_accents": True}},
    "Chinese not split": {TXT: txt(), CONFIG: {"tokenize_chinese_chars": False}},
    "tokenizer.json and its options": {
        JSON: serialised(lowercase=False, strip_accents=False),
        CONFIG: {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False, "strip_accents": False},
    },
    "tokenizer.json with explicit accents": {JSON: serialised(strip_accents=True)},
    "options against tokenizer.json": {
        JSON: serialised(),
        CONFIG: {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    },
    "all options against tokenizer.json": {
        JSON: serialised(),
        CONFIG: {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    },
    "tokenizer.json whole": {
        JSON: serialised(lowercase=False, handle_chinese_chars=False),
        CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    },
    "transformers 5's name": {JSON: serialised(strip_accents=False), CONFIG: {"tokenizer_class": "TokenizersBackend"}},
    "an Electra": {TXT: txt(), CONFIG: {"tokenizer_class": "ElectraTokenizerFast"}},
    "a DistilBERT": {TXT: txt(), CONFIG: {"tokenizer_class": "DistilBertTokenizer"}},
    "slow options at their defaults": {TXT: txt(), CONFIG: {"do_basic_tokenize": True, "never_split": None}},
    "the five names again": {
        TXT: txt(),
        CONFIG: {"mask_token": added("[MASK]", lstrip=True) | {"__type": "AddedToken"}, "unk_token": "[UNK]"},
        MAP: {"pad_token": "[PAD]", "cls_token": added("[CLS]")},
    },
    "additional_special_tokens": {TXT: txt("[DEID]"), CONFIG: {"additional_special_tokens": ["[DEID]"]}},
    "additional_special_tokens not in the list": {TXT: txt(), CONFIG: {"additional_special_tokens": ["[DEID]", "<s>"]}},
    "extra_special_tokens": {TXT: txt(), CONFIG: {"extra_special_tokens": ["[DEID]"]}},
    "extra_special_tokens by name": {TXT: txt(), CONFIG: {"extra_special_tokens": {"deid_token": "[DEID]"}}},
    "special_tokens_map": {TXT: txt(), MAP: {"additional_special_tokens": ["[DEID]", "<s>"]}},
    "a beginning of its own": {TXT: txt(), CONFIG: {"bos_token": "<s>", "eos_token": "[SEP]"}},
    "added_tokens": {TXT: txt(), ADDED: {"[DEID]": N, "john": TOKENS.index("john"), "<s>": N + 1}},
    "added_tokens, one special": {
        TXT: txt(),
        ADDED: {"[DEID]": N, "<s>": N + 1},
        MAP: {"additional_special_tokens": ["[DEID]"]},
    },
    "added_tokens_decoder": {
        TXT: txt(),
        CONFIG: {
            "added_tokens_decoder": {
                str(N): added("[DEID]", special=True),
                str(N + 1): added("John", normalized=True, special=False, single_word=True),
            }
        },
    },
    "added tokens of tokenizer.json": {
        JSON: serialised() | {"added_tokens": [{"id": N, **added("[DEID]", special=True)}]}
    },
    "a whole tokenizer.json with a token more": {
        JSON: serialised(),
        CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["[DEID]"]},
    },
    "word list and tokenizer.json": {TXT: txt(), JSON: serialised()},
    "a length": {TXT: txt(), CONFIG: {"model_max_length": 48}},
    "an old length": {TXT: txt(), CONFIG: {"max_len": 48}},
    "no length": {TXT: txt(), CONFIG: {"model_max_length": int(1e30)}},
}


@pytest.mark.parametrize("name", OBEYED)
def test_what_a_folder_says_is_obeyed_as_transformers_does(tmp_path: Path, name: str) -> None:
    """Before and after saving, with tokenizer.json and, as transformers rebuilds it, from the word list alone."""
    folder = make(tmp_path / "given", OBEYED[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = theirs(PROBES, add_special_tokens=False)["input_ids"]
    ours = load_tokenizer(folder)
    assert ours.encode_with_special(PROBES) == expected
    check_vocabulary(ours, theirs, folder)
    assert (ours.max_length or int(1e30)) == theirs.model_max_length

    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    for removed in (None, JSON) if ours.is_berts else (None,):
        if removed:
            (tmp_path / "saved" / removed).unlink()
            write(tmp_path / "saved", "config.json", {"model_type": "bert"})
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
        assert again(PROBES, add_special_tokens=False)["input_ids"] == expected
        assert again.model_max_length == theirs.model_max_length
        check_vocabulary(ours, again, tmp_path / "saved")


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "KoBERT": (
        {TXT: txt(), CONFIG: {"tokenizer_class": "KoBertTokenizer"}},
        "tokenizer_class 'KoBertTokenizer' in tok",
    ),
    "Japanese": ({TXT: txt(), CONFIG: {"tokenizer_class": "BertJapaneseTokenizer"}}, "tokenizer_class 'BertJapanese"),
    "Japanese in config.json": (
        {TXT: txt(), "config.json": {"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"}},
        "tokenizer_class 'BertJapaneseTokenizer' in config.json",
    ),
    "a word splitter": ({TXT: txt(), CONFIG: {"word_tokenizer_type": "mecab"}}, "word_tokenizer_type 'mecab'"),
    "characters": ({TXT: txt(), CONFIG: {"subword_tokenizer_type": "character"}}, "subword_tokenizer_type 'character'"),
    "code": ({TXT: txt(), CONFIG: {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, "auto_map {'AutoTokenizer'"),
    "old code": ({TXT: txt(), CONFIG: {"auto_map": ["a.B", None]}}, "auto_map ['a.B', None]"),
    "another model": ({TXT: txt(), "config.json": {"model_type": "roformer"}}, "model_type 'roformer'"),
    "no basic tokenization": ({TXT: txt(), CONFIG: {"do_basic_tokenize": False}}, "do_basic_tokenize False"),
    "never split": ({TXT: txt(), CONFIG: {"never_split": ["[DEID]"]}}, "never_split ['[DEID]']"),
    "special tokens split": ({TXT: txt(), CONFIG: {"split_special_tokens": True}}, "split_special_tokens True"),
    "left padding": ({TXT: txt(), CONFIG: {"padding_side": "left"}}, "padding_side 'left'"),
    "left truncation": ({TXT: txt(), CONFIG: {"truncation_side": "left"}}, "truncation_side 'left'"),
    "a switch in quotes": ({TXT: txt(), CONFIG: {"do_lower_case": "false"}}, "do_lower_case 'false'"),
    "a length in words": ({TXT: txt(), CONFIG: {"model_max_length": "512"}}, "model_max_length '512'"),
    "no length at all": ({TXT: txt(), CONFIG: {"model_max_length": 0}}, "model_max_length 0"),
    "another mask": ({TXT: txt("<mask>"), CONFIG: {"mask_token": "<mask>"}}, "mask_token '<mask>' in tokenizer_config"),
    "another mask in the map": (
        {TXT: txt("<m>"), MAP: {"mask_token": "<m>"}},
        "mask_token '<m>' in special_tokens_map",
    ),
    "no padding token": ({TXT: txt(), CONFIG: {"pad_token": None}}, "pad_token None"),
    "special tokens that are no list": (
        {TXT: txt(), CONFIG: {"additional_special_tokens": "[A]"}},
        "give a list of to",
    ),
    "tokenizer.json missing": (
        {TXT: txt(), CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}},
        "tokenizer_class 'PreTrainedTokenizerFast' in tokenizer_config.json is not supported; it needs tokenizer.json",
    ),
    "cased without saying so": ({JSON: serialised(lowercase=False)}, "write do_lower_case there"),
    "accents without saying so": ({JSON: serialised(strip_accents=False)}, "write strip_accents there"),
    "Chinese without saying so": ({JSON: serialised(handle_chinese_chars=False)}, "write tokenize_chinese_chars there"),
    "whole, and another casing": (
        {JSON: serialised(), CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}},
        "do_lower_case False in tokenizer_config.json is not supported; tokenizer.json, which is followed, says lower",
    ),
    "whole, and other accents": (
        {JSON: serialised(), CONFIG: {"tokenizer_class": "TokenizersBackend", "strip_accents": False}},
        "says strip_accents true",
    ),
    "another splitter": (
        {JSON: serialised() | {"pre_tokenizer": {"type": "Whitespace"}}},
        "pre_tokenizer 'Whitespace' in tokenizer.json is not supported; a BertTokenizer has 'BertPreTokenizer'; to",
    ),
    "no normaliser": ({JSON: serialised() | {"normalizer": None}}, "normalizer None in tokenizer.json"),
    "another prefix": (
        {JSON: {**serialised(), "model": {**serialised()["model"], "continuing_subword_prefix": "@@"}}},
        "continuing_subword_prefix '@@'",
    ),
    "an id that the list doesn't give": (
        {TXT: txt(), ADDED: {"[DEID]": N + 5}},
        f"'[DEID]' has id {N + 5} in its files",
    ),
    "a known token under another id": ({TXT: txt(), ADDED: {"john": N}}, f"'john' has id {N} in its files"),
    "an id that is none": ({TXT: txt(), ADDED: {"[DEID]": "last"}}, "[DEID] 'last' in added_tokens.json"),
    "a token that is left out": (
        {TXT: txt(), CONFIG: {"added_tokens_decoder": {}}, MAP: {"additional_special_tokens": ["[DEID]"]}},
        "'[DEID]' of special_tokens_map.json: additional_special_tokens is not in added_tokens_decoder",
    ),
    "an edited word list": (
        {TXT: txt().replace("\nhello\n", "\n[DEID]\n"), JSON: serialised()},
        "is '[DEID]' in vocab.txt and 'hello' in tokenizer.json; remove the file that is out of date",
    ),
    "a longer word list": ({TXT: txt("[DEID]"), JSON: serialised()}, f"id {N} is '[DEID]' in vocab.txt and None"),
    "a list for an object": ({TXT: txt(), CONFIG: []}, "tokenizer_config.json is not a JSON object"),
    "no JSON": ({TXT: txt(), MAP: "{"}, "special_tokens_map.json is not JSON"),
    "empty lines": ({TXT: txt("", "")}, "has an empty line more than once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_obeyed_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    files, message = REFUSED[name]
    folder = make(tmp_path / "given", files)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"tokenizer: {folder}")


def test_a_tokenizer_with_other_components_is_saved_whole(tmp_path: Path) -> None:
    """transformers would rebuild a BertTokenizer without them."""
    backend = Tokenizer.from_str(json.dumps(serialised()))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ours = Vocabulary(backend)
    assert ours.lowercase
    assert not ours.is_berts
    ours.save(tmp_path)
    assert not (tmp_path / TXT).exists()
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    theirs = open_with_transformers(tmp_path)
    check_vocabulary(ours, theirs, tmp_path)
    check_texts(ours, theirs, tmp_path, PROBES)


def test_an_option_that_wins_over_tokenizer_json_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(make(tmp_path / "given", OBEYED["options against tokenizer.json"]))
    assert "do_lower_case of tokenizer_config.json wins over tokenizer.json" in caplog.text


def test_a_casing_option_is_for_word_lists_beside_which_nothing_tells(tmp_path: Path) -> None:
    bare = make(tmp_path / "bare", {TXT: txt()})
    assert not load_tokenizer(bare, lowercase=False).lowercase
    told = make(tmp_path / "told", OBEYED["cased"])
    assert not load_tokenizer(told, lowercase=True).lowercase


def test_tokens_are_appended_and_known_ones_keep_their_ids(tmp_path: Path) -> None:
    ours = load_tokenizer(make(tmp_path / "given", {TXT: txt("[unused1]")}))
    more = ours.with_special_tokens(["[DEID]", "[unused1]", "[CLS]", "[NAME]", "[DEID]"])
    assert more.tokens == [*ours.tokens, "[DEID]", "[NAME]"]
    assert more.encode_batch(["hello [DEID][unused1] [name]"])[0][:3] == [TOKENS.index("hello"), N + 1, N]
    assert not set(more.regular_ids) & {N, N + 1, N + 2}
    # [unusedN] was no text before either, but now a text that holds it has another id
    assert ours.with_special_tokens(["[unused1]"]).fingerprint != ours.fingerprint


@pytest.mark.parametrize("token", ["", "two words", "tab\t", "line\n"])
def test_a_special_token_that_no_text_can_hold_is_refused(tmp_path: Path, token: str) -> None:
    ours = load_tokenizer(make(tmp_path / "given", {TXT: txt()}))
    with pytest.raises(UserError, match=r"^special_tokens: "):
        ours.with_special_tokens([token])


def test_a_tokenizer_with_gaps_takes_no_further_tokens(tmp_path: Path) -> None:
    state = serialised()
    state["model"]["vocab"]["far"] = N + 7
    ours = load_tokenizer(make(tmp_path / "given", {JSON: state}))
    with pytest.raises(UserError, match=r"special_tokens: \[DEID\] can't follow the"):
        ours.with_special_tokens(["[DEID]"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 64),
        ({"model_max_length": 512}, 64),
        ({"model_max_length": 48}, 48),
        ({"model_max_length": int(1e30)}, 64),
        ({"max_len": 48}, 48),
        ({"max_len": 512, "model_max_length": None}, 64),
    ],
)
def test_an_export_truncates_at_the_models_positions(config: dict[str, Any], expected: int) -> None:
    before = dict(config)
    result = with_max_length({**config, "do_lower_case": False}, 64)
    assert result == {"do_lower_case": False, "model_max_length": expected}
    assert config == before


def test_a_folder_without_a_tokenizer_is_told_apart(tmp_path: Path) -> None:
    assert not has_tokenizer(make(tmp_path / "none", {CONFIG: {}}))
    assert has_tokenizer(make(tmp_path / "words", {TXT: txt()}))
    assert has_tokenizer(make(tmp_path / "serialised", {JSON: serialised()}))
