"""Whether an exported folder holds the model that it was made from, with transformers as the judge.

One way: transformers' class opens the folder, lacks nothing, and computes the logits that our modules compute. The
other way: our modules, loaded from the folder, have the weights that were exported, bit for bit. Both sides compute in
fp32 on the CPU, in whatever precision the weights are kept, so one bound serves all exports.

Shape legend: T tokens in all samples, R of them whose logits are compared, V vocabulary size.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from engine.config import Architecture, architecture_of
from engine.errors import UserError, first_line
from engine.model.bert import MlmDecoder
from engine.model.pretrained import load_pretrained

#: largest difference of a logit, relative to the largest logit of its kind: what fp32's sums in another order may make
BOUND = 1024 * torch.finfo(torch.float32).eps
#: logits that are all smaller than this are compared with it
SMALL_LOGIT = 0.01
#: samples of a run's data, and tokens of each
SAMPLES, SAMPLE_TOKENS = 4, 128
#: tokens of samples without data: the longest reach beyond ModernBERT's windows
LENGTHS = (2, 33, 70, 192)
SEED = 20
#: numbers that the logits of the compared tokens may be
LOGITS = 2**24
#: by head, what transformers calls its outputs
OUTPUTS = {
    "pretraining": ("prediction_logits", "seq_relationship_logits"),
    "masked_lm": ("logits",),
    "sequence_classification": ("logits",),
    "token_classification": ("logits",),
    "question_answering": ("start_logits", "end_logits"),
    "multiple_choice": ("logits",),
    "embeddings": ("last_hidden_state",),
}
#: heads that give a row for each token that is read
ON_TOKENS = ("token_classification", "question_answering", "embeddings")
#: where a model of the first has the head on pairs
PAIRS = "cls.seq_relationship"
#: fields of a configuration that tell of the file and not of the model
OF_THE_FILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Sample:
    """A sequence of token ids and, of each, the segment that it is of."""

    ids: tuple[int, ...]
    segments: tuple[int, ...]


@dataclass(frozen=True)
class RoundTrip:
    """What was compared, and how far apart it was."""

    judge: str
    """the class that opened it"""
    samples: int
    tokens: int
    of_data: bool
    """whether the samples are of the run's data, or random ids"""
    dtype: str
    """of the weights"""
    bound: float = BOUND
    library: str = "transformers'"
    """whose class"""
    differences: dict[str, float] = field(default_factory=dict)
    """by output, the largest difference of a logit relative to the largest logit; none where only weights and
    configuration were compared, because the model's head is none of ours"""

    def __str__(self) -> str:
        """One line."""
        told = f"weights ({self.dtype}) and configuration are those of {self.library} {self.judge}"
        if not self.differences:
            return f"{told}; its logits were not compared: the head is none of ours"
        samples = f"{self.samples} samples of {'the data' if self.of_data else 'random ids'}, {self.tokens} tokens"
        worst = max(self.differences.values())
        return f"{told}; {samples}: largest relative difference of a logit {worst:.1e}, allowed {self.bound:.1e}"

    def record(self) -> dict[str, Any]:
        """The same as plain values."""
        import transformers

        return {**asdict(self), "transformers": transformers.__version__}


def packed_samples(inputs: Mapping[str, Tensor]) -> list[Sample] | None:
    """The first samples of a packed batch, the longer ones cut; None where its tensors are none that we know."""
    if not {"input_ids", "token_type_ids", "lengths"} <= inputs.keys():
        return None
    ends = inputs["lengths"].cumsum(0).tolist()[:SAMPLES]
    pieces = [slice(start, min(end, start + SAMPLE_TOKENS)) for start, end in zip([0, *ends], ends, strict=False)]
    names = ("input_ids", "token_type_ids")
    return [Sample(*(tuple(inputs[name][piece].tolist()) for name in names)) for piece in pieces]


def random_samples(config: Any, taken: int = 0) -> list[Sample]:
    """Samples of a few lengths, always the same for a configuration; every second has two segments where it can.

    Args:
        taken: positions that no token of a sample may have.
    """
    architecture, generator = architecture_of(config), torch.Generator().manual_seed(SEED)
    pairs = (architecture.segments(config) or 1) > 1
    samples, longest = [], architecture.positions(config) - taken
    for index, length in enumerate(sorted({min(length, longest) for length in LENGTHS})):
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
        if config.pad_token_id is not None:  # RoBERTa gives it no position
            ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
        second = length // 2 if pairs and index % 2 else 0
        samples.append(Sample(tuple(ids.tolist()), (0,) * (length - second) + (1,) * second))
    return samples


