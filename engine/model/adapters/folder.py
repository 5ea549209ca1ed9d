"""Adapters as a folder beside their base: written so that peft opens it, read again, and computed into the base.

adapter_model.safetensors   adapters, head and whatever else was trained, under peft's names
adapter_config.json         what peft needs to know; of a method that it has
config.json, tokenizer, zerobert.json   as of any export; the last one tells the base by path and SHA-256
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import AdapterConfig, architecture_of
from engine.config.methods.adapter import MERGEABLE, VIRTUAL
from engine.errors import UserError
from engine.hub import hub_model, local_folder
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.judge import VirtualJudge, judged_by
from engine.model.adapters.places import ADAPTER, BASE, place, plain, prefix_of
from engine.model.adapters.virtual import VECTORS, joined, split
from engine.model.folder import (
    ORIGIN_FILE,
    export_huggingface,
    is_intact,
    read_origin,
    whole_folder,
    write_description,
    write_origin,
)
from engine.model.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_weights, load_pretrained
from engine.model.roundtrip import RoundTrip, Sample, compare_logits, compare_models, random_logits, random_samples

#: in zerobert.json, how the model was adapted, and to what
ADAPTATION = "adaptation"
#: in a run's facts, the SHA-256 of the weights that it started from
BASE_WEIGHTS = "base weights"
#: what peft puts before the names of a model's parameters
PEFT_PREFIX = "base_model.model."
#: the same of a model with trained vectors in front of each sequence, and what it calls these
PROMPT_PREFIX, PROMPT = "base_model.", "prompt_embeddings"
#: what it calls the only adapter of a model, in the names of its parameters
ADAPTER_NAME = f".{ADAPTER}"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters over the weights of another one, ours or another library's."""
    return any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))


def export_trained(
    weights: Mapping[str, Tensor],
    config: Any,
    tokenizer: Mapping[str, bytes],
    out: Path,
    origin: Mapping[str, Any],
    adaptation: Adaptation | None,
    samples: Sequence[Sample] | None = None,
) -> RoundTrip | None:
    """Write what a run trained: adapters beside their base, or else the whole model.

    See `export_adapter` and `engine.model.folder.export_huggingface` for arguments and errors.
    """
    if adaptation is not None and adaptation.is_beside_base:
        return export_adapter(weights, config, tokenizer, out, origin, adaptation, samples)
    if adaptation is not None and adaptation.is_partial:  # in half precision the frozen ones have been rounded
        own = rebuilt(config, head_of(config), local_folder(adaptation.base), adaptation)
        weights = {name: weights[name] if each.requires_grad else each for name, each in own.named_parameters()}
    return export_huggingface(weights, config, tokenizer, out, origin, samples=samples)


def export_adapter(
    weights: Mapping[str, Tensor],
    config: Any,
    tokenizer: Mapping[str, bytes],
    out: Path,
    origin: Mapping[str, Any],
    adaptation: Adaptation,
    samples: Sequence[Sample] | None = None,
    *,
    check: bool = True,
) -> RoundTrip | None:
    """Write adapters and head to `out`, once peft has computed from them what our modules do; or nothing.

    Args:
        weights: every parameter of the adapted model, whole, under our names; of these the trained ones are written.
        config: as `described` returns it.
        tokenizer: the content of its files.
        origin: what zerobert.json tells of the weights, with the run's facts.
        samples: see `check_round_trip`.
        check: whether peft is asked.

    Returns:
        What was compared; None of a method that peft doesn't have.

    Raises:
        UserError: `out` exists and is no export, or the folder isn't the model.
    """
    head, base = head_of(config), local_folder(adaptation.base)
    found = str(base.absolute()) if hub_model(adaptation.base) is None else adaptation.base
    own = rebuilt(config, head, base, adaptation)
    trained = {name: weights[name] for name, parameter in own.named_parameters() if parameter.requires_grad}
    with whole_folder(out) as partial:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved(trained).items()}
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_description(partial, config, tokenizer)
        told = replace(adaptation, base=found)
        known = _write_peft_config(partial, own, head, told)
        fill(own, _read(partial), partial)
        compare_weights(own, weights)
        compared = _compare(partial, base, own, adaptation, head, samples) if known and check else None
        write_origin(partial, {**origin, ADAPTATION: asdict(told)}, compared)
    return compared


