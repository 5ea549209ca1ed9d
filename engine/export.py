"""From a run's files to a folder for its users, in one process and without the ranks that wrote them.

What is exported is the content of a checkpoint, or of the run's own export of its best weights, and nothing else:
today's data and options may be others than those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.config import TASKS, AdapterConfig
from engine.config.methods.adapter import MERGEABLE
from engine.errors import UserError
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.folder import (
    ADAPTATION,
    BASE_WEIGHTS,
    adaptation_of,
    checked_base,
    export_adapter,
    head_of,
    is_adapter,
    merged,
    open_adapted,
    rebuilt,
)
from engine.model.folder import (
    CONFIG_FILE,
    ORIGIN_FILE,
    WEIGHTS_FILE,
    described,
    export_huggingface,
    is_intact,
    read_config,
    read_origin,
    saved_files,
    tokenizer_files,
    weights_of,
)
from engine.model.roundtrip import RoundTrip, Sample
from engine.onnx.folder import Source
from engine.predict.model import ModelFolder, open_folder
from engine.predict.options import STANDARD, PredictConfig
from engine.predict.predictor import predictor_of
from engine.predict.rows import input_path, peek, read_rows
from engine.predict.stream import columns_of, resolved
from engine.train.checkpoint.folder import STATE_FILE, RunState, newest_intact, read_state, refuse_damaged
from engine.zero.archive import Archive, full_weights

#: rows that are read, and sequences that are kept of them
ROWS = 32


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names, verified: itself, or the newest intact one of a run.

    Raises:
        UserError: there is none, or none that is intact.
    """
    if (path / STATE_FILE).is_file():
        refuse_damaged(path)
        return path
    newest = newest_intact(path / "checkpoints")
    if newest is None:
        what = "is an exported model already" if (path / WEIGHTS_FILE).is_file() else "holds no checkpoint"
        raise UserError(f"run: {str(path)!r} {what}; give a run's output folder or a step-NNNNNN folder")
    return newest


def best_of(run: Path) -> dict[str, Any] | None:
    """What a run's own export tells of its best weights: metric, value and step; None where it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "export" / ORIGIN_FILE
    origin = read_origin(path.parent)
    if origin is None and path.is_file():
        raise UserError(f"run: {path} is damaged; export the last checkpoint with --weights last")
    return (origin or {}).get("best")


@dataclass(frozen=True)
class Wish:
    """How a user wants an export."""

    check: bool = True
    """compare the folder with the model, and write nothing that differs"""
    merge: bool = False
    """compute adapters into the weights that they are beside"""
    base: str | None = None
    """where those weights are, if not where they were"""


AS_IT_IS = Wish()


def export_best(run: Path, output: Path, wish: Wish = AS_IT_IS) -> RoundTrip | None:
    """Write the best weights of a run, which its own export holds; what they were compared with, if so wished.

    Raises:
        UserError: a file of that is missing or damaged, or what was written isn't the model.
    """
    folder = run / "export"
    if not is_intact(folder):
        raise UserError(f"run: {weights_of(folder)} is not what was written there; take --weights last")
    config, origin, tokenizer = _config(folder), read_origin(folder) or {}, tokenizer_files(folder)
    if is_adapter(folder):
        adaptation, _ = adaptation_of(folder, wish.base)
        model = open_adapted(folder, config, head_of(config), wish.base)
        return _write_adapted(model, config, tokenizer, output, origin, adaptation, wish)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"run: {folder / WEIGHTS_FILE} cannot be read ({error}); take --weights last") from error
    return _write_whole(weights, config, tokenizer, output, origin, wish)


def export_checkpoint(checkpoint: Path, output: Path, wish: Wish = AS_IT_IS) -> tuple[RunState, RoundTrip | None]:
    """Write a checkpoint as a Hugging Face folder.

    Returns:
        The state of the checkpoint, and what the folder was compared with, if so wished.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, an earlier version saved it, or what was written
            isn't the model.
    """
    state = read_state(checkpoint)
    if state.facts is None:
        raise UserError(
            f"run: {checkpoint} was saved by an earlier version, without its labels and tokenizer; go on with that run "
            "(--resume auto) for a step or more, then export it"
        )
    origin = {"step": state.step, "best": None, "facts": state.facts}
    config = config_of(checkpoint, state)
    weights, tokenizer = full_weights(checkpoint), tokenizer_files(checkpoint)
    adaptation = _adaptation(state)
    if not adaptation.is_partial and not Archive(checkpoint).index.base:
        return state, _write_whole(weights, config, tokenizer, output, origin, wish)
    base = checked_base(wish.base or adaptation.base, state.facts[BASE_WEIGHTS], str(checkpoint))
    model = rebuilt(config, head_of(config), base, adaptation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return state, _write_adapted(model, config, tokenizer, output, origin, adaptation, wish)


def config_of(checkpoint: Path, state: RunState) -> Any:
    """The transformers configuration of a checkpoint's model, with the class that opens its export."""
    config = _config(checkpoint)
    if config.architectures is None:  # an earlier version saved it
        config = described(config, TASKS.get(state.config["task"]).load().export_class(config))
    return config


