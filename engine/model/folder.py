"""Write a trained model as a Hugging Face folder that transformers opens offline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ARCHITECTURES, DEFAULT_ARCHITECTURE, architecture_of
from engine.data.tokenizer.folder import with_max_length
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.durable import sha256_of
from engine.errors import UserError
from engine.model.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ONNX_FILE, is_onnx
from engine.model.roundtrip import RoundTrip, Sample, check_round_trip
from engine.model.sentence import SENTENCE_FILES, sentence_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
#: where the weights come from: step, best score, what the run's checkpoints tell of its data, and the weights' SHA-256
ORIGIN_FILE = "zerobert.json"
WEIGHTS_HASH = "weights_sha256"
#: of a graph in a repository of Triton's
TRITON_FILES = ("config.pbtxt", "1")
#: of an int8 graph, what it lost; see `engine.compress.quantise`
INT8_REPORT = "quantise.json"
#: in that file, what the evaluation of the weights chose and predictions need; see `engine.tasks.task.Evaluation`
TUNED = "tuned"
#: a module of a model in training that no export has: projections to a teacher's width, see `engine.tasks.distilled`
PROJECTIONS = "projections"
#: in that file, what the folder was compared with before it got its name; see `RoundTrip`
ROUND_TRIP = "round_trip"


def export_huggingface(
    state_dict: Mapping[str, Tensor],
    config: Any,
    tokenizer: Mapping[str, bytes],
    out: Path,
    origin: Mapping[str, Any] | None = None,
    *,
    check: bool = True,
    samples: Sequence[Sample] | None = None,
) -> RoundTrip | None:
    """Write config.json, model.safetensors and the tokenizer's files to `out`, in the weights' own precision; beside a
    model of embeddings also the files of sentence-transformers.

    The folder appears whole and, unless it isn't to be checked, once transformers has computed from it what our modules
    do; or not at all. An earlier export at `out` is replaced.

    Args:
        state_dict: every parameter of the model under transformers' names, whole (not a ZeRO partition).
        config: as `described` returns it, with the transformers class that has these parameters.
        tokenizer: the content of its files; see `tokenizer_files`.
        origin: what to tell of the weights in zerobert.json, as JSON.
        check: whether to compare the folder with the model; see `check_round_trip`, also for `samples`.

    Returns:
        What was compared, also kept in zerobert.json.

    Raises:
        UserError: `out` exists and is no export, nothing says which transformers class the weights are of, or what was
            written isn't the model.
    """
    _check_replaceable(out)
    weights = untied(state_dict, architecture_of(config).tied)
    named = described(config, (config.architectures or [""])[0])
    named.dtype = next(iter(weights.values())).dtype
    _check_complete(weights, named)
    with whole_folder(out) as partial:
        save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_description(partial, named, tokenizer)
        compared = check_round_trip(partial, weights, named, samples) if check else None
        write_origin(partial, origin or {}, compared)
    return compared


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes `out`, in the place of an earlier export, when all is written, or vanishes.

    Raises:
        UserError: `out` exists and is no export.
    """
    _check_replaceable(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_description(folder: Path, config: Any, tokenizer: Mapping[str, bytes]) -> None:
    """Write config.json and the tokenizer's files."""
    config.to_json_file(folder / CONFIG_FILE)
    for name, content in {**tokenizer, **sentence_files(config)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    _complete_options(folder / "tokenizer_config.json", config)


def write_origin(
    folder: Path, origin: Mapping[str, Any], compared: RoundTrip | None, weights: Path | None = None
) -> None:
    """Write zerobert.json: where the weights in the folder come from, and what they were compared with.

    Args:
        weights: their file, if not where an export has it.
    """
    told = {**origin, WEIGHTS_HASH: sha256_of(weights or weights_of(folder))}
    told[ROUND_TRIP] = None if compared is None else compared.record()
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")


def weights_of(folder: Path) -> Path:
    """The file of an export's weights, of its adapters', or of its graph."""
    if is_onnx(folder):
        return folder / ONNX_FILE
    adapters = folder / ADAPTER_WEIGHTS
    return adapters if adapters.is_file() else folder / WEIGHTS_FILE


def described(config: Any, export_class: str) -> Any:
    """A model's configuration with the transformers class that opens its export.

    Args:
        export_class: as the task names it: the class can't be told from the names of the parameters.

    Raises:
        UserError: there is no such class.
    """
    if not architecture_of(config).has_export_class(export_class):
        raise UserError(
            f"export: no class of transformers is known for the weights ({export_class!r}); the task must name one, "
            "such as BertForTokenClassification, as its export_class"
        )
    named = type(config).from_dict(config.to_dict())
    named.architectures = [export_class]
    return named


def untied(state_dict: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict on the CPU with each tied tensor once, under the name that transformers reads it from, and without
    `PROJECTIONS`.

    Args:
        tied: the other names of such tensors, see `engine.config.Architecture`.
    """
    exported = ((name, tensor) for name, tensor in state_dict.items() if not name.startswith(f"{PROJECTIONS}."))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in exported}
    for alias, source in tied.items():
        tensor = weights.pop(alias, None)
        if tensor is not None:
            kept = weights.setdefault(source, tensor)
            assert torch.equal(kept, tensor), f"{alias} and {source} are tied but differ"
    return weights


def _check_complete(weights: Mapping[str, Tensor], config: Any) -> None:
    """A wrong or partial state dict must not reach the disk, where it would load with random parts."""
    architecture, (name,) = architecture_of(config), config.architectures
    kind = architecture.export_class(name)
    with torch.device("meta"):
        expected = kind(config).state_dict()
    shapes = {name: tensor.shape for name, tensor in expected.items() if name not in architecture.tied}
    given = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
    assert not wrong, f"the state dict is not that of a {kind.__name__} of this configuration: {', '.join(wrong)}"


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The content of a tokenizer's files by their names.

    Raises:
        UserError: there is none in the folder.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not files.keys() & {"tokenizer.json", "vocab.txt"}:
        raise UserError(f"{folder}: it holds no tokenizer; give a folder with tokenizer.json or vocab.txt")
    return files


def saved_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files of a tokenizer as transformers opens it, whatever the folder was like that it came from."""
    with TemporaryDirectory() as folder:
        vocabulary.save(Path(folder))
        return tokenizer_files(Path(folder))


def _complete_options(path: Path, config: Any) -> None:
    """Let transformers truncate at the model's positions, and give it no segments where it knows none."""
    architecture = architecture_of(config)
    options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    options = with_max_length(options, architecture.positions(config))
    if architecture.segments(config) is None:
        options["model_input_names"] = ["input_ids", "attention_mask"]
    text = json.dumps(options, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_config(path: Path) -> Any:
    """The configuration that was written to a config.json of ours.

    Raises:
        OSError, ValueError, TypeError: it can't be read.
        UserError: its architecture isn't registered.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    kind = values.get("model_type", DEFAULT_ARCHITECTURE) if isinstance(values, dict) else DEFAULT_ARCHITECTURE
    return ARCHITECTURES.get(kind).config_class().from_json_file(path)


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What an exported folder tells of its weights; None where it isn't one, or its file is damaged."""
    try:
        origin = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def is_intact(folder: Path) -> bool:
    """Whether an exported folder's weights are those that were written there."""
    origin, weights = read_origin(folder), weights_of(folder)
    return origin is not None and weights.is_file() and sha256_of(weights) == origin.get(WEIGHTS_HASH)


def _check_replaceable(out: Path) -> None:
    """An earlier export may go; a folder with anything that no export wrote may not."""
    if out.resolve() == Path.cwd():
        raise UserError(f"{out}: it is the working directory; give another path")
    if not os.path.lexists(out):
        return
    beside = {Path(name).parts[0] for name in SENTENCE_FILES}
    weights = {WEIGHTS_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ONNX_FILE}
    ours = {CONFIG_FILE, ORIGIN_FILE, *weights, *TOKENIZER_FILES, *beside, *TRITON_FILES, INT8_REPORT}
    names = {path.name for path in out.iterdir()} if out.is_dir() and not out.is_symlink() else {""}
    if names and not (ORIGIN_FILE in names and names <= ours):
        raise UserError(f"{out}: it exists and is not an exported model alone; give another path or remove it")


def _replace(out: Path, partial: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
