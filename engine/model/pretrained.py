"""Start from a Hugging Face folder: its configuration and its weights, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.config import ARCHITECTURES, Architecture, architecture_of
from engine.config.architecture import is_rate
from engine.config.optimizer import LAYER
from engine.durable import sha256_of
from engine.errors import UserError, first_line
from engine.hub import local_folder
from engine.lfs import refuse_pointer

A_FOLDER = "give the folder of a Hugging Face encoder"
#: of adapters over the weights of another folder, as peft names them
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: the graph of a model for deployment, which has its weights in itself
ONNX_FILE = "model.onnx"
#: what the layers of an encoder are told as
ENCODER = "encoder layers"


@dataclass(frozen=True)
class Reshaped:
    """A tensor of the folder that has another shape in the model."""

    name: str
    """of the model's parameter"""
    folder: tuple[int, ...]
    model: tuple[int, ...]
    taken: int
    """rows of the parameter that have the folder's values: all that the folder has of a vocabulary, else none"""

    def __str__(self) -> str:
        shapes = " -> ".join(" x ".join(map(str, shape)) for shape in (self.folder, self.model))
        told = f"{self.taken} rows taken, {self.model[0] - self.taken} new" if self.taken else "newly initialised"
        return f"{self.name} ({shapes}: {told})"


@dataclass(frozen=True)
class LoadReport:
    """What a folder of weights gave to a model."""

    taken: tuple[str, ...]
    """the model's parameters that have the folder's values"""
    initialised: tuple[str, ...]
    """the model's parameters that the folder lacks, which keep their initial values"""
    unused: tuple[str, ...]
    """tensors of the folder that the model has no place for, or that it ties to another of other values"""
    prefix: str = ""
    """what the names of the encoder's parameters begin with"""
    reshaped: tuple[Reshaped, ...] = ()
    """the others that are not taken as they are"""

    def __str__(self) -> str:
        """One line, by module: "taken: embeddings (5), encoder layers 0 to 5 (96); newly initialised: ..."."""
        parts = (("taken", self.taken), ("newly initialised", self.initialised), ("unused", self.unused))
        told = [f"{title}: {by_module(names, self.prefix) or 'nothing'}" for title, names in parts]
        if self.reshaped:
            told.append(f"of another shape: {', '.join(map(str, self.reshaped))}")
        return "; ".join(told)


def by_module(names: Iterable[str], prefix: str) -> str:
    """Parameters in words, a module each with the number of its tensors; layers of the encoder together."""
    counts: Counter[str] = Counter()
    layers: set[int] = set()
    for name in names:
        own = name.removeprefix(prefix)
        parts, numbered = own.split("."), LAYER.match(own)
        module = ".".join(parts[:2]) if parts[0] == "cls" else parts[0]
        if numbered:
            layers.add(int(numbered[1]))
            module = ENCODER
        counts[module] += 1
    title = f"{ENCODER} {_runs(sorted(layers))}"
    return ", ".join(f"{title if module == ENCODER else module} ({count})" for module, count in counts.items())


def _runs(numbers: Sequence[int]) -> str:
    """Ascending whole numbers with their gaps: [0, 1, 2, 5] -> "0 to 2, 5"."""
    groups = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{group[0]} to {group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)


