"""An export is refused unless transformers makes the same model of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import ARCHITECTURES, ModelConfig
from engine.errors import UserError
from engine.model import folder as export_folder
from engine.model import roundtrip
from engine.model.build import initialise
from engine.model.folder import described, export_huggingface, untied
from engine.model.roundtrip import BOUND, Sample, check_round_trip, packed_samples, random_samples

SIZE = ModelConfig(hidden_size=32, heads=4, layers=3, intermediate_size=48, max_positions=80)
TOKENS = 97
TOKENIZER = {"vocab.txt": b"[PAD]\n"}
HEADS = [
    ("bert", "pretraining"),
    ("bert", "masked_lm"),
    ("bert", "sequence_classification"),
    ("modernbert", "masked_lm"),
    ("modernbert", "sequence_classification"),
    ("roberta", "masked_lm"),
    ("roberta", "sequence_classification"),
    ("xlm-roberta", "masked_lm"),
]
DECODERS = {
    "bert": "cls.predictions.decoder.weight",
    "modernbert": "decoder.weight",
    "roberta": "lm_head.decoder.weight",
}


def model_of(kind: str, head: str, **values: Any) -> nn.Module:
    """A model with biases, so that a lost one shows; windows are narrower than the longest sample."""
    architecture = ARCHITECTURES.get(kind)
    config = architecture.fresh_config(SIZE, TOKENS, 1)
    for name, value in ({"local_attention": 16, "num_labels": 3} | values).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = architecture.build(head, described(config, architecture.export_classes[head]), False)
    initialise(model, 2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("weight"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def export(model: nn.Module, out: Path, **options: Any) -> Any:
    config: Any = model.config
    return export_huggingface(model.state_dict(), config, TOKENIZER, out, **options)


def check(model: nn.Module, folder: Path) -> None:
    config: Any = model.config
    check_round_trip(folder, untied(model.state_dict(), ARCHITECTURES.get(config.model_type).tied), config)


def assert_refused(work: Callable[[], object], pattern: str) -> None:
    with pytest.raises(UserError, match=f"^export: the export is not the model: {pattern}") as error:
        work()
    assert "\n" not in str(error.value)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_every_head_goes_there_and_back(kind: str, head: str, tmp_path: Path) -> None:
    compared = export(model_of(kind, head), tmp_path / "export")
    assert set(compared.differences) == set(roundtrip.OUTPUTS[head])
    assert 0 < max(compared.differences.values()) < 1e-5
    assert (compared.samples, compared.tokens, compared.of_data) == (4, 2 + 33 + 70 + 80, False)
    told = json.loads((tmp_path / "export" / "zerobert.json").read_text())["round_trip"]
    assert told["differences"] == compared.differences
    assert (told["judge"], told["dtype"], told["bound"]) == (compared.judge, "float32", BOUND)
    assert f"float32) and configuration are those of transformers' {compared.judge}; 4 samples of" in str(compared)


def test_weights_of_half_the_bytes_are_compared_in_fp32(tmp_path: Path) -> None:
    compared = export(model_of("modernbert", "masked_lm").to(torch.bfloat16), tmp_path / "export")
    assert compared.dtype == "bfloat16"
    assert max(compared.differences.values()) < 1e-5


def test_an_unchecked_export_says_so(tmp_path: Path) -> None:
    assert export(model_of("bert", "masked_lm"), tmp_path / "export", check=False) is None
    assert json.loads((tmp_path / "export" / "zerobert.json").read_text())["round_trip"] is None


def test_a_head_of_another_task_is_compared_by_its_weights(tmp_path: Path) -> None:
    model = model_of("bert", "masked_lm")
    config: Any = described(model.config, "BertForNextSentencePrediction")
    weights = ARCHITECTURES.get("bert").build("pretraining", config, False).state_dict()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("cls.predictions.")}
    compared = export_huggingface(kept, config, TOKENIZER, tmp_path / "export")
    assert compared is not None
    assert compared.differences == {}
    assert str(compared).endswith("its logits were not compared: the head is none of ours")


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_a_wrong_tensor_is_refused(kind: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one tensor, by what float32 can just tell; nothing stays, and an earlier export does."""
    export(model_of(kind, head), tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()

    def save_wrong(weights: dict[str, Tensor], path: Path, **options: Any) -> None:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        first = changed[min(changed)].view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(9.0))
        save_file(changed, path, **options)

    monkeypatch.setattr(export_folder, "save_file", save_wrong)
    pattern = r".*, as our modules read it, is not what was exported; it was not written: .*--check false$"
    assert_refused(lambda: export(model_of(kind, head), tmp_path / "export"), pattern)
    assert_refused(lambda: export(model_of(kind, head), tmp_path / "other"), pattern)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before


