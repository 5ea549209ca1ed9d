"""RoBERTa and XLM-RoBERTa are transformers': logits, losses and gradients, their folders, and their mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
)

from engine.config import ModelConfig, architecture_of
from engine.errors import UserError
from engine.kernels import cuda, dispatch, select
from engine.model.build import build_config, initialise
from engine.model.folder import described, export_huggingface
from engine.model.packing import pack
from engine.model.pretrained import load_config, load_pretrained
from launch.configure.start_model import folder_config

TOKENS = 300
LENGTHS = (1, 2, 5, 64, 65, 128, 200, 600)
CONFIGS: list[type[Any]] = [RobertaConfig, XLMRobertaConfig]


def theirs(kind: type[Any] = RobertaConfig, **changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": TOKENS, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    positions = {"max_position_embeddings": 610, "type_vocab_size": 1}
    return kind(**{**sizes, **tokens, **dropout, **positions, **changes})


def padded(lengths: tuple[int, ...], padding: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, S]."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(padding + 1, TOKENS, mask.shape, generator=generator)
    return ids.where(mask, padding), mask.long()


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    ours, expected = (dict(each.named_parameters()) for each in (model, reference))
    assert ours.keys() == expected.keys()
    for name, parameter in expected.items():
        truth, own = parameter.grad, ours[name].grad
        assert truth is not None
        assert own is not None
        # a key's bias adds the same to all scores of a query, so its gradient is nothing but rounding
        bound = 1e-5 * max(float(truth.abs().max()), 1.0 if name.endswith("key.bias") else 1e-6)
        assert float((own - truth).abs().max()) <= bound, name


def built(reference: PreTrainedModel, head: str, recompute: bool = False) -> nn.Module:
    config: Any = reference.config
    model = architecture_of(config).build(head, config, recompute)
    model.load_state_dict(reference.state_dict())
    return model


@pytest.fixture(autouse=True, params=["auto", "reference"])
def kernels(request: pytest.FixtureRequest) -> Any:
    select(request.param)
    yield
    select("auto")


CHANGES: list[dict[str, Any]] = [
    {},
    {"hidden_act": "silu"},
    {"pad_token_id": 0},
    {"type_vocab_size": 2},
    {"num_hidden_layers": 1},
]


@pytest.mark.parametrize(
    ("changes", "flash"),
    [(changes, False) for changes in CHANGES]
    + [(CHANGES[0], True)]
    + [pytest.param(changes, True, marks=pytest.mark.slow) for changes in CHANGES[1:]],
    ids=str,
)
def test_masked_lm_has_their_loss_and_gradients(
    changes: dict[str, Any], flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through the operator that is flash attention on GPUs, whose reference runs here."""
    if flash:
        monkeypatch.setattr(dispatch, "attention", lambda *_: cuda)
    reference = RobertaForMaskedLM(theirs(**changes))
    model = built(reference, "masked_lm")
    ids, mask = padded(LENGTHS, reference.config.pad_token_id)
    batch = pack(ids, mask)
    masked = torch.arange(0, sum(LENGTHS), 3)
    labels = batch["input_ids"][masked]
    logits = reference(input_ids=ids, attention_mask=mask).logits[mask.bool()][masked]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    outputs = model(**batch, mlm_positions=masked, mlm_labels=labels, max_length=max(LENGTHS))
    outputs["mlm_loss_sum"].backward()
    assert outputs["mlm_loss_sum"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert int(outputs["mlm_correct"]) == int((logits.argmax(-1) == labels).sum())
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_classifier_has_their_logits_and_gradients(recompute: bool) -> None:
    # with weights near 0 the gradients of single tokens cancel in their sums, and rounding is what is left
    reference = RobertaForSequenceClassification(theirs(num_labels=3, initializer_range=0.1))
    model = built(reference, "sequence_classification", recompute)
    ids, mask = padded((5, 600, 80))
    labels = torch.tensor([0, 2, 1])
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    batch = pack(ids, mask)
    second = torch.ones_like(batch["input_ids"])
    logits = model(**{**batch, "token_type_ids": second}, max_length=600)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    (expected.loss * 3).backward()
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        (RobertaForMaskedLM, RobertaConfig, "masked_lm"),
        (RobertaForSequenceClassification, RobertaConfig, "sequence_classification"),
        (XLMRobertaForMaskedLM, XLMRobertaConfig, "masked_lm"),
        (XLMRobertaForSequenceClassification, XLMRobertaConfig, "sequence_classification"),
    ],
)
def test_their_folder_comes_in_and_goes_out_again(
    kind: type[PreTrainedModel], config: type[Any], head: str, tmp_path: Path
) -> None:
    reference = kind(theirs(config)).eval()
    reference.save_pretrained(tmp_path / "theirs")
    ours = build_config(ModelConfig(init_from=str(tmp_path / "theirs")), TOKENS, pad_token_id=1)
    architecture = architecture_of(ours)
    model = architecture.build(head, ours, False)
    initialise(model, 1)
    report = load_pretrained(model, tmp_path / "theirs")
    assert (report.initialised, report.unused) == ((), ())
    named = described(ours, architecture.class_for(head))
    export_huggingface(model.state_dict(), named, {"vocab.txt": b"[PAD]\n"}, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["model_max_length"] == 608
    opened, told = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids, mask = padded((5, 130))
    logits = [each.eval()(input_ids=ids, attention_mask=mask).logits for each in (opened, reference)]
    assert torch.equal(*logits)
    again = architecture.build(head, ours, False)
    load_pretrained(again, tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_the_shape_has_the_parameters_of_the_module(kind: str) -> None:
    options = ModelConfig("mini", architecture=kind)
    config = build_config(options, TOKENS, pad_token_id=1)
    architecture = architecture_of(config)
    assert architecture.positions(config) == 512
    with torch.device("meta"):
        model = architecture.build("masked_lm", config, False)
        classifier = architecture.build("sequence_classification", config, False)
    shape = replace(architecture.shape(options, TOKENS), pooler=False)
    assert shape == replace(architecture.shape_of(config), pooler=False)
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    pooled = replace(shape, pooler=True, decoder=False)
    assert pooled.parameters() == sum(p.numel() for p in classifier.parameters())


def test_layers_have_names_in_the_curves() -> None:
    config = build_config(ModelConfig(architecture="roberta"), TOKENS, pad_token_id=1)
    architecture = architecture_of(config)
    names = [name for name, _ in architecture.build("masked_lm", config, False).named_parameters()]
    assert {architecture.layer_of(name) for name in names} == {"embeddings", "layer.0", "layer.1", "lm_head"}


def test_a_folders_positions_are_those_of_a_sequence(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    shape = folder_config(str(tmp_path))
    assert shape is not None
    assert (shape.architecture, shape.dimensions["max_positions"]) == ("roberta", 608)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("pad_token_id", None, "pad_token_id None is not allowed; give the token's id"),
        ("pad_token_id", 300, "pad_token_id 300 is not allowed"),
        ("max_position_embeddings", 2, "max_position_embeddings 2 is not allowed; give more than 2"),
        ("num_attention_heads", 5, "num_attention_heads 5 is not supported"),
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key' is not supported"),
        ("is_decoder", True, "is_decoder True is not supported"),
    ],
)
def test_what_the_modules_dont_compute_is_one_line(
    kind: type[Any], field: str, value: Any, said: str, tmp_path: Path
) -> None:
    theirs(kind).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=said) as raised:
        load_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_another_padding_token_than_the_weights_is_refused(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.init_from: pad_token_id is 1 in its config\.json and 0 in the tok"):
        build_config(ModelConfig(init_from=str(tmp_path)), TOKENS, pad_token_id=0)


def test_pairs_of_segments_have_no_head() -> None:
    config = build_config(ModelConfig(architecture="roberta"), TOKENS, pad_token_id=1)
    with pytest.raises(UserError, match=r"a model of type 'roberta' has no head for pretraining"):
        architecture_of(config).class_for("pretraining")