def _adaptation(state: RunState) -> Adaptation:
    """Which parts of the model a checkpoint's run trains."""
    config = state.config
    adapter, train = AdapterConfig(**config.get("adapter", {})), config["train"]
    steps = train["steps"] or state.step
    return Adaptation(adapter, train.get("freeze"), config["seed"], steps, config["model"]["init_from"])


def _write_adapted(
    model: nn.Module,
    config: Any,
    tokenizer: Mapping[str, bytes],
    output: Path,
    origin: Mapping[str, Any],
    adaptation: Adaptation,
    wish: Wish,
) -> RoundTrip | None:
    """Write adapters as they are or, on demand, computed into the base; of a method without them the whole model."""
    if wish.merge or not adaptation.is_beside_base:
        _refuse_needless(wish.merge and not adaptation.is_beside_base)
        weights = merged(model, adaptation.adapter, head_of(config)) if wish.merge else dict(model.named_parameters())
        return export_huggingface(weights, config, tokenizer, output, origin, check=wish.check)
    moved = replace(adaptation, base=wish.base or adaptation.base)
    return export_adapter(dict(model.named_parameters()), config, tokenizer, output, origin, moved, check=wish.check)


def _write_whole(
    weights: Mapping[str, Tensor],
    config: Any,
    tokenizer: Mapping[str, bytes],
    output: Path,
    origin: Mapping[str, Any],
    wish: Wish,
) -> RoundTrip | None:
    _refuse_needless(wish.merge)
    if wish.base is not None:
        raise UserError(f"base: {wish.base!r} has no effect: the run's weights are whole; leave it out")
    return export_huggingface(weights, config, tokenizer, output, origin, check=wish.check)


def _refuse_needless(merge: bool) -> None:
    if merge:
        raise UserError("merge: the run has no adapters, and its export is a whole model; leave it out")


@contextmanager
def deployable(given: Path, weights: str | None, base: str | None) -> Iterator[ModelFolder]:
    """The folder of the model that a user names: a run's best or last weights, a checkpoint's, or a folder itself.

    Weights of a checkpoint are in a folder that is gone when the block ends.

    Args:
        weights: "best" or "last"; None: the best if there are any.
        base: of adapters, where their base is, if not where it was.

    Raises:
        UserError: nothing there, no head of a task, or no weights of that kind.
    """
    checkpoint, run = (given / STATE_FILE).is_file(), (given / "config.yaml").is_file()
    if not (checkpoint or run):
        if weights is not None:
            raise UserError(f"weights: {weights!r} has no effect: {str(given)!r} is no run; leave it out")
        yield open_folder(str(given), base)
        return
    best = None if weights == "last" or checkpoint else best_of(given)
    if best is None and weights == "best":
        raise UserError(f"weights: {str(given)!r} has no best weights; take --weights last")
    if best is not None:
        yield open_folder(str(given), base)
        return
    with TemporaryDirectory(prefix="zerobert-") as room:
        folder = Path(room) / "model"
        export_checkpoint(find_checkpoint(given), folder, Wish(check=False, base=base))
        yield open_folder(str(folder), base if is_adapter(folder) else None)


def source_of(model: ModelFolder) -> Source:
    """A folder's model as the source of a graph, with adapters computed into the weights below them.

    Raises:
        UserError: adapters that can't be, weights that are missing or damaged, or a graph instead of weights.
    """
    if model.is_onnx:
        raise UserError(f"run: {str(model.folder)!r} is an ONNX folder already; give the model that it was made from")
    if is_adapter(model.folder):
        method = adaptation_of(model.folder, model.base)[0].adapter.method
        if method not in MERGEABLE:
            raise UserError(
                f"format: a graph is of a plain model, into which adapters of method {method} can't be merged, only "
                f"those of {', '.join(MERGEABLE)}; export to huggingface, or train one of these"
            )
    whole = (model.folder / "tokenizer.json").is_file()
    tokenizer = tokenizer_files(model.folder) if whole else saved_files(model.vocabulary)
    origin = {name: value for name, value in (read_origin(model.folder) or {}).items() if name != ADAPTATION}
    return Source(model.load(torch.device("cpu"), "fp32"), model.head, tokenizer, origin)


def samples_of(model: ModelFolder, path: str) -> list[Sample]:
    """Sequences of the first rows of a file, whose columns are called as `zerobert predict` expects them.

    Raises:
        UserError: nothing there, an unknown format, damaged content, or a missing column.
    """
    config = PredictConfig(str(model.folder), path, STANDARD)
    columns = columns_of(config, model)
    first, rows = peek(read_rows(path, None, columns), input_path(path))
    predictor = predictor_of(model, resolved(config, columns, first))
    predictor.begin(first)
    encoded = predictor.encode(list(islice(rows, ROWS)))
    sequences = zip(encoded.tokens[:ROWS], encoded.first_lengths, strict=False)
    return [Sample(tuple(ids.tolist()), (0,) * first + (1,) * (len(ids) - first)) for ids, first in sequences]


def _config(folder: Path) -> Any:
    try:
        return read_config(folder / CONFIG_FILE)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"run: {folder / CONFIG_FILE} cannot be read ({error}); restore it") from error
