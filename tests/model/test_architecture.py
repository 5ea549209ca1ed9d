"""An architecture that tests/model/gated.py registers is built, counted, trained and exported as ours is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.config import ARCHITECTURES, ModelConfig, architecture_of
from engine.data.store.store import open_store
from engine.errors import UserError
from engine.kernels.dispatch import select
from engine.model.build import build_config, initialise
from engine.model.flops import forward_flops
from engine.model.folder import described, export_huggingface, tokenizer_files
from engine.model.packing import pack
from engine.model.pretrained import load_config, load_pretrained
from engine.tasks.pretrain import Pretraining
from engine.tasks.sequence import SequenceClassification
from launch.configure.start_model import folder_config, with_folder
from launch.forecast.memory import Workload, forecast, shape_of
from tests.conftest import ROOT
from tests.model.gated import GatedConfig, GatedEntry, GatedForPreTraining
from tests.train.runs import NO_DROPOUT, losses, start_warm

SMALL = ModelConfig(hidden_size=64, layers=3, heads=4, intermediate_size=96, max_positions=48, architecture="gated")
AS_BERT = replace(SMALL, architecture=None)
TOKENS = 1000


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ARCHITECTURES.register("gated", GatedEntry())
    yield
    ARCHITECTURES.remove("gated")


def built(seed: int = 0, tokens: int = TOKENS) -> nn.Module:
    config = build_config(SMALL, tokens)
    model = architecture_of(config).build("pretraining", config, False)
    initialise(model, seed)
    return model


def exported(model: nn.Module, folder: Path, tokenizer: dict[str, bytes] | None = None) -> Path:
    config = described(model.config, architecture_of(model.config).export_classes["pretraining"])
    export_huggingface(model.state_dict(), config, tokenizer or {"vocab.txt": b"[PAD]\n"}, folder)
    return folder


def test_the_shape_has_the_parameters_of_the_module() -> None:
    model, shape = built(), shape_of(SMALL, TOKENS)
    assert shape == ARCHITECTURES.get("gated").shape_of(model.config)
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    layer = model.get_submodule("bert.encoder.layer.0")
    assert shape.layer_parameters() == sum(p.numel() for p in layer.parameters())
    assert shape.parameters() != shape_of(AS_BERT, TOKENS).parameters()


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """torch's counter doesn't know our kernels."""
    select("reference")
    yield
    select("auto")


@pytest.mark.usefixtures("plain_torch")
def test_flops_are_those_that_torch_counts() -> None:
    model = built().eval()
    batch = pack(torch.randint(5, TOKENS, (2, 40)), torch.ones(2, 40))
    masked = torch.tensor([1, 2, 3, 50, 51, 52])
    labels = {"mlm_positions": masked, "mlm_labels": masked, "nsp_labels": torch.zeros(2, dtype=torch.long)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch, **labels, max_length=40)
    # torch's attention takes all queries of the last layer; of masked tokens only the projection is counted
    asked = 2 * (80 - 2 - 6) * 64 * 64 + 4 * (80 - 2) * 40 * 64
    counted = forward_flops(shape_of(SMALL, TOKENS), [40, 40], 6)
    assert counted + asked == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_forecast_of_its_folder_is_of_its_shape(tmp_path: Path) -> None:
    found = folder_config(str(exported(built(), tmp_path / "gated")))
    assert found is not None
    model = with_folder(ModelConfig(init_from="gated"), found)
    work = Workload(shape_of(model, found.vocabulary), 48, 8, 0, 1, 1, "fp32", accelerator="cpu")
    assert work.shape == shape_of(SMALL, TOKENS)
    as_bert = replace(work, shape=shape_of(AS_BERT, TOKENS))
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
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(
        UserError,
        match=r"model_type is 't5'; give a model of type 'bert' or 'modernbert' or .* or 'gated'",
    ):
        load_config(tmp_path)


def test_it_trains_the_same_under_zero_0_and_3_and_its_export_has_what_it_learned(store: Path, tmp_path: Path) -> None:
    prepared = open_store(str(store))
    tokens, tokenizer = prepared.tokenizer.vocab_size, tokenizer_files(prepared.tokenizer_path)
    base = exported(built(tokens=tokens), tmp_path / "base", tokenizer)
    options = [*NO_DROPOUT, f"--data.path={store}", f"--model.init_from={base}", "--data.sequence_length=48"]
    options.append("--train.steps=4")
    curves = {}
    for stage, ranks in ((0, 1), (3, 2)):
        out = tmp_path / str(stage)
        script = str(ROOT / "tests/model/gated.py")
        process = start_warm(
            out, *options, "--train.steps=4", f"--train.zero_stage={stage}", ranks=ranks, script=script
        )
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
        assert "update verified: step 1" in printed
        curves[stage] = [loss for _, loss in losses(out)]
    assert curves[3] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0]
    learned = GatedForPreTraining.from_pretrained(tmp_path / "3" / "export").state_dict()
    before = built(tokens=tokens).state_dict()
    gate = "bert.encoder.layer.1.intermediate.gate.weight"
    assert not torch.equal(learned[gate], before[gate])
    again = built(seed=1, tokens=tokens)
    load_pretrained(again, tmp_path / "3" / "export")
    assert torch.equal(again.state_dict()[gate], learned[gate])


def test_a_task_whose_head_it_lacks_is_refused() -> None:
    config = GatedConfig()
    with pytest.raises(UserError, match=r"^model\.init_from: a model of type 'gated' has no head for sequence_class"):
        SequenceClassification.export_class(config)
    assert Pretraining.export_class(config) == "GatedForPreTraining"
