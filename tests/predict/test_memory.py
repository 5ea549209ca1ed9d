"""Batches of ever other sizes take no more memory than the first ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.predict.models import POSITIONS, write_tokenizer

CHUNKS = """
import random, re, sys
from pathlib import Path
from engine.predict.options import PredictConfig
from engine.predict.rows import Row
from engine.predict.worker import compute_chunk

def resident():
    return int(re.search(r"^RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024

config, draw = PredictConfig(sys.argv[1], "rows", "-", text="text"), random.Random(1)
for chunk in range(200):
    counts = [draw.randint(1, 30) for _ in range(draw.randint(20, 60))]
    compute_chunk(config, [Row(row, {"text": "fox " * count}) for row, count in enumerate(counts)])
    if chunk % 100 == 49:
        print(resident())
print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_memory_does_not_grow_with_the_number_of_batches(tmp_path: Path) -> None:
    """In megabytes; with all primitives that oneDNN keeps by default they are some 200 more."""
    write_tokenizer(tmp_path)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=3072,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", CHUNKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    begun, _, last = (float(line) for line in done.stdout.split())
    assert last - begun < 60