def load_config(folder: Path) -> Any:
    """Read the `config.json` of a Hugging Face folder of one of our architectures.

    Raises:
        UserError: no folder or file, not JSON, another architecture, or a variant that our modules do not compute.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {A_FOLDER}")
    values = _read_json(folder / "config.json", A_FOLDER)
    kind = values.get("model_type")
    if kind not in ARCHITECTURES.names:
        names = " or ".join(repr(name) for name in ARCHITECTURES.names)
        raise UserError(f"{folder}: its model_type is {kind!r}; give a model of type {names}")
    architecture = ARCHITECTURES.get(kind)
    try:
        config = architecture.config_class().from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}; correct that field") from error
    except ZeroDivisionError as error:
        raise UserError(f"{folder / 'config.json'}: a field that must not be 0 is ({error}); correct it") from error
    for name in architecture.rates:
        rate = getattr(config, name)
        if rate is not None and not is_rate(rate):
            remedy = "give a model where it is a number of at least 0"
            raise UserError(f"{folder / 'config.json'}: {name} {rate!r} is not allowed; {remedy}")
    architecture.check(folder / "config.json", config)
    return config


def check_segments(config: Any, folder: str | None, what: str) -> None:
    """Refuse a model that can't tell the second of two segments from the first.

    Raises:
        UserError: names the folder and `what` needs two.
    """
    segments = architecture_of(config).segments(config)
    if segments is not None and segments < 2:
        raise UserError(
            f"model.init_from: {folder!r} has type_vocab_size {segments} and {what} needs 2; "
            "give a model with two segment types"
        )


def load_pretrained(
    model: nn.Module, folder: Path, without: tuple[str, ...] = (), layers: Sequence[int] | None = None
) -> LoadReport:
    """Copy the weights of a Hugging Face folder into `model`, whose other parameters keep their values.

    Reads safetensors or, in their absence, pickled weights (tensors only), whole or in shards; names with or without
    the encoder's prefix, and LayerNorm's old gamma and beta. Of a vocabulary that the model has more tokens of, the
    folder's rows are taken; a classifier of another shape isn't.

    Args:
        without: beginnings of the names of parameters that keep their values whatever the folder holds.
        layers: those of the folder that the model's layers are, in order; None: all.

    Raises:
        UserError: no folder, weights that are missing, damaged, of another shape, or not those of an encoder of ours.
    """
    rows, config = load_config(folder).vocab_size, cast(Any, model.config)
    architecture, tensors = architecture_of(config), _read_weights(folder)
    tensors = tensors if layers is None else _of_layers(tensors, layers)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources = {_parameter_name(name, parameters, architecture.prefix): name for name in tensors}
    found = {target: tensors[name] for target, name in sources.items() if target is not None}
    fitting = {
        target: tensor
        for target, tensor in found.items()
        if not target.startswith(without)
        and _fits(folder, target, tensor, parameters[target], rows, architecture.growing)
    }
    untied = _copy(fitting, parameters)
    loaded = {parameters[name] for name in fitting}
    initialised = tuple(name for name, parameter in model.named_parameters() if parameter not in loaded)
    lacking = (name for name in initialised if not name.startswith(without))
    _check_essential(folder, _essential(lacking, architecture))
    reshaped = _reshaped(found, fitting, model)
    used = {sources[target] for target in (fitting.keys() - untied) | {each.name for each in reshaped}}
    unused = tuple(sorted(name for name in tensors if name not in used and not name.endswith("_ids")))
    withheld = {sources[target] for target in found if target.startswith(without)}
    unknown = (name for name in unused if name not in withheld)
    _check_known(folder, _essential(unknown, architecture))
    held = tuple(name for name, parameter in model.named_parameters() if parameter in loaded)
    return LoadReport(held, initialised, unused, architecture.prefix, reshaped)


def _of_layers(tensors: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors without those of other layers, these under their places among `layers`."""
    found = {}
    for name, tensor in tensors.items():
        numbered = LAYER.search(name)
        if numbered is None:
            found[name] = tensor
        elif int(numbered[1]) in layers:
            place = layers.index(int(numbered[1]))
            found[f"{name[: numbered.start(1)]}{place}{name[numbered.end(1) :]}"] = tensor
    return found


