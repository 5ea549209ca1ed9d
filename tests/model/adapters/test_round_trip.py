"""Trained, reloaded, merged, and opened by peft or transformers: one model, of every method, head and architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from engine.config import AdapterConfig, architecture_of
from engine.config.methods.adapter import IN_FOLDER, MERGEABLE
from engine.export import AS_IT_IS, Wish, _write_adapted
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.folder import BASE_WEIGHTS, open_adapted, rebuilt
from engine.model.adapters.places import place, plain
from engine.model.folder import described
from engine.model.pretrained import base_weights, load_pretrained
from engine.model.roundtrip import own_logits, packed, random_samples, their_logits
from engine.predict.model import ModelFolder
from tests.model.adapters.adapted import CASES
from tests.model.test_task_heads import HEADS, config_of

BOUND = 1e-5
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By architecture, folders of an encoder alone and of one with MLM's head, which has no pooler."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name in ("bert", "modernbert"):
        for head in ("encoder", "masked_lm"):
            config = config_of(name, "sequence_classification")
            torch.manual_seed(4)
            whole = architecture_of(config).export_class(architecture_of(config).class_for("masked_lm"))(config)
            (folder / name / head).mkdir(parents=True)
            model = whole if head == "masked_lm" else with_pooler(whole, config)
            model.save_pretrained(folder / name / head)
            found[name, head] = folder / name / head
    return found


def with_pooler(model: Any, config: Any) -> Any:
    import transformers

    return transformers.AutoModel.from_config(config) if config.model_type == "bert" else model.model


def trained(base: Path, name: str, head: str, case: str, new_tokens: int = 0) -> tuple[nn.Module, Any, Adaptation]:
    """A model whose trained parameters are no longer those of its start."""
    options, freeze = CASES[case]
    adaptation = Adaptation(AdapterConfig(**options), freeze, 1, 10, str(base))
    config = config_of(name, head)
    config.vocab_size += new_tokens
    config = described(config, architecture_of(config).class_for(head))
    torch.manual_seed(8)
    model = rebuilt(config, head, base, adaptation)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), config, adaptation


def write(model: nn.Module, config: Any, adaptation: Adaptation, out: Path, wish: Wish = AS_IT_IS) -> Any:
    origin = {"facts": {BASE_WEIGHTS: base_weights(adaptation.base)}}
    return _write_adapted(model, config, {}, out, origin, adaptation, wish)


@torch.no_grad()
def logits(model: nn.Module, head: str, config: Any) -> Tensor:
    batch = packed(random_samples(config))
    found = own_logits(model.eval(), head, batch, torch.arange(len(batch["input_ids"])))
    return torch.cat([found[name] for name in sorted(found)], 1)


@torch.no_grad()
def logits_of_theirs(model: Any, head: str, config: Any) -> Tensor:
    names = ("end_logits", "start_logits") if head == "question_answering" else ("logits",)
    samples = random_samples(config)
    found = their_logits(model, head, samples, torch.arange(sum(len(sample.ids) for sample in samples)), names)
    return torch.cat([found[name] for name in names], 1)


def opened(folder: Path, base: Path, config: Any) -> Any:
    """As a user of peft and transformers opens it."""
    import transformers

    kind = getattr(transformers, config.architectures[0])
    own = type(config).from_pretrained(folder)
    under = kind.from_pretrained(base, config=own, ignore_mismatched_sizes=True, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(under, folder).eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def cases() -> list[Any]:
    """Every encoder with each head and each case; the fast suite has the first of all heads and of all cases."""
    heads = [head for head in HEADS if head != "embeddings"]
    given = [case for case, (options, _) in CASES.items() if options.get("method") in IN_FOLDER]
    return [
        pytest.param(name, head, case, marks=[] if head == heads[0] or case == given[0] else pytest.mark.slow)
        for name in ("bert", "modernbert")
        for head in heads
        for case in given
    ]


@pytest.mark.parametrize(("name", "head", "case"), cases())
def test_a_folder_of_adapters_is_the_trained_model(
    name: str, head: str, case: str, bases: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    base = bases[name, "encoder"]
    model, config, adaptation = trained(base, name, head, case)
    truth = logits(model, head, config)
    told = write(model, config, adaptation, tmp_path / "adapters")
    assert logits(open_adapted(tmp_path / "adapters", config, head), head, config).equal(truth)
    predicting = ModelFolder(tmp_path / "adapters", config, head, {}).load(torch.device("cpu"), "fp32")
    assert apart(logits(predicting, head, config), truth) < BOUND
    method = adaptation.adapter.method
    if method != "houlsby":
        assert max(told.differences.values()) < BOUND
        theirs = opened(tmp_path / "adapters", base, config)
        assert apart(logits_of_theirs(theirs, head, config), truth) < BOUND
        only_the_trained_are_replaced(theirs, model)
    if method in MERGEABLE:
        assert not [name for name, module in predicting.named_modules() if "lora" in name or "ia3" in name]
        merged = write(model, config, adaptation, tmp_path / "whole", Wish(merge=True))
        assert max(merged.differences.values()) < BOUND
        import transformers

        plain_model = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path / "whole")
        assert apart(logits_of_theirs(plain_model.eval(), head, config), truth) < BOUND


def only_the_trained_are_replaced(theirs: Any, model: nn.Module) -> None:
    """peft looks for the modules that it replaces by the ends of their names."""
    replaced = [name for name, module in theirs.named_modules() if hasattr(module, "modules_to_save")]
    own = [name.removeprefix("base_model.model.") for name in replaced]
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    trained = [name for name in trained if "ia3_" not in name]
    assert all(any(name.startswith(f"{module}.") for module in own) for name in trained)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not [name for name in frozen if any(plain(name).startswith(f"{module}.") for module in own)]


@pytest.mark.parametrize(
    "case", ["lora", "houlsby", *(pytest.param(case, marks=pytest.mark.slow) for case in ("dora", "ia3"))]
)
@pytest.mark.parametrize(
    ("name", "head", "kind", "new_tokens"),
    [
        ("bert", "sequence_classification", "masked_lm", 0),
        ("bert", "multiple_choice", "masked_lm", NEW_TOKENS),
        ("bert", "token_classification", "encoder", NEW_TOKENS),
        ("bert", "question_answering", "masked_lm", 0),
        ("modernbert", "sequence_classification", "masked_lm", NEW_TOKENS),
        ("modernbert", "token_classification", "encoder", NEW_TOKENS),
    ],
)
def test_what_the_base_lacks_is_trained_and_saved(
    name: str, head: str, kind: str, new_tokens: int, case: str, bases: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    base = bases[name, kind]
    model, config, adaptation = trained(base, name, head, case, new_tokens)
    free = {plain(key) for key, parameter in model.named_parameters() if parameter.requires_grad}
    pooled = name == "bert" and head in ("sequence_classification", "multiple_choice")
    assert ("bert.pooler.dense.weight" in free) == (pooled and kind == "masked_lm")
    assert any("_embeddings.weight" in key for key in free) == bool(new_tokens)
    truth = logits(model, head, config)
    told = write(model, config, adaptation, tmp_path / "adapters")
    assert logits(open_adapted(tmp_path / "adapters", config, head), head, config).equal(truth)
    if case != "houlsby":
        assert max(told.differences.values()) < BOUND
        theirs = opened(tmp_path / "adapters", base, config)
        assert apart(logits_of_theirs(theirs, head, config), truth) < BOUND
        only_the_trained_are_replaced(theirs, model)
        merged = write(model, config, adaptation, tmp_path / "whole", Wish(merge=True))
        assert max(merged.differences.values()) < BOUND


@pytest.mark.parametrize(("method", "name"), [("prompt", "bert"), ("prompt", "modernbert"), ("prefix", "bert")])
def test_virtual_tokens_of_answers_keep_the_segments(
    method: str, name: str, bases: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, method, ({"method": method, "virtual_tokens": 3}, None))
    model, config, adaptation = trained(bases[name, "encoder"], name, "question_answering", method)
    told = write(model, config, adaptation, tmp_path / "adapters")
    assert max(told.differences.values()) < BOUND


@pytest.mark.parametrize("case", ["bitfit", "freeze", "freeze the encoder"])
def test_methods_without_adapters_export_a_whole_model(
    case: str, bases: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    model, config, adaptation = trained(bases["bert", "encoder"], "bert", "token_classification", case)
    told = write(model, config, adaptation, tmp_path / "whole")
    assert max(told.differences.values()) < BOUND
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_the_seed_alone_draws_adapters(bases: dict[tuple[str, str], Path]) -> None:
    base, head = bases["bert", "encoder"], "sequence_classification"
    config = described(config_of("bert", head), "BertForSequenceClassification")
    first = Adaptation(AdapterConfig(method="lora"), None, 1, 10, str(base))
    torch.manual_seed(1)
    architecture = architecture_of(config)
    model = architecture.build(head, config, False)
    loaded = load_pretrained(model, base)
    before = torch.random.get_rng_state()
    first.apply(model, loaded)
    assert torch.random.get_rng_state().equal(before)
    models = [model, *(rebuilt(config, head, base, replace(first, seed=seed)) for seed in (1, 2))]
    drawn = [
        {name: p for name, p in each.named_parameters() if p.requires_grad and place(name, "bert.")[0] != "head"}
        for each in models
    ]
    assert all(drawn[0][name].equal(drawn[1][name]) for name in drawn[0])
    assert not any(drawn[0][name].equal(drawn[2][name]) for name in drawn[0] if "lora_A" in name)
