"""Runs on byte-level BPE and SentencePiece: a given tokenizer's, a learned one's; transformers opens what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, ModernBertForMaskedLM, RobertaForMaskedLM

from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.tokenizer.folder import load_tokenizer
from tests.data.store.corpora import TEXTS, write_corpus
from tests.data.tokenizer.folders import roberta, xlm_roberta
from tests.train.runs import losses, run
from tests.train.test_layouts import largest_difference

TEXT = " ".join(TEXTS[3].split())[:80]


def options(store: Path, *more: str) -> list[str]:
    return [f"--data.path={store}", "--data.objective=mlm", "--train.steps=3", *more]


def prepared(output: Path, **given: Any) -> Path:
    prepare(PrepareConfig(**{"source": ["embedded"], "output": str(output), "workers": 0, **given}))
    return output


def check_export(export: Path, kind: type[Any], store: Path) -> Any:
    """Nothing missing; the text has the store's ids, and the model takes what the tokenizer gives."""
    model, told = kind.from_pretrained(export, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokenizer, words = AutoTokenizer.from_pretrained(export), load_tokenizer(store / "tokenizer")
    given = tokenizer(TEXT, return_tensors="pt", truncation=True, max_length=64)
    assert set(given) == {"input_ids", "attention_mask"}
    ids = words.encode_batch([TEXT])[0][:62]
    assert given["input_ids"].tolist() == [[words.cls_id, *ids, words.sep_id]]
    assert bool(torch.isfinite(model(**given).logits).all())
    assert load_tokenizer(export).fingerprint == words.fingerprint
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "make"), [("roberta", roberta), ("xlm-roberta", xlm_roberta)])
def test_a_given_tokenizers_run_at_zero_3_on_two_ranks(kind: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / "theirs")
    given = {"tokenizer": str(tmp_path / "theirs"), "max_unknown_share": 1.0}
    store = prepared(tmp_path / "store", **given)
    more = (f"--model.architecture={kind}", "--train.zero_stage=3", "--data.whole_word_masking=true")
    printed = run(tmp_path / "run", *options(store, *more), ranks=2)
    assert "update verified: step 1" in printed
    opened = RobertaForMaskedLM if kind == "roberta" else AutoModelForMaskedLM
    tokenizer = check_export(tmp_path / "run" / "export", opened, store)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert tokenizer.mask_token == theirs.mask_token


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    corpus = write_corpus(folder / "corpus.jsonl", TEXTS)
    return prepared(folder / "store", source=[str(corpus)], vocabulary="bpe", vocab_size=600)


MODERNBERT = ("--model.architecture=modernbert", "--model.layers=3")


@pytest.mark.slow
def test_modernbert_on_a_learned_byte_level_vocabulary(learned: Path, tmp_path: Path) -> None:
    run(tmp_path / "one", *options(learned, *MODERNBERT, "--train.zero_stage=0"))
    run(tmp_path / "two", *options(learned, *MODERNBERT, "--train.zero_stage=3"), ranks=2)
    assert largest_difference(losses(tmp_path / "two"), losses(tmp_path / "one")) < 1e-5
    check_export(tmp_path / "two" / "export", ModernBertForMaskedLM, learned)


def test_bert_draws_pairs_on_it_and_a_classifier_is_tuned(learned: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", f"--data.path={learned}", "--train.steps=2")
    rows = [{"first": f"one {word}", "second": "or two", "label": word} for word in ("hammer", "Apple")] * 20
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        tmp_path / "tuned",
        "--task=sequence_classification",
        f"--model.init_from={tmp_path / 'run' / 'export'}",
        f"--labelled.train={tmp_path / 'train.jsonl'}",
        "--labelled.text=first",
        "--labelled.text_pair=second",
        "--labelled.max_length=24",
        "--train.epochs=1",
    )
    assert set(AutoTokenizer.from_pretrained(tmp_path / "tuned" / "export")("a", "b")["input_ids"]) >= {2, 3}
