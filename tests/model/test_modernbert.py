"""ModernBERT is transformers': logits, losses and gradients, whatever the lengths; its shape, folder and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig, PreTrainedModel
from transformers import ModernBertForMaskedLM as TheirMaskedLM
from transformers import ModernBertForSequenceClassification as TheirClassification

from engine.config import MODEL_SIZES, ModelConfig, architecture_of
from engine.errors import UserError
from engine.kernels import cuda, dispatch, select
from engine.model.build import build_config, initialise
from engine.model.flops import forward_flops
from engine.model.folder import described, export_huggingface
from engine.model.modernbert.models import ModernBertForMaskedLM, ModernBertForSequenceClassification
from engine.model.modernbert.window import Window
from engine.model.packing import Packing, pack
from engine.model.pretrained import load_config, load_pretrained

TOKENS = 300
#: around the edges of the window below, and far beyond it
LENGTHS = (1, 2, 63, 64, 65, 128, 129, 130, 200, 600)
NO_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))


def theirs(**changes: Any) -> ModernBertConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=TOKENS, pad_token_id=0, **{**sizes, **NO_TOKENS, **changes})
    config._attn_implementation = "sdpa"
    return config


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, S]."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(1, TOKENS, mask.shape, generator=generator) * mask, mask.long()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == expected.keys()
    for name, truth in expected.items():
        assert float((ours[name] - truth).abs().max()) <= bound * max(float(truth.abs().max()), 1e-6), name


@pytest.fixture(autouse=True, params=["auto", "reference"])
def kernels(request: pytest.FixtureRequest) -> Any:
    select(request.param)
    yield
    select("auto")


CHANGES: list[dict[str, Any]] = [
    {},
    {"local_attention": 16},
    {"local_attention": 2000},
    {"num_hidden_layers": 1},
    {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False},
    {"hidden_activation": "silu", "classifier_activation": "silu"},
    {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
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
    config = theirs(**changes)
    reference = TheirMaskedLM(config)
    model = ModernBertForMaskedLM(config)
    model.load_state_dict(reference.state_dict())
    ids, mask = padded(LENGTHS)
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
    assert_near(gradients(model), gradients(reference), 1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_classifier_has_their_logits_and_gradients(pooling: str, recompute: bool) -> None:
    config = theirs(classifier_pooling=pooling, num_labels=3)
    reference = TheirClassification(config)
    model = ModernBertForSequenceClassification(config, activation_checkpointing=recompute)
    model.load_state_dict(reference.state_dict())
    ids, mask = padded((5, 130, 80))
    labels = torch.tensor([0, 2, 1])
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    logits = model(**pack(ids, mask), max_length=130)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    (expected.loss * 3).backward()
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert_near(gradients(model), gradients(reference), 1e-5)


def test_a_window_sees_its_own_sequence_alone() -> None:
    """Against a mask over all pairs, with rows behind the last token."""
    lengths, reach, rows = torch.tensor([3, 1, 40, 17]), 5, 70
    packing = Packing.from_lengths(lengths, 61, 40)
    query, key, value = torch.randn(3, rows, 2, 8).unbind()
    owner = torch.repeat_interleave(torch.arange(4), lengths)
    near = (torch.arange(61)[:, None] - torch.arange(61)).abs() <= reach
    mask = near & (owner[:, None] == owner)
    heads = [states[:61].transpose(0, 1) for states in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)
    context = Window.of(packing, rows, reach).attend(query, key, value)
    torch.testing.assert_close(context[:61], expected, rtol=1e-5, atol=1e-6)
    assert context.shape == query.shape
    assert context.isfinite().all()


@pytest.mark.parametrize("size", list(MODEL_SIZES["modernbert"]))
def test_the_shape_has_the_parameters_of_the_module(size: str) -> None:
    options = ModelConfig(size, architecture="modernbert")
    config = build_config(options, TOKENS)
    architecture = architecture_of(config)
    with torch.device("meta"):
        model = architecture.build("masked_lm", config, False)
        classifier = architecture.build("sequence_classification", config, False)
    shape = replace(architecture.shape(options, TOKENS), pooler=False)
    assert shape == replace(architecture.shape_of(config), pooler=False)
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    pooled = replace(shape, pooler=True, decoder=False)
    assert pooled.parameters() == sum(p.numel() for p in classifier.parameters())


def test_options_change_windows_and_rotation_of_fresh_and_of_given_weights(tmp_path: Path) -> None:
    given = {"window": 32, "global_every": 2, "rope_theta": 5e4, "local_rope_theta": 300.0, "max_positions": 2048}
    theirs(num_hidden_layers=3, local_attention=16).save_pretrained(tmp_path)
    fresh = ModelConfig("tiny", architecture="modernbert", layers=3, **given)  # type: ignore[arg-type]
    for options in (fresh, ModelConfig(init_from=str(tmp_path), **given)):  # type: ignore[arg-type]
        config = build_config(options, TOKENS)
        assert config.local_attention == 32
        assert config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
        thetas = {kind: values["rope_theta"] for kind, values in config.rope_parameters.items()}
        assert thetas == {"full_attention": 5e4, "sliding_attention": 300.0}
        assert config.max_position_embeddings == 2048
    shape = architecture_of(config).shape(fresh, TOKENS)
    assert (shape.windows, shape.reach) == (1, 16)
    unchanged = build_config(ModelConfig(init_from=str(tmp_path)), TOKENS)
    assert (unchanged.local_attention, unchanged.max_position_embeddings) == (16, theirs().max_position_embeddings)


def test_published_sizes() -> None:
    """149M and 395M parameters (Warner et al. 2024, table 4), with their vocabulary of 50,368."""
    for size, millions in (("base", 149), ("large", 395)):
        options = ModelConfig(size, architecture="modernbert", max_positions=8192)
        config = build_config(options, 50368)
        with torch.device("meta"):
            model = ModernBertForMaskedLM(config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)
        default = ModernBertConfig()
        if size == "base":
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
                assert getattr(config, name) == getattr(default, name)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_flops_are_those_that_torch_counts(kernels: None) -> None:
    config = theirs(local_attention=16, num_hidden_layers=4)
    model = ModernBertForMaskedLM(config).eval()
    ids, mask = padded((40, 40))
    masked = torch.tensor([1, 2, 3, 50, 51, 52])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**pack(ids, mask), mlm_positions=masked, mlm_labels=masked, max_length=40)
    shape = architecture_of(config).shape_of(config)
    # The two layers with windows work on blocks with their neighbours; in the last all tokens ask.
    windows, blocks = 2 * (40 * 17 - 8 * 9), 80 * 3 * 8
    more = 2 * 4 * (blocks - windows) * 64 + 2 * (80 - 6) * 64 * 64 + 4 * 80 * 40 * 64
    counted = forward_flops(replace(shape, pooler=False), [40, 40], 6)
    assert counted + more == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_initial_weights_are_drawn_as_published() -> None:
    model = ModernBertForMaskedLM(build_config(ModelConfig("mini", architecture="modernbert"), 2000))
    initialise(model, 3)
    weights = dict(model.named_parameters())
    # a normal distribution cut at 2 deviations has 0.880 of its deviation
    for name, deviation in {
        "model.embeddings.tok_embeddings.weight": 0.02,
        "model.layers.0.attn.Wqkv.weight": 0.02,
        "model.layers.3.mlp.Wi.weight": 0.02,
        "model.layers.3.mlp.Wo.weight": 0.02 / 14**0.5,
        "model.layers.6.attn.Wo.weight": 0.02 / 14**0.5,
        "head.dense.weight": 0.02 / 14**0.5,
    }.items():
        assert weights[name].std().item() == pytest.approx(0.880 * deviation, rel=0.02), name
        assert weights[name].abs().max().item() <= 2.0001 * deviation, name
    assert all(weights[name].eq(1).all() for name in weights if "norm" in name)
    again = ModernBertForMaskedLM(model.config)
    initialise(again, 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_dropout_is_none_unless_asked_for() -> None:
    config = build_config(ModelConfig(architecture="modernbert"), TOKENS)
    assert {config.embedding_dropout, config.mlp_dropout, config.attention_dropout, config.classifier_dropout} == {0.0}
    asked = ModelConfig(architecture="modernbert", hidden_dropout=0.1, attention_dropout=0.2, classifier_dropout=0.3)
    config = build_config(asked, TOKENS)
    dropouts = config.embedding_dropout, config.mlp_dropout, config.attention_dropout, config.classifier_dropout
    assert dropouts == (0.1, 0.1, 0.2, 0.3)
    bert = build_config(ModelConfig(), TOKENS)
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob, bert.classifier_dropout) == (0.1, 0.1, None)


@pytest.mark.parametrize(
    ("kind", "head", "ours"),
    [
        (TheirMaskedLM, "masked_lm", ModernBertForMaskedLM),
        (TheirClassification, "sequence_classification", ModernBertForSequenceClassification),
    ],
)
def test_their_folder_comes_in_and_goes_out_again(
    kind: type[PreTrainedModel], head: str, ours: type[nn.Module], tmp_path: Path
) -> None:
    reference = kind(theirs(global_rope_theta=5000.0)).eval()
    reference.save_pretrained(tmp_path / "theirs")
    read = load_config(tmp_path / "theirs")
    config = build_config(ModelConfig(init_from=str(tmp_path / "theirs")), TOKENS)
    assert config.rope_parameters == read.rope_parameters
    assert config.rope_parameters["full_attention"]["rope_theta"] == 5000.0
    model = ours(config)
    initialise(model, 1)
    report = load_pretrained(model, tmp_path / "theirs")
    assert (report.initialised, report.unused) == ((), ())
    named = described(config, architecture_of(config).class_for(head))
    export_huggingface(model.state_dict(), named, {"vocab.txt": b"[PAD]\n"}, tmp_path / "ours")
    opened, told = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids, mask = padded((5, 130))
    logits = [each.eval()(input_ids=ids, attention_mask=mask).logits for each in (opened, reference)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", 0, "hidden_size 0 is not allowed"),
        ("local_attention", 0, "local_attention 0 is not allowed"),
        ("num_attention_heads", 5, "num_attention_heads 5 is not supported; give a model where it is a divisor of 64"),
        ("num_attention_heads", 64, "num_attention_heads 64 is not supported; .* even width"),
        ("hidden_activation", "mish", "hidden_activation 'mish' is not supported"),
        ("classifier_activation", "mish", "classifier_activation 'mish' is not supported"),
        ("tie_word_embeddings", False, "tie_word_embeddings False is not supported"),
        ("layer_types", ["chunked_attention"] * 5, "correct that field"),
        ("quantization_config", {"bits": 4}, "quantization_config .* is not supported"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_what_the_modules_dont_compute_is_one_line(field: str, value: Any, said: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=said) as raised:
        load_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_another_architecture_than_the_folders_is_refused(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.architecture: 'bert' has no effect: .* is of type 'modernbert'"):
        build_config(ModelConfig(init_from=str(tmp_path), architecture="bert"), TOKENS)