def saved_name(name: str, prefix: str = PEFT_PREFIX) -> str:
    """What peft calls a parameter of an adapted model in a folder.

    >>> saved_name("bert.encoder.layer.0.attention.self.query.lora_A.default.weight")
    'base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight'
    """
    short = name.replace(ADAPTER_NAME, "")
    return prefix + short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def saved(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters of a model, in their order, as peft keeps them in a folder."""
    vectors = joined(trained)
    if vectors is None:
        return {saved_name(name): tensor for name, tensor in trained.items()}
    others = {saved_name(name, PROMPT_PREFIX): each for name, each in trained.items() if not name.endswith(VECTORS)}
    return {PROMPT: vectors, **others}


def restored(tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a folder under our names, without those that it lacks: the inverse of `saved`.

    Args:
        trained: parameters of the model that the folder is read to.
    """
    virtual = any(name.endswith(VECTORS) for name in trained)
    names = {name: saved_name(name, PROMPT_PREFIX if virtual else PEFT_PREFIX) for name in trained}
    found = {name: tensors[theirs] for name, theirs in names.items() if theirs in tensors}
    whole = tensors.get(PROMPT) if virtual else None
    return found | split(whole, trained) if whole is not None and whole.dim() == 2 else found


def head_of(config: Any) -> str:
    """The head of the class that config.json names."""
    heads = {name: head for head, name in architecture_of(config).export_classes.items()}
    return heads[config.architectures[0]]


def rebuilt(config: Any, head: str, base: Path, adaptation: Adaptation) -> nn.Module:
    """The model that a run begins with, but for the values of its head: base weights, adapters as they are drawn.

    Torch's global generator isn't moved: a run that exports goes on with the same dropout.
    """
    architecture = architecture_of(config)
    with torch.random.fork_rng(devices=[]):
        model = architecture.build(head, config, False).float()
    names = [name for name, _ in model.named_parameters()]
    prefix = prefix_of(names, architecture)
    own = tuple(name for name in names if place(name, prefix)[0] == "head")
    adaptation.apply(model, load_pretrained(model, base, without=own))
    return model


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Give all trained parameters of a model their values, by the names that peft has for them.

    Raises:
        UserError: one is missing or of another shape.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    values = restored(tensors, trained)
    for name, parameter in trained.items():
        tensor = values.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{where}: {name} {found} and {tuple(parameter.shape)} is needed; copy the folder again")
        parameter.copy_(tensor)


def open_adapted(folder: Path, config: Any, head: str, base: str | None = None) -> nn.Module:
    """The model of a folder of adapters, over its base.

    Args:
        base: where the base is, if not where it was.

    Raises:
        UserError: no adapters of a run, the base isn't there or is another one, or weights that are damaged.
    """
    adaptation, path = adaptation_of(folder, base)
    if not is_intact(folder):
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: it is not what was written there; copy the folder again")
    model = rebuilt(config, head, path, adaptation)
    fill(model, _read(folder), folder / ADAPTER_WEIGHTS)
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: cannot be read ({error}); copy the file again") from error
    return tensors


def adaptation_of(folder: Path, base: str | None = None) -> tuple[Adaptation, Path]:
    """How the model of a folder was adapted, and the folder of its base, which is verified.

    Raises:
        UserError: see `open_adapted`.
    """
    adaptation, digest = _told(folder)
    return adaptation, checked_base(base or adaptation.base, digest, str(folder))


def taken_positions(folder: Path) -> int:
    """Positions of the model that its adapters need in front of each sequence.

    Raises:
        UserError: no adapters of a run.
    """
    return _told(folder)[0].adapter.positions if is_adapter(folder) else 0


def _told(folder: Path) -> tuple[Adaptation, str]:
    """How the model of a folder was adapted, and the SHA-256 of its base's weights."""
    origin = read_origin(folder) or {}
    told = origin.get(ADAPTATION)
    if not isinstance(told, dict):
        raise UserError(
            f"{folder}: its adapters are of no run of zerobert; merge them into their base (peft's merge_and_unload) "
            "and give that folder"
        )
    try:
        return Adaptation.of(told), origin["facts"][BASE_WEIGHTS]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ORIGIN_FILE}: it is not what was written there ({error!r}); copy it again"
        ) from error