def check_round_trip(
    folder: Path, weights: Mapping[str, Tensor], config: Any, samples: Sequence[Sample] | None = None
) -> RoundTrip:
    """Compare a written folder with what it was made from; leaves torch's global generator as it was.

    Holds one copy of the weights in fp32 beside those given, and a second one while it reads the folder.

    Args:
        weights: what was exported, each tied tensor once.
        config: of the model, with the class of transformers that it was exported for.
        samples: what to compute logits of; random ids if absent.

    Raises:
        UserError: says what differs, where first, and how much.
    """
    architecture, (name,) = architecture_of(config), config.architectures
    heads = {kind: head for head, kind in architecture.export_classes.items() if head in OUTPUTS}
    head = heads.get(name)
    _compare_configurations(architecture.config_class().from_json_file(folder / "config.json"), config)

    def ours() -> nn.Module:
        assert head is not None
        return _loaded_back(folder, weights, architecture, head, config)

    def theirs() -> nn.Module:
        return _opened(folder, weights, architecture.export_class(name))

    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return compare_models(ours, theirs, head, config, samples, RoundTrip(name, 0, 0, samples is not None, dtype))


def compare_models(
    ours: Callable[[], nn.Module],
    theirs: Callable[[], nn.Module],
    head: str | None,
    config: Any,
    samples: Sequence[Sample] | None,
    told: RoundTrip,
) -> RoundTrip:
    """Compare the logits of one of our models with those of another library's, each made when it is its turn.

    Args:
        head: one of `Architecture.export_classes`; None, and only `theirs` is made, where the head is none of ours.
        samples: what to compute logits of; random ids if absent.
        told: what is compared, to be completed.

    Raises:
        UserError: says what differs, where first, and how much.
    """
    chosen = random_samples(config) if samples is None else samples
    batch = packed(chosen)
    read = torch.arange(0, len(batch["input_ids"]), ceil(len(batch["input_ids"]) * config.vocab_size / LOGITS))
    with _undisturbed(), torch.no_grad():
        own = {} if head is None else own_logits(ours(), head, batch, read)
        other = their_logits(theirs(), head, chosen, read, tuple(own))
    differences = compare_logits(own, other, f"{told.library} {told.judge}")
    return replace(told, samples=len(chosen), tokens=len(batch["input_ids"]), differences=differences)


def packed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples as the models' packed arguments: input_ids, token_type_ids, position_ids [T], lengths; int64."""
    return {
        "input_ids": torch.tensor([token for sample in samples for token in sample.ids]),
        "token_type_ids": torch.tensor([segment for sample in samples for segment in sample.segments]),
        "position_ids": torch.tensor([place for sample in samples for place in range(len(sample.ids))]),
        "lengths": torch.tensor([len(sample.ids) for sample in samples]),
    }


def own_logits(model: nn.Module, head: str, batch: Mapping[str, Tensor], read: Tensor) -> dict[str, Tensor]:
    """What one of our models computes, by transformers' names; nothing where it has a decoder that we don't know.

    Args:
        batch: as `packed` makes it.
        read: [R], the tokens whose MLM logits are wanted, ascending.

    Returns:
        MLM's logits [R, V] or those of a head on tokens, one row each, and those of a head on whole sequences.
    """
    if head == "embeddings":
        states: Tensor = cast(Any, model).states(**batch)
        return {"last_hidden_state": states[read]}
    if head in ON_TOKENS:
        logits: Tensor = model(**batch, read=read)
        return dict(zip(OUTPUTS[head], [logits] if head == "token_classification" else logits.split(1, 1), strict=True))
    if head in ("sequence_classification", "multiple_choice"):
        return {"logits": model(**batch)}
    decoder = next((module for module in model.modules() if isinstance(module, MlmDecoder)), None)
    if decoder is None:
        return {}
    seen: list[Tensor] = []
    hooks = [
        decoder.register_forward_pre_hook(
            lambda module, given: seen.append(nn.functional.linear(given[0], module.weight, module.bias))
        )
    ]
    labels = {"mlm_positions": read, "mlm_labels": batch["input_ids"][read]}
    if head == "pretraining":
        labels["nsp_labels"] = torch.zeros_like(batch["lengths"])
        pairs = dict(model.named_modules()).get(PAIRS)
        if pairs is not None:
            hooks.append(pairs.register_forward_hook(lambda module, given, output: seen.append(output)))
    try:
        model(**batch, **labels)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(OUTPUTS[head], seen, strict=False))


