"""A model that starts from some layers of a folder computes what transformers computes with the others left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from engine.config import ModelConfig, architecture_of
from engine.errors import UserError
from engine.model.build import build_config
from engine.model.packing import pack
from engine.model.pretrained import load_pretrained

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "pad_token_id": 0}


def save(folder: Path, kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        model: torch.nn.Module = BertModel(BertConfig(**COMMON, intermediate_size=24, max_position_embeddings=32))
    else:
        rest = {"intermediate_size": 24, "max_position_embeddings": 32, "local_attention": 8}
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        model = ModernBertModel(ModernBertConfig(**COMMON, **rest, **ends))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_kept_layers_compute_as_in_the_folder(tmp_path: Path, kind: str) -> None:
    theirs = save(tmp_path, kind)
    model = ModelConfig(init_from=str(tmp_path), init_layers="0,2,3")
    model.validate()
    config = build_config(model, COMMON["vocab_size"])
    own = architecture_of(config).build("embeddings", config, False).eval()
    report = load_pretrained(own, tmp_path, layers=model.kept_layers)
    assert not [name for name in (*report.initialised, *report.unused) if "pooler" not in name]
    layers = theirs.encoder.layer if kind == "bert" else theirs.layers
    kept = torch.nn.ModuleList([layers[index] for index in (0, 2, 3)])
    if kind == "bert":
        theirs.encoder.layer = kept
    else:
        theirs.layers = kept
    ids = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state.flatten(0, 1)
        found = own.states(**pack(ids, torch.ones_like(ids)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("2,0", "model.init_layers: '2,0' is not allowed; give layers' numbers from 0, rising, as 0,2,4,5"),
        ("0,0", "model.init_layers: '0,0' is not allowed"),
        ("", "model.init_layers: '' is not allowed"),
        ("0,-1", "model.init_layers: '0,-1' is not allowed"),
        ("0,5", "model.init_layers: '0,5' is not allowed; model.init_from has layers 0 to 4"),
        ("1,2", "model.init_layers: '1,2' is not allowed; the first layer of a modernbert takes normalised embeddings"),
    ],
)
def test_layers_that_cannot_be_taken_are_refused(tmp_path: Path, given: str, said: str) -> None:
    save(tmp_path, "modernbert")
    model = ModelConfig(init_from=str(tmp_path), init_layers=given)
    with pytest.raises(UserError) as caught:
        checked(model)
    assert said in str(caught.value)


def checked(model: ModelConfig) -> None:
    model.validate()
    build_config(model, COMMON["vocab_size"])


def test_layers_need_a_folder() -> None:
    with pytest.raises(UserError, match=r"model\.init_layers: '0,1' is not allowed; it needs model\.init_from"):
        ModelConfig(init_layers="0,1").validate()
