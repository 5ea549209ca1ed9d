"""Byte-level BPE and SentencePiece folders have the ids that AutoTokenizer gives, or are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.data.labelled.encoded import encode
from engine.data.tokenizer.check import check_texts, check_vocabulary
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import UserError
from tests.data.tokenizer.folders import TEXTS, modernbert, roberta, xlm_roberta

ODD = [
    "",
    " ",
    "the  dog",
    " The fox",
    "a <mask> b </s>",
    "naïve Ünïcode 狐 🦊",
    "tab\tand\nline\u00a0end ",
    "▁ Ġ ##x",
    "[MASK]",
]
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


KINDS: list[Callable[[Path], None]] = [roberta, xlm_roberta, modernbert]


@pytest.mark.parametrize("make", KINDS)
def test_ids_are_those_of_transformers(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "theirs")
    vocabulary = load_tokenizer(tmp_path / "theirs")
    vocabulary.save(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.fingerprint == vocabulary.fingerprint
    for folder in ("theirs", "ours"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        check_vocabulary(vocabulary, theirs, tmp_path)
        check_texts(vocabulary, theirs, tmp_path, [*ODD, *TEXTS])
        for pairs in (None, ODD[::-1]):
            rows = encode(vocabulary, ODD, pairs, 24)
            given = theirs(ODD, pairs, truncation="longest_first", max_length=24)["input_ids"]
            assert [rows.tokens[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)] == given


@pytest.mark.parametrize("make", KINDS)
def test_special_tokens_go_by_their_roles(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    vocabulary, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id)
    assert ids == tuple(getattr(theirs, f"{role}_id") for role in ROLES)
    assert set(ids).isdisjoint(vocabulary.regular_ids.tolist())
    assert len(vocabulary.regular_ids) == vocabulary.vocab_size - len(ids)
    quoting = " ".join(["a", *theirs.all_special_tokens, "b"])
    assert set(vocabulary.encode_batch([quoting])[0]).isdisjoint({vocabulary.mask_id, vocabulary.sep_id})


@pytest.mark.parametrize("make", KINDS)
def test_further_special_tokens_extend_it(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "theirs")
    base = load_tokenizer(tmp_path / "theirs")
    more = base.with_special_tokens(["[DEID]", base.names["mask_token"]])
    assert more.tokens == [*base.tokens, "[DEID]"]
    assert base.vocab_size in more.encode_batch(["a [DEID] b"])[0]
    more.save(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.fingerprint == more.fingerprint != base.fingerprint
    assert again.extends(base)
    assert not base.extends(again)


@pytest.mark.parametrize("make", KINDS)
def test_a_word_begins_behind_a_space(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    vocabulary = load_tokenizer(tmp_path)
    ids = vocabulary.encode_batch([" jumps overly liquid"])[0]
    starts = ~vocabulary.continues_word[np.array(ids)]
    assert int(starts.sum()) == 3
    assert len(ids) > 3
    assert vocabulary.text_of(vocabulary.mask_id) == vocabulary.names["mask_token"]
    assert not vocabulary.continues_word[vocabulary.mask_id]


def edit(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_another_tokenizer_than_one_for_masks_is_refused(tmp_path: Path) -> None:
    roberta(tmp_path)
    serialised, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    originals = serialised.read_text(), config.read_text()
    changes: list[tuple[Path, Callable[[dict], object], str]] = [  # type: ignore[type-arg]
        (config, lambda c: c.update(tokenizer_class="T5Tokenizer"), "tokenizer_class 'T5Tokenizer'"),
        (config, lambda c: c.update(mask_token="<extra_id_0>"), "has no mask_token ('<extra_id_0>')"),
        (serialised, lambda c: c["model"].update(dropout=0.1), "dropout 0.1"),
        (serialised, lambda c: c.update(post_processor=None), "post_processor"),
        (serialised, lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer 'Whitespace'"),
        (serialised, lambda c: c.update(added_tokens=[]), "is not in tokenizer.json; add it there"),
    ]
    for path, change, said in changes:
        serialised.write_text(originals[0])
        config.write_text(originals[1])
        edit(path, change)
        with pytest.raises(UserError) as raised:
            load_tokenizer(tmp_path)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_sentencepiece_model_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"model")
    with pytest.raises(UserError, match=r"has neither tokenizer\.json nor vocab\.txt; .*save_pretrained"):
        load_tokenizer(tmp_path)
