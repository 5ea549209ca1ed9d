from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig

from engine.errors import UserError
from engine.model.bert import BertForPreTraining, BertModel
from engine.model.build import initialise
from engine.model.heads import BertForSequenceClassification
from engine.model.pretrained import Reshaped, by_module, check_segments, load_config, load_pretrained


@pytest.fixture
def peer(config: BertConfig) -> transformers.BertForPreTraining:
    torch.manual_seed(9)
    return transformers.BertForPreTraining(config)


@pytest.fixture
def folder(tmp_path: Path, peer: transformers.BertForPreTraining) -> Path:
    peer.save_pretrained(tmp_path)
    return tmp_path


def fresh(config: BertConfig) -> BertForPreTraining:
    model = BertForPreTraining(config)
    initialise(model, 1)
    return model


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_equal_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_folder_of_transformers_loads_whole(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    model = fresh(config)
    report = load_pretrained(model, folder)
    assert_equal_weights(model, peer.state_dict())
    assert report.initialised == report.unused == ()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_pickled_weights_with_old_names_load(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    state = {old(name): tensor for name, tensor in peer.state_dict().items()}
    torch.save({**state, "bert.embeddings.position_ids": torch.arange(16)[None]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = fresh(config)
    report = load_pretrained(model, folder)
    assert_equal_weights(model, peer.state_dict())
    assert report.unused == ()


def test_of_two_tied_tensors_the_embeddings_count(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {**tensors, "cls.predictions.decoder.weight": torch.zeros(97, 32)})
    model = fresh(config)
    report = load_pretrained(model, folder)
    assert_equal_weights(model, peer.state_dict())
    assert report.unused == ("cls.predictions.decoder.weight",)
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    rewrite(folder, {**tensors, "cls.predictions.decoder.weight": embeddings.clone()})
    assert load_pretrained(model, folder).unused == ()


def test_shards_load(config: BertConfig, folder: Path, peer: transformers.BertForPreTraining) -> None:
    (folder / "model.safetensors").unlink()
    peer.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = fresh(config)
    load_pretrained(model, folder)
    assert_equal_weights(model, peer.state_dict())


def test_encoder_without_prefix_loads_and_heads_are_reported(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    rewrite(folder, dict(peer.bert.state_dict()))
    model = fresh(config)
    before = model.cls.predictions.transform.dense.weight.clone()
    report = load_pretrained(model, folder)
    assert_equal_weights(model.bert, peer.bert.state_dict())
    assert torch.equal(model.cls.predictions.transform.dense.weight, before)
    assert "cls.seq_relationship.weight" in report.initialised
    assert not any(name.startswith("bert.") or name.endswith("decoder.weight") for name in report.initialised)


def test_prefixed_weights_load_into_a_bare_encoder(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    model = BertModel(config)
    report = load_pretrained(model, folder)
    assert_equal_weights(model, peer.bert.state_dict())
    assert report.initialised == ()
    assert "cls.predictions.transform.dense.weight" in report.unused
    assert str(report) == (
        "taken: embeddings (5), encoder layers 0 to 2 (48), pooler (2); newly initialised: nothing; "
        "unused: cls.predictions (5), cls.seq_relationship (2)"
    )


def test_a_classifier_of_another_shape_starts_fresh(config: BertConfig, folder: Path) -> None:
    config.num_labels = 5
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    config.num_labels = 2
    model = BertForSequenceClassification(config)
    report = load_pretrained(model, folder)
    assert report.initialised == ("classifier.weight", "classifier.bias")
    assert report.unused == ()
    assert report.reshaped == (
        Reshaped("classifier.weight", (5, 32), (2, 32), 0),
        Reshaped("classifier.bias", (5,), (2,), 0),
    )
    assert str(report).endswith(
        "unused: nothing; of another shape: classifier.weight (5 x 32 -> 2 x 32: newly initialised), "
        "classifier.bias (5 -> 2: newly initialised)"
    )
    assert load_pretrained(model, folder, without=("classifier.",)).reshaped == report.reshaped


def test_half_precision_weights_load_into_fp32(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    rewrite(folder, {name: t.half() for name, t in load_file(folder / "model.safetensors").items()})
    model = fresh(config)
    load_pretrained(model, folder)
    assert model.bert.pooler.dense.weight.dtype == torch.float32
    torch.testing.assert_close(model.bert.pooler.dense.weight, peer.bert.pooler.dense.weight, rtol=1e-3, atol=1e-4)


def assert_refused(config: BertConfig, folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        load_pretrained(fresh(config), folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


def test_a_missing_folder_is_refused(config: BertConfig, tmp_path: Path) -> None:
    assert_refused(config, tmp_path / "nowhere", "no such folder")


def test_a_missing_config_is_refused(config: BertConfig, folder: Path) -> None:
    (folder / "config.json").unlink()
    assert_refused(config, folder, re.escape("config.json: no such file"))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_config_is_refused(config: BertConfig, folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert_refused(config, folder, "config.json: not (valid|a) JSON")


def test_missing_weights_are_refused(config: BertConfig, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(config, folder, "it holds no weights")


def test_truncated_safetensors_are_refused(config: BertConfig, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(config, folder, "model.safetensors: cannot be read")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_damaged_pickles_are_refused(config: BertConfig, folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert_refused(config, folder, "pytorch_model.bin: cannot be read as plain tensors")


def test_pickles_with_code_are_not_run(config: BertConfig, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path("code")}, folder / "pytorch_model.bin")
    assert_refused(config, folder, "pytorch_model.bin: cannot be read as plain tensors")


def test_a_training_checkpoint_is_not_a_state_dict(config: BertConfig, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": {}, "step": 3}, folder / "pytorch_model.bin")
    assert_refused(config, folder, "more than named tensors")


def test_a_missing_shard_is_refused(config: BertConfig, folder: Path, peer: transformers.BertForPreTraining) -> None:
    (folder / "model.safetensors").unlink()
    peer.save_pretrained(folder, max_shard_size="20KB")
    min(folder.glob("model-*.safetensors")).unlink()
    assert_refused(config, folder, "safetensors: cannot be read")


def test_another_vocabulary_names_both_sizes(config: BertConfig, folder: Path) -> None:
    config.vocab_size = 50
    assert_refused(config, folder, r"97 tokens are neither the data's 50 nor those of its config\.json")


def test_rows_of_added_tokens_keep_their_initial_values(
    config: BertConfig, folder: Path, peer: transformers.BertForPreTraining
) -> None:
    config.vocab_size = 100
    model = fresh(config)
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    with torch.no_grad():
        model.cls.predictions.bias.fill_(7.0)
    report = load_pretrained(model, folder)
    assert report.initialised == report.unused == ()
    assert report.reshaped == (
        Reshaped("bert.embeddings.word_embeddings.weight", (97, 32), (100, 32), 97),
        Reshaped("cls.predictions.bias", (97,), (100,), 97),
    )
    assert str(report).endswith("cls.predictions.bias (97 -> 100: 97 rows taken, 3 new)")
    after = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(after[:97], peer.bert.embeddings.word_embeddings.weight)
    assert torch.equal(after[97:], before[97:])
    assert torch.equal(model.cls.predictions.bias[:97], peer.cls.predictions.bias)
    assert model.cls.predictions.bias[97:].tolist() == [7.0] * 3


def test_weights_that_their_config_does_not_describe_don_t_grow(config: BertConfig, folder: Path) -> None:
    edit_config(folder, vocab_size=98)
    config.vocab_size = 100
    assert_refused(config, folder, r"97 tokens are neither the data's 100 nor those of its config\.json")


def test_another_width_names_the_tensor(config: BertConfig, folder: Path) -> None:
    config.intermediate_size = 64
    assert_refused(config, folder, r"intermediate.dense.bias has shape \(48,\) and the model needs \(64,\)")


def test_an_incomplete_encoder_is_refused(config: BertConfig, folder: Path) -> None:
    config.num_hidden_layers = 4
    assert_refused(config, folder, r"lack 16 parameters of the encoder, bert.encoder.layer.3.attention")


def test_weights_of_another_family_are_refused(config: BertConfig, folder: Path) -> None:
    rewrite(folder, {f"roberta.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()})
    assert_refused(config, folder, "parameters of the encoder, bert.embeddings.word_embeddings.weight the first")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "t5"),
        ("hidden_act", "step"),
        ("num_attention_heads", 5),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("hidden_size", "wide"),
    ],
)
def test_a_config_that_is_no_plain_bert_names_the_field(folder: Path, field: str, value: Any) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(UserError, match=field):
        load_config(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_called_one(config: BertConfig, folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"^model\.init_from: .*{name} is a Git LFS pointer.*`git lfs pull`"):
        load_pretrained(fresh(config), folder)


def test_parts_without_a_place_are_told_by_module(config: BertConfig, folder: Path) -> None:
    """A classifier of the same shape keeps its own values where the run says so."""
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    model = BertForSequenceClassification(config)
    before = model.classifier.weight.clone()
    report = load_pretrained(model, folder, without=("classifier.",))
    assert torch.equal(model.classifier.weight, before)
    assert report.initialised == ("classifier.weight", "classifier.bias")
    assert str(report).endswith("newly initialised: classifier (2); unused: classifier (2)")
    assert len(report.taken) == 55


def test_modernbert_s_parts_are_told_by_module() -> None:
    layers = [f"model.layers.{index}.{part}.weight" for index in (0, 1, 3) for part in ("attn.Wo", "mlp.Wi")]
    names = ["model.embeddings.norm.weight", *layers, "model.final_norm.weight", "head.dense.weight", "decoder.bias"]
    told = "embeddings (1), encoder layers 0 to 1, 3 (6), final_norm (1), head (1), decoder (1)"
    assert by_module(names, "model.") == told


def test_an_encoder_with_more_parameters_is_refused(config: BertConfig, folder: Path) -> None:
    """It computes something that this one doesn't, or has more layers than its config.json says."""
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {**tensors, "bert.encoder.layer.0.attention.self.relative.weight": torch.zeros(3, 3)})
    assert_refused(
        config, folder, "1 parameters that our modules of its config.json lack, bert.encoder.layer.0.attention"
    )
    rewrite(folder, tensors)
    edit_config(folder, num_hidden_layers=2)
    config.num_hidden_layers = 2
    assert_refused(config, folder, r"16 parameters that our modules of its config.json lack, bert\.encoder\.layer\.2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("pruned_heads", {"0": [1]}),
        ("type_vocab_size", 0),
        ("num_hidden_layers", 0),
    ],
)
def test_what_a_config_says_of_its_weights_is_heeded(config: BertConfig, folder: Path, field: str, value: Any) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(UserError, match=field):
        load_config(folder)


def test_a_second_segment_needs_a_second_type(config: BertConfig) -> None:
    config.type_vocab_size = 1
    with pytest.raises(UserError, match=r"^model\.init_from: 'bert' has type_vocab_size 1 and pairs needs 2;"):
        check_segments(config, "bert", "pairs")
    config.type_vocab_size = 2
    check_segments(config, "bert", "pairs")
