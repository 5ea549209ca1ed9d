"""The same adapters in one of our models and, put there by other code, in transformers' model of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from engine.config import AdapterConfig, architecture_of
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.places import place, plain
from engine.model.pretrained import LoadReport
from tests.model.test_task_heads import both

#: what is trained, by a name of ours: options of the adapter, and train.freeze
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "lora": ({"method": "lora", "rank": 4}, None),
    "lora, some layers": ({"method": "lora", "rank": 2, "alpha": 3.0, "targets": "attention"}, "layers:0-1"),
    "rslora": ({"method": "lora", "rank": 4, "rslora": True, "targets": "feed-forward"}, None),
    "dora": ({"method": "dora", "rank": 4}, None),
    "ia3": ({"method": "ia3"}, None),
    "houlsby": ({"method": "houlsby", "bottleneck": 6}, None),
    "bitfit": ({"method": "bitfit"}, None),
    "freeze": ({}, "embeddings,layers:0-1"),
    "freeze the encoder": ({}, "encoder"),
}
#: by architecture, transformers' names of the linear layers
ALL: dict[str, list[str]] = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "modernbert": ["Wqkv", "attn.Wo", "Wi", "mlp.Wo"],
}
ATTENTION = {"bert": ["query", "key", "value", "attention.output.dense"], "modernbert": ["Wqkv", "attn.Wo"]}
FEED_FORWARD = {"bert": r".*layer\.\d+\.(intermediate|output)\.dense", "modernbert": ["Wi", "mlp.Wo"]}
IA3 = {
    "bert": ("key|value", r"layer\.\d+\.output\.dense"),
    "modernbert": ("Wqkv", r"mlp\.Wo"),
}
BEHIND = {"bert": ("attention.output.dense", "output.dense"), "modernbert": ("attn.Wo", "mlp.Wo")}


@dataclass
class Pair:
    """Our model, transformers' one, and by our names what is trained of each."""

    ours: nn.Module
    theirs: nn.Module
    own: dict[str, nn.Parameter]
    other: dict[str, nn.Parameter]


def fresh_head(model: Any) -> LoadReport:
    """What a model has from a folder without a head."""
    names = [name for name, _ in model.named_parameters()]
    prefix = architecture_of(model.config).prefix
    heads = [name for name in names if place(name, prefix)[0] == "head"]
    return LoadReport(tuple(name for name in names if name not in heads), tuple(heads), (), prefix)


def adapted(architecture: str, head: str, case: str) -> Pair:
    """Both models with the same trained values, drawn so that each has a gradient."""
    options, freeze = CASES[case]
    theirs, ours = both(architecture, head)
    loaded = fresh_head(ours)
    Adaptation(AdapterConfig(**options), freeze, seed=1, steps=10, base="").apply(ours, loaded)
    own = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    theirs, other = OTHERS[case.partition(",")[0]](theirs, architecture, case, set(loaded.initialised))
    assert own.keys() == other.keys()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in own.items():
            if plain(name) not in loaded.taken and name not in loaded.initialised:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            other[name].copy_(parameter)
    return Pair(ours.eval(), theirs.eval(), own, other)


Others = Callable[[Any, str, str, set[str]], tuple[nn.Module, dict[str, nn.Parameter]]]


def by_peft(model: Any, architecture: str, case: str, head: set[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """What a user of peft writes."""
    save = sorted({name.partition(".")[0] for name in head})
    layers = list(range(2, 3)) if case == "lora, some layers" else None
    if case == "ia3":
        attention, feed_forward = IA3[architecture]
        target, behind = rf".*\.({attention}|{feed_forward})", rf".*{feed_forward}"
        config: Any = peft.IA3Config(target_modules=target, feedforward_modules=behind, modules_to_save=save)
    else:
        values = {
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ALL[architecture]},
            "lora, some layers": {"r": 2, "lora_alpha": 3, "target_modules": ATTENTION[architecture]},
            "rslora": {"r": 4, "lora_alpha": 8, "target_modules": FEED_FORWARD[architecture], "use_rslora": True},
            "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL[architecture], "use_dora": True},
        }[case]
        config = peft.LoraConfig(**values, layers_to_transform=layers, modules_to_save=save)
    wrapped = peft.get_peft_model(model, config)
    named = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    return wrapped, named


def by_hooks(model: Any, architecture: str, case: str, head: set[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Bottlenecks as a formula behind a module's output."""
    named = dict(model.named_parameters())
    found = {name: named[name] for name in head}
    width = CASES[case][0]["bottleneck"]

    def added(name: str, outputs: int) -> Any:
        shapes = {"down": (width, outputs), "up": (outputs, width)}
        for part, shape in shapes.items():
            found[f"{name}.{part}.weight"] = nn.Parameter(torch.zeros(shape))
            found[f"{name}.{part}.bias"] = nn.Parameter(torch.zeros(shape[0]))

        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            down, up, down_bias, up_bias = (
                found[f"{name}.{part}.{kind}"] for kind in ("weight", "bias") for part in ("down", "up")
            )
            inner = output @ down.t() + down_bias
            inner = 0.5 * inner * (1.0 + torch.erf(inner / 2**0.5))
            return output + inner @ up.t() + up_bias

        return hook

    for name, module in model.named_modules():
        if name.endswith(BEHIND[architecture]) and "layer" in name:
            module.register_forward_hook(added(name, module.out_features))
    return model, found


def by_flags(model: Any, architecture: str, case: str, head: set[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """requires_grad, as a user of transformers sets it."""
    lowest = {"bert": "bert.encoder.layer.2.", "modernbert": "model.layers.2."}[architecture]
    later = {"bert": "bert.pooler.", "modernbert": "model.final_norm."}[architecture]
    for name, parameter in model.named_parameters():
        wanted = {
            "bitfit": name.endswith(".bias"),
            "freeze": name.startswith((lowest, later)),
            "freeze the encoder": False,
        }[case]
        parameter.requires_grad_(name in head or wanted)
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


OTHERS: Mapping[str, Others] = {
    **dict.fromkeys(("lora", "rslora", "dora", "ia3"), by_peft),
    "houlsby": by_hooks,
    **dict.fromkeys(("bitfit", "freeze", "freeze the encoder"), by_flags),
}
