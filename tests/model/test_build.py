from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig

from engine.config import ModelConfig
from engine.errors import UserError
from engine.model.bert import BertForPreTraining
from engine.model.build import build_config, initialise


def test_sizes_become_dimensions() -> None:
    config = build_config(ModelConfig(size="mini", max_positions=64), vocab_size=1001, pad_token_id=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (256, 4, 4)
    assert (config.intermediate_size, config.max_position_embeddings) == (1024, 64)
    assert (config.vocab_size, config.pad_token_id, config.type_vocab_size) == (1001, 3, 2)


def test_dropout_and_labels_are_the_runs() -> None:
    model = ModelConfig(hidden_dropout=0.2, attention_dropout=0.3, classifier_dropout=0.4)
    config = build_config(model, 100, labels=["no", "maybe", "yes"])
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.3)
    assert config.classifier_dropout == 0.4
    assert config.num_labels == 3
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2}


def test_init_from_gives_dimensions_but_not_dropout(tmp_path: Path, config: BertConfig) -> None:
    config.save_pretrained(tmp_path)
    built = build_config(ModelConfig(size="base", hidden_dropout=0.0, init_from=str(tmp_path)), vocab_size=97)
    assert (built.hidden_size, built.num_hidden_layers, built.intermediate_size) == (32, 3, 48)
    assert built.hidden_dropout_prob == 0.0


@pytest.mark.parametrize(
    ("rows", "tokens", "fits"), [(97, 97, True), (104, 97, True), (1120, 97, True), (1121, 97, False), (97, 104, False)]
)
def test_the_vocabulary_is_the_datas_or_padded(
    tmp_path: Path, config: BertConfig, rows: int, tokens: int, fits: bool
) -> None:
    config.vocab_size = rows
    config.save_pretrained(tmp_path)
    model = ModelConfig(init_from=str(tmp_path))
    if fits:
        assert build_config(model, tokens).vocab_size == rows
        return
    with pytest.raises(UserError, match=f"^model.init_from: .*{rows} tokens.* {tokens};"):
        build_config(model, tokens)


def test_tokens_beyond_the_word_list_enlarge_the_model(tmp_path: Path, config: BertConfig) -> None:
    config.save_pretrained(tmp_path)
    model = ModelConfig(init_from=str(tmp_path))
    assert build_config(model, 99, listed=97).vocab_size == 99
    assert build_config(model, 97, listed=90).vocab_size == 97
    with pytest.raises(UserError, match="belong in added_tokens"):
        build_config(model, 99, listed=98)


def test_initial_weights_follow_the_seed_alone(config: BertConfig) -> None:
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        model = BertForPreTraining(config)
        initialise(model, seed)
        return model.state_dict()

    first, same, other = weights(1, 10), weights(1, 20), weights(2, 10)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])


def test_initialising_leaves_the_global_generator_alone(config: BertConfig) -> None:
    model = BertForPreTraining(config)
    state = torch.get_rng_state()
    initialise(model, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_weights_have_berts_distribution(config: BertConfig) -> None:
    config.initializer_range = 0.02
    model = BertForPreTraining(config)
    initialise(model, 1)
    matrices = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 2])
    assert abs(float(matrices.mean())) < 5e-4
    assert abs(float(matrices.std()) - 0.02) < 5e-4
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)))
    assert all(bool((m.weight == 1).all()) for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_the_padding_row_starts_at_zero(config: BertConfig) -> None:
    config.pad_token_id = 4
    model = BertForPreTraining(config)
    initialise(model, 1)
    assert not model.cls.predictions.decoder.weight[4].any()
    assert model.cls.predictions.decoder.weight[0].any()


def test_init_from_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_config(ModelConfig(init_from=str(tmp_path / "nowhere")), 100)


def test_a_wrong_model_type_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match=r"model_type is 't5'; give a model of type 'bert'"):
        build_config(ModelConfig(init_from=str(tmp_path)), 100)


def test_a_run_takes_the_architecture_alone(tmp_path: Path, config: BertConfig) -> None:
    """What the start model was used for is no part of what comes of it."""
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    foreign = {
        "problem_type": "multi_label_classification",
        "finetuning_task": "mnli",
        "auto_map": {"AutoModel": "modeling.Custom"},
        "id2label": {"0": "toxic", "1": "obscene", "2": "threat"},
        "label2id": {"toxic": 0, "obscene": 1, "threat": 2},
        "architectures": ["BertForSequenceClassification"],
        "task_specific_params": {"x": 1},
        "pad_token_id": 7,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **foreign}))
    built = build_config(ModelConfig(init_from=str(tmp_path)), 97, pad_token_id=3).to_dict()
    for name in ("finetuning_task", "auto_map", "task_specific_params"):
        assert name not in built
    assert (built["problem_type"], built["architectures"], built["pad_token_id"]) == (None, None, 3)
    assert built["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}
    classifier = build_config(ModelConfig(init_from=str(tmp_path)), 97, labels=["no", "yes"])
    assert classifier.problem_type == "single_label_classification"
    assert classifier.id2label == {0: "no", 1: "yes"}