def their_logits(
    model: nn.Module, head: str | None, samples: Sequence[Sample], read: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """The outputs of these names of a class of transformers, which gets the samples one by one, without padding."""
    config: Any = model.config
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    start = 0
    for sample in samples if names else ():
        inputs = {"input_ids": torch.tensor([sample.ids])}
        if architecture_of(config).segments(config) is not None:
            inputs["token_type_ids"] = torch.tensor([sample.segments])
        if head == "multiple_choice":  # of a single choice
            inputs = {name: values[None] for name, values in inputs.items()}
        try:
            output = model(**inputs)
        except RuntimeError as error:
            _refuse(f"transformers' {type(model).__name__} can't compute it: {first_line(error)}")
        wanted = read[(read >= start) & (read < start + len(sample.ids))] - start
        for name in names:
            logits = getattr(output, name)
            of_tokens = logits.dim() > 2 or head in ON_TOKENS
            rows[name].append(logits[0, wanted].reshape(len(wanted), -1) if of_tokens else logits)
        start += len(sample.ids)
    return {name: torch.cat(parts) for name, parts in rows.items()}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """transformers without its bars, and a run's dropout as if nothing had been built here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library about the other
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _loaded_back(
    folder: Path, weights: Mapping[str, Tensor], architecture: Architecture, head: str, config: Any
) -> nn.Module:
    """Our modules of the source's configuration with the folder's weights, in fp32."""
    model = architecture.build(head, config, False).float().eval()
    try:
        report = load_pretrained(model, folder)
    except UserError as error:
        _refuse(f"our modules can't take it: {error}")
    if report.reshaped:
        _refuse(f"{report.reshaped[0]}")
    for what, names in (("lacks", report.initialised), ("has a tensor that no module takes,", report.unused)):
        if names:
            _refuse(f"it {what} {names[0]}")
    _compare_weights(model, weights, "our modules")
    return model


def _opened(folder: Path, weights: Mapping[str, Tensor], kind: Any) -> nn.Module:
    """The folder as a user of transformers opens it, in fp32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        model, told = kind.from_pretrained(folder, **options, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        _refuse(f"transformers' {kind.__name__} can't open it: {first_line(error)}")
    for what in ("missing", "unexpected", "mismatched"):
        if told[f"{what}_keys"]:
            _refuse(f"{sorted(told[f'{what}_keys'])[0]} is {what} for transformers' {kind.__name__}")
    _compare_weights(model, weights, f"transformers' {kind.__name__}")
    opened: nn.Module = model.eval()
    return opened


def _compare_weights(model: nn.Module, weights: Mapping[str, Tensor], who: str) -> None:
    loaded = model.state_dict()
    tied = architecture_of(model.config).tied
    sources = {name: tied.get(name, name) for name in loaded if tied.get(name, name) in weights}
    assert weights.keys() <= sources.keys()
    for name, source in sources.items():
        if not torch.equal(loaded[name], weights[source].float()):
            _refuse(f"{name}, as {who} read it, is not what was exported")


def _compare_configurations(written: Any, config: Any) -> None:
    """What a config.json says of the model must be what the model was made by, also where logits don't tell it."""
    both = (json.loads(each.to_json_string(use_diff=False)) for each in (written, config))
    left, right = ({name: value for name, value in each.items() if name not in OF_THE_FILE} for each in both)
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) != right.get(name):
            _refuse(f"its config.json has {name} {left.get(name)!r} and the model {right.get(name)!r}")


def random_logits(model: nn.Module, head: str) -> dict[str, Tensor]:
    """What one of our models computes, in evaluation mode, of the samples that `random_samples` draws for it."""
    batch = packed(random_samples(model.config))
    with _undisturbed(), torch.no_grad():
        return own_logits(model.eval(), head, batch, torch.arange(len(batch["input_ids"])))


def compare_logits(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], judge: str, bound: float = BOUND
) -> dict[str, float]:
    """The largest difference of each output relative to its largest logit.

    Raises:
        UserError: one is above `bound`.
    """
    differences = {}
    for name, own in ours.items():
        other = theirs[name]
        if not bool(own.isfinite().all()) or not bool(other.isfinite().all()):
            _refuse(f"its {name} are not finite")
        scale = max(float(other.abs().max()), SMALL_LOGIT)
        apart = (own - other).abs().amax(-1) / scale
        differences[name] = float(apart.max())
        if differences[name] > bound:
            first = int((apart > bound).nonzero()[0])
            _refuse(
                f"{name} of {judge} differ from ours by {differences[name]:.1e} of the largest, allowed "
                f"is {bound:.1e}; the first is row {first} of {len(apart)}"
            )
    return differences


def _refuse(what: str) -> NoReturn:
    raise UserError(
        f"export: the export is not the model: {what}; it was not written: report this with its config.json, or write "
        "it unchecked with zerobert export RUN --output FOLDER --check false"
    )