def word_embeddings(folder: Path) -> Tensor:
    """The word embeddings of a Hugging Face folder, fp32 [vocabulary, H].

    Raises:
        UserError: as `load_pretrained`.
    """
    wanted = architecture_of(load_config(folder)).growing[0]
    found = [tensor for name, tensor in _read_weights(folder).items() if name.endswith(wanted)]
    if not found:
        raise UserError(f"{folder}: its weights lack {wanted}; give the folder of a complete encoder")
    return found[0].float()


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Copy tensors to the parameters of the same names; returns the names of those that others of other values replace.

    A checkpoint may hold both names of a tied tensor: the first in the model's order is the one that counts.
    """
    copied: set[nn.Parameter] = set()
    untied = set()
    for name, parameter in parameters.items():
        if name in tensors and parameter not in copied:
            parameter[: len(tensors[name])].copy_(tensors[name])
            copied.add(parameter)
        elif name in tensors and not torch.equal(parameter[: len(tensors[name])], tensors[name].to(parameter.dtype)):
            untied.add(name)
    return untied


def _reshaped(found: Mapping[str, Tensor], fitting: Mapping[str, Tensor], model: nn.Module) -> tuple[Reshaped, ...]:
    """Those of the found tensors that have another shape in the model, a tied one once."""
    return tuple(
        Reshaped(name, tuple(found[name].shape), tuple(parameter.shape), len(found[name]) if name in fitting else 0)
        for name, parameter in model.named_parameters()
        if name in found and found[name].shape != parameter.shape
    )


def _parameter_name(name: str, parameters: Mapping[str, nn.Parameter], prefix: str) -> str | None:
    """The model's parameter that a checkpoint's tensor is meant for."""
    name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    candidates = (name, f"{prefix}{name}", name.removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _fits(
    folder: Path, name: str, tensor: Tensor, parameter: nn.Parameter, rows: int, growing: tuple[str, ...]
) -> bool:
    if tensor.shape == parameter.shape:
        return True
    # the model has tokens that were added to the folder's `rows`
    if name.endswith(growing) and len(tensor) == rows < len(parameter) and tensor.shape[1:] == parameter.shape[1:]:
        return True
    if name.startswith("classifier."):
        return False
    given, needed = tuple(tensor.shape), tuple(parameter.shape)
    remedy = "give weights that match their config.json"
    if name.endswith(growing):
        remedy = f"{given[0]} tokens are neither the data's {needed[0]} nor those of its config.json: copy both again"
    raise UserError(f"{folder}: {name} has shape {given} and the model needs {needed}; {remedy}")


def _essential(names: Iterable[str], architecture: Architecture) -> list[str]:
    """Those of the names that are of the encoder."""
    return [name for name in names if name.removeprefix(architecture.prefix).startswith(architecture.essential)]


def _check_essential(folder: Path, essential: list[str]) -> None:
    if essential:
        raise UserError(
            f"{folder}: its weights lack {len(essential)} parameters of the encoder, {essential[0]} the first; "
            "give the folder of a complete encoder"
        )


def _check_known(folder: Path, unknown: list[str]) -> None:
    """An encoder with more parameters than ours computes something else, which must not be cut down in silence."""
    if unknown:
        raise UserError(
            f"{folder}: its encoder has {len(unknown)} parameters that our modules of its config.json lack, "
            f"{unknown[0]} the first; give a plain encoder whose config.json and weights belong together"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors or, in their absence, pickled; one or several shards.

    Raises:
        UserError: there are none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _read_json(index, "restore the file").get("weight_map", {})
            return [folder / shard for shard in sorted(set(shards.values()))]
    if (folder / ADAPTER_WEIGHTS).is_file() or (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder}: it holds adapters without the weights below them; give a whole model, as zerobert export RUN "
            "--merge --output FOLDER writes one of adapters that can be merged"
        )
    if (folder / ONNX_FILE).is_file():
        raise UserError(
            f"{folder}: it holds an ONNX graph, which can't be trained; give the model that it was made from"
        )
    raise UserError(f"{folder}: it holds no weights; add model.safetensors or pytorch_model.bin")


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds a model as an ONNX graph alone."""
    weights = ("model.safetensors", "pytorch_model.bin")
    beside = any((folder / name).is_file() for each in weights for name in (each, f"{each}.index.json"))
    return (folder / ONNX_FILE).is_file() and not beside


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        refuse_pointer(path, "model.init_from")
        weights |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from error
    return tensors


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: cannot be read as plain tensors ({first_line(error)}); copy the file again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: it holds more than named tensors; save the model's state_dict alone")
    return content


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    refuse_pointer(path, "model.init_from")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return values


def base_weights(folder: str | None) -> str | None:
    """The sha256 of the weights that a run starts from; None where they are drawn."""
    if folder is None:
        return None
    hashes = [sha256_of(path) for path in weight_files(local_folder(folder))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