def checked_base(base: str, digest: str, what: str) -> Path:
    """The folder of base weights, verified.

    Raises:
        UserError: it isn't there, or holds other weights than `what` was trained over.
    """
    try:
        found = base_weights(base)
    except UserError as error:
        raise UserError(
            f"base: the weights that {what} was trained over are not in {base!r} ({error}); name their "
            "folder with --base"
        ) from error
    if found != digest:
        raise UserError(
            f"base: {base!r} has other weights (sha256 {str(found)[:12]}) than those that {what} was trained over "
            f"({digest[:12]}); name their folder with --base"
        )
    return local_folder(base)


def merged(model: nn.Module, adapter: AdapterConfig, head: str) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same; changes the model.

    Raises:
        UserError: the method's adapters are no change of the base's matrices, or the merged model computes other logits
            on random ids.
    """
    if adapter.method not in MERGEABLE:
        raise UserError(
            f"merge: adapters of method {adapter.method} can't be merged into the base, only those of "
            f"{', '.join(MERGEABLE)}; export without --merge"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    before = random_logits(model, head)
    for _, module in wrapped:
        module.merge(safe_merge=True)
    compare_logits(before, random_logits(model, head), "the merged model")
    bases = {f"{name}{BASE}" for name, _ in wrapped}
    insides = {f"{name}." for name, _ in wrapped}
    kept = {}
    for name, parameter in model.named_parameters():
        beside = name.startswith(tuple(insides)) and not name.startswith(tuple(bases))
        if not beside:
            kept[plain(name)] = parameter.detach()
    return kept


def compare_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse a folder from which other weights are read than were trained, or over which a run trained.

    A run in half precision keeps no fp32 copy of what is frozen, so the base's values come back rounded from it.
    """
    for name, parameter in model.named_parameters():
        own, held = parameter.detach(), weights[name].float().cpu()
        kinds = (torch.float32,) if parameter.requires_grad else (torch.float32, torch.bfloat16, torch.float16)
        if not any(torch.equal(own.to(kind).float(), held) for kind in kinds):
            raise UserError(f"export: the export is not the model: {name}, as read back, is not what was trained")


def _write_peft_config(folder: Path, model: nn.Module, head: str, adaptation: Adaptation) -> bool:
    """Write adapter_config.json, if peft has the method."""
    config = _peft_config(model, adaptation.adapter)
    if config is None:
        return False
    from engine.model.adapters.methods import task_type

    prefix = prefix_of((name for name, _ in model.named_parameters()), architecture_of(model.config))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    beside = [name for name in trained if name.endswith(VECTORS) or ADAPTER_NAME in name]
    modules = {_module_to_save(name, prefix) for name in trained if name not in beside}
    config.modules_to_save = sorted(modules)
    config.task_type = task_type(adaptation.adapter, head)
    config.base_model_name_or_path = adaptation.base
    config.inference_mode = True
    config.save_pretrained(folder)
    config.inference_mode = False
    return True


def _peft_config(model: nn.Module, adapter: AdapterConfig) -> Any:
    """What peft is told of a model's adapters; None of a method that it doesn't have."""
    if adapter.method in VIRTUAL:
        from engine.model.adapters.methods import virtual_config

        return virtual_config(adapter, model.config)
    return next(iter(getattr(model, "peft_config", {}).values()), None)


def _module_to_save(name: str, prefix: str) -> str:
    """The module that peft is told to replace for a trained parameter: the head's outermost, else the innermost."""
    part, _ = place(name, prefix)
    return name.split(".")[0] if part == "head" else name.removeprefix(prefix).rpartition(".")[0]


def _compare(
    folder: Path, base: Path, ours: nn.Module, adaptation: Adaptation, head: str, samples: Sequence[Sample] | None
) -> RoundTrip:
    import peft

    config, adapter = cast(Any, ours).config, adaptation.adapter
    (name,) = config.architectures
    kind = architecture_of(config).export_class(name)

    def theirs() -> nn.Module:
        options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
        model = kind.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)
        opened: nn.Module = peft.PeftModel.from_pretrained(model, folder).eval()
        return VirtualJudge(opened, adapter.method, head) if adapter.method in VIRTUAL else opened

    judge, library = judged_by(adapter.method, head, name)
    told = RoundTrip(judge, 0, 0, samples is not None, "float32", library=library)
    chosen = random_samples(config, adapter.positions) if samples is None else samples
    return compare_models(lambda: ours.eval(), theirs, head, config, chosen, told)
