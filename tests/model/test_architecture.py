"""An architecture that this module registers: BERT without the layers' biases and with a gated feed-forward network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, PreTrainedModel

from engine.config import ARCHITECTURES, ModelConfig, architecture_of
from engine.errors import UserError
from engine.model.bert_entry import BertEntry
from engine.model.build import build_config, initialise
from engine.model.flops import forward_flops
from engine.model.folder import described, export_huggingface
from engine.model.layers import BertLinear
from engine.model.packing import pack
from engine.model.pretrained import load_config, load_pretrained
from launch.configure.start_model import folder_config, with_folder
from launch.forecast.memory import Workload, forecast, shape_of

SMALL = ModelConfig(hidden_size=64, layers=3, heads=4, intermediate_size=96, max_positions=48)
TOKENS = 1000


class GatedConfig(BertConfig):
    model_type = "gated"


class GatedDense(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = nn.functional.silu(self.gate(hidden)) * self.up(hidden)
        return gated


class GatedEntry(BertEntry):
    feed_forward_matrices = 3
    biases = False
    export_classes: ClassVar = {"pretraining": "GatedForPreTraining"}

    def config_class(self) -> type[Any]:
        return GatedConfig

    def build(self, head: str, config: GatedConfig, activation_checkpointing: bool) -> nn.Module:
        model = super().build(head, config, activation_checkpointing)
        for layer in model.get_submodule("bert.encoder.layer").children():
            layer.intermediate = GatedDense(config)
            for module in layer.modules():
                if isinstance(module, BertLinear):
                    module.register_parameter("bias", None)
        return model

    def export_class(self, name: str) -> type[Any]:
        return GatedForPreTraining if name == "GatedForPreTraining" else super().export_class(name)


class GatedForPreTraining(PreTrainedModel):
    """What a package of its own would have for transformers' users."""

    config_class = GatedConfig
    _tied_weights_keys = GatedEntry.tied

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        built = GatedEntry().build("pretraining", config, False)
        self.bert, self.cls = built.bert, built.cls
        self.post_init()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ARCHITECTURES.register("gated", GatedEntry())
    yield
    ARCHITECTURES.remove("gated")


def built(seed: int = 0) -> nn.Module:
    config = build_config(SMALL, TOKENS, architecture="gated")
    model = architecture_of(config).build("pretraining", config, False)
    initialise(model, seed)
    return model


def exported(model: nn.Module, folder: Path) -> Path:
    config = described(model.config, architecture_of(model.config).export_classes["pretraining"])
    export_huggingface(model.state_dict(), config, {"vocab.txt": b"[PAD]\n"}, folder)
    return folder


def test_the_shape_has_the_parameters_of_the_module() -> None:
    model, shape = built(), shape_of(SMALL, TOKENS, "gated")
    assert shape == ARCHITECTURES.get("gated").shape_of(model.config)
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    layer = model.get_submodule("bert.encoder.layer.0")
    assert shape.layer_parameters() == sum(p.numel() for p in layer.parameters())
    assert shape.parameters() != shape_of(SMALL, TOKENS).parameters()


def test_flops_are_those_that_torch_counts() -> None:
    model = built().eval()
    batch = pack(torch.randint(5, TOKENS, (2, 40)), torch.ones(2, 40))
    masked = torch.tensor([1, 2, 3, 50, 51, 52])
    labels = {"mlm_positions": masked, "mlm_labels": masked, "nsp_labels": torch.zeros(2, dtype=torch.long)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch, **labels, max_length=40)
    # torch's attention takes all queries of the last layer; of masked tokens only the projection is counted
    asked = 2 * (80 - 2 - 6) * 64 * 64 + 4 * (80 - 2) * 40 * 64
    counted = forward_flops(shape_of(SMALL, TOKENS, "gated"), [40, 40], 6)
    assert counted + asked == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_forecast_of_its_folder_is_of_its_shape(tmp_path: Path) -> None:
    found = folder_config(str(exported(built(), tmp_path / "gated")))
    assert found is not None
    model = with_folder(ModelConfig(init_from="gated"), found)
    work = Workload(shape_of(model, found.vocabulary, found.architecture), 48, 8, 0, 1, 1, "fp32", accelerator="cpu")
    assert work.shape == shape_of(SMALL, TOKENS, "gated")
    as_bert = replace(work, shape=shape_of(SMALL, TOKENS))
    more = work.shape.parameters() - as_bert.shape.parameters()
    assert forecast(work).parameters - forecast(as_bert).parameters == 4 * more
    assert forecast(work).activations > forecast(as_bert).activations


def test_its_gradients_flow_and_its_export_loads_again(tmp_path: Path) -> None:
    model = built()
    batch = pack(torch.randint(5, TOKENS, (2, 40)), torch.ones(2, 40))
    masked = torch.tensor([1, 50])
    labels = {"mlm_positions": masked, "mlm_labels": masked, "nsp_labels": torch.zeros(2, dtype=torch.long)}
    model(**batch, **labels, max_length=40)["mlm_loss_sum"].backward()
    assert all(layer.intermediate.gate.weight.grad.any() for layer in model.bert.encoder.layer)
    folder = exported(model, tmp_path / "gated")
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["architectures"]) == ("gated", ["GatedForPreTraining"])
    again = built(seed=1)
    report = load_pretrained(again, folder)
    assert not report.initialised
    assert not report.unused
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    theirs = GatedForPreTraining.from_pretrained(folder)
    assert torch.equal(
        theirs.bert.encoder.layer[2].intermediate.up.weight, model.bert.encoder.layer[2].intermediate.up.weight
    )
    config = build_config(replace(SMALL, init_from=str(folder)), TOKENS)
    assert isinstance(config, GatedConfig)
    assert ARCHITECTURES.get("gated").layer_of("bert.encoder.layer.2.intermediate.up.weight") == "layer.2"


def test_a_folder_of_no_architecture_is_refused_with_all_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UserError, match=r"model_type is 'roberta'; give a model of type 'bert' or 'gated'"):
        load_config(tmp_path)