THETA = {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in ("full_attention", "sliding_attention")}
CONFIGURATIONS = [
    ("bert", "masked_lm", "hidden_act", "relu"),
    ("bert", "pretraining", "layer_norm_eps", 1e-3),
    ("bert", "sequence_classification", "hidden_act", "gelu_new"),
    ("modernbert", "masked_lm", "norm_eps", 1e-3),
    ("modernbert", "masked_lm", "rope_parameters", THETA),
    ("modernbert", "masked_lm", "local_attention", 32),
    ("modernbert", "sequence_classification", "classifier_pooling", "mean"),
    ("roberta", "masked_lm", "hidden_act", "relu"),
    ("roberta", "masked_lm", "pad_token_id", 0),
]


@pytest.mark.parametrize(("kind", "head", "field", "value"), CONFIGURATIONS)
def test_a_wrong_field_of_the_configuration_is_refused(
    kind: str, head: str, field: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name; were it not compared, by the logits."""
    model = model_of(kind, head)
    export(model, tmp_path / "export")
    edit(tmp_path / "export", **{field: value})
    assert_refused(lambda: check(model, tmp_path / "export"), rf"its config\.json has {field} ")
    monkeypatch.setattr(roundtrip, "_compare_configurations", lambda written, config: None)
    output = roundtrip.OUTPUTS[head][0]
    allowed = rf"allowed is {BOUND:.1e}; the first is row \d+ of \d+"
    pattern = rf"{output} of transformers' \w+ differ from ours by \d\.\de[-+]\d+ of the largest, {allowed}"
    assert_refused(lambda: check(model, tmp_path / "export"), pattern)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_that_is_not_tied_is_refused(kind: str, tmp_path: Path) -> None:
    model, folder = model_of(kind, "masked_lm"), tmp_path / "export"
    export(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, DECODERS[kind]: torch.ones(TOKENS, 32)}, folder / "model.safetensors")
    assert_refused(lambda: check(model, folder), f".*{DECODERS[kind]}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, tie_word_embeddings=False)
    assert_refused(lambda: check(model, folder), r"its config\.json has tie_word_embeddings False and the model True")


@pytest.mark.parametrize("change", ["missing", "more"])
def test_another_set_of_tensors_is_refused(change: str, tmp_path: Path) -> None:
    model, folder = model_of("modernbert", "masked_lm"), tmp_path / "export"
    export(model, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["head.norm.weight"]
    else:
        weights["head.norm.scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(lambda: check(model, folder), r".*head\.norm\.")


def test_modules_that_compute_something_else_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and configuration being right: a fault of ours, or another release of transformers."""
    entry = ARCHITECTURES.get("bert")
    build = entry.build

    def build_wrong(head: str, config: Any, activation_checkpointing: bool) -> nn.Module:
        model: Any = build(head, config, activation_checkpointing)
        model.bert.encoder.layer[2].output.LayerNorm.eps = 1e-3
        return model

    model = model_of("bert", "pretraining")
    monkeypatch.setattr(entry, "build", build_wrong)
    assert_refused(lambda: export(model, tmp_path / "export"), "prediction_logits of transformers' BertForPreTraining")
    assert not list(tmp_path.iterdir())


def test_a_model_that_diverged_is_refused(tmp_path: Path) -> None:
    model: Any = model_of("bert", "masked_lm")
    nn.init.constant_(model.bert.embeddings.LayerNorm.weight, float("inf"))
    assert_refused(lambda: export(model, tmp_path / "export"), "its logits are not finite")


def test_a_check_leaves_the_generator_of_dropout_alone(tmp_path: Path) -> None:
    model = model_of("bert", "masked_lm")
    before = torch.get_rng_state()
    export(model, tmp_path / "export")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_samples_fit_the_model() -> None:
    """No padding token, which RoBERTa gives no position; two segments where the model tells them apart."""
    for kind, segments in (("bert", {0, 1}), ("roberta", {0}), ("modernbert", {0})):
        config: Any = model_of(kind, "masked_lm", max_position_embeddings=20).config
        samples = random_samples(config)
        longest = ARCHITECTURES.get(kind).positions(config)
        assert [len(sample.ids) for sample in samples] == [2, longest]
        assert {segment for sample in samples for segment in sample.segments} == segments
        assert 1 not in {token for sample in samples for token in sample.ids}
        assert samples == random_samples(config)


def test_samples_of_a_packed_batch_are_cut() -> None:
    lengths = torch.tensor([3, 300, *([2] * 8)])
    ids = torch.arange(int(lengths.sum()))
    samples = packed_samples({"input_ids": ids, "token_type_ids": ids % 2, "lengths": lengths})
    assert samples is not None
    assert samples[0] == Sample((0, 1, 2), (0, 1, 0))
    assert samples[1].ids == tuple(range(3, 131))
    assert samples[2].ids == (303, 304)
    assert len(samples) == 4
    assert packed_samples({"pixels": ids}) is None


def test_samples_of_data_are_told(tmp_path: Path) -> None:
    samples = [Sample((5, 6, 7), (0, 0, 1)), Sample((8,), (0,))]
    compared = export(model_of("bert", "pretraining"), tmp_path / "export", samples=samples)
    assert (compared.samples, compared.tokens, compared.of_data) == (2, 4, True)
    assert "; 2 samples of the data, 4 tokens: largest relative difference of a logit " in str(compared)
