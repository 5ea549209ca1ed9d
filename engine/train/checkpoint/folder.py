"""Checkpoints: everything that an exact resume needs, whole or refused, whatever the layout it is resumed in.

    <output>/checkpoints/
        latest                       name of the newest checkpoint
        step-000100/
            state.json               format, step, cursor, layout, the run's configuration, versions; size and SHA-256
                                     of every other file, and the hash of itself
            index.json               where the ranges of every parameter lie; see `engine.zero.archive`
            rank-NNNNN.safetensors   fp32 weights and optimizer states that rank N wrote
            rng-rank-N.pt            random generators of rank N
            config.json              the model as transformers describes it, with the names of its classes
            tokenizer.json, ...      the tokenizer's files
        aside-step-000200/           a later checkpoint that a resume from an earlier step set aside

`engine.train.checkpoint.saver` writes them, `engine.train.checkpoint.commit` names them. Any number of ranks can resume
at any ZeRO stage: parameters are saved under their names and without ZeRO's padding, and the cursor counts samples.
Only the random generators belong to a rank; another number of ranks seeds new ones. Labels, tokenizer and model
description are in the checkpoint too, so an export reads nothing else, and a resume with data or options that
contradict them is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

import engine
from engine import dist
from engine.config import AdapterConfig, DistilConfig, ModelConfig, PruneConfig, RunConfig, task_entries
from engine.config.methods.distil import BY_CONTENT
from engine.data.loading.source import Cursor
from engine.durable import SEAL, FileFacts, is_sealed, seal, sha256_of
from engine.errors import UserError, first_line
from engine.tasks.identity import MAY_CHANGE
from engine.train.log import say
from engine.train.output import checkpoint_name as checkpoint_name
from engine.zero.engine import ZeroEngine

STATE_FILE = "state.json"
#: version of the format; 1 was DeepSpeed's own, 2 had no hashes, 3 had no labels, tokenizer and model description
FORMAT = 4
READABLE_FORMATS = (3, 4)
UNSEALED_FORMATS = (1, 2)
#: options of the model that a resume may change: base weights are compared by content, recomputation changes no value
FREE_MODEL_FIELDS = ("init_from", "activation_checkpointing")
#: options that a resume can't change, because states, data order or the best score depend on them; tasks add more
FIXED_FIELDS = (
    "task",
    "seed",
    *(f"model.{part.name}" for part in fields(ModelConfig) if part.name not in FREE_MODEL_FIELDS),
    *(f"adapter.{part.name}" for part in fields(AdapterConfig)),
    *(f"distil.{part.name}" for part in fields(DistilConfig) if part.name not in BY_CONTENT),
    *(f"prune.{part.name}" for part in fields(PruneConfig)),
    "optim.name",
    "train.precision",
    "train.freeze",
    "train.int8_aware",
    "regularise.ema",
    "regularise.fresh_layers",
)
#: also fixed where a checkpoint has no fingerprint of the content behind them, as in format 3, which had two tasks
NAMES_OF_CONTENT = ("model.init_from", "labelled.train")
#: options whose change between two starts of a run is not reported
UNTOLD_FIELDS = ("resume", "output", "train.zero_stage")


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an optimizer step."""

    step: int
    cursor: Cursor
    world_size: int
    config: dict[str, Any]
    best: float | None = None
    """best value so far of the task's metric"""
    best_step: int | None = None
    """the step that had it; None too where an earlier version saved it"""
    facts: dict[str, Any] | None = None
    """`engine.tasks.identity`'s record of data and model; None where an earlier version saved it"""
    micro_batch: int = 0
    meter: dict[str, Any] = field(default_factory=dict)
    """sums for the next point of the curves, see `Meter.state`"""
    version: str = engine.__version__
    format: int = FORMAT
    files: dict[str, FileFacts] = field(default_factory=dict)
    """size and SHA-256 of every other file of the checkpoint, by name"""

    def text(self) -> str:
        """The content of state.json."""
        return seal(asdict(self))


class DamagedCheckpointError(UserError):
    """A checkpoint's files are not what was written."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"resume: {path} is damaged ({problem}); resume from another checkpoint")
        self.problem = problem


def generators_file(rank: int) -> str:
    return f"rng-rank-{rank}.pt"


def checkpoint_step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: folders get these names once complete, but may be damaged since."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(paths, key=checkpoint_step)


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `resume` asks for, with all its files verified; None for a new run; collective.

    Args:
        resume: never, auto (the newest intact one, if there is any at all) or a path.
        folder: the run's `checkpoints` folder.

    Raises:
        UserError: the path is no checkpoint or damaged, all are damaged, one is of another format, or `never` would
            mix a new run with an older one's checkpoints.
    """
    if resume == "never":
        if present := complete_checkpoints(folder):
            raise UserError(
                f"output: {str(folder.parent)!r} holds {present[-1].name} of an earlier run; "
                "pass --resume auto to go on, or another --output"
            )
        return None
    if resume == "auto":
        return newest_intact(folder)
    return named(resume, "resume", "give auto or a step-NNNNNN folder")


def named(text: str, option: str, remedy: str) -> Path:
    """The checkpoint of a path that an option gives, verified; collective.

    Raises:
        UserError: it is none, or damaged.
    """
    path = Path(text)
    if not all(dist.gather_objects((path / STATE_FILE).is_file())):
        raise UserError(f"{option}: {text!r} is no checkpoint (no {STATE_FILE}); {remedy}")
    refuse_damaged(path)
    return path


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all intact, None if there is no checkpoint at all; collective.

    Raises:
        UserError: all of them are damaged, or one is of another format.
    """
    present = dist.gather_objects(complete_checkpoints(folder))[0]  # rank 0's list: on NFS the others may see another
    for path in reversed(present):
        problem = verify(path)
        if problem is None:
            return path
        say(f"passed over {path}, which is damaged: {problem}")
    if present:
        raise UserError(
            f"resume: every checkpoint in {folder} is damaged; restore one, or move the folder away to start anew"
        )
    return None


def refuse_damaged(path: Path) -> None:
    """Verify a checkpoint; collective.

    Raises:
        UserError: names the damaged file, or the format if it is another one.
    """
    problem = verify(path)
    if problem is not None:
        raise DamagedCheckpointError(path, problem)


def verify(path: Path) -> str | None:
    """`damage` with the hashing divided among the ranks; all of them get the same answer; collective."""
    rank, size = dist.place()
    own = dist.agreed(lambda: damage(path, rank, size))
    return next((problem for problem in dist.gather_objects(own) if problem), None)


def damage(path: Path, part: int = 0, parts: int = 1, *, hashes: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, naming the first of them; None if nothing is.

    Args:
        path: a step-NNNNNN folder.
        part: which of `parts` shares of the files to read and hash; the sizes of all files are checked.
        parts: number of shares.
        hashes: whether to read files at all.

    Raises:
        UserError: the checkpoint has another format.
    """
    try:
        files = sorted(read_state(path).files.items())
        present = {file.name: file.stat().st_size for file in path.iterdir() if file.name != STATE_FILE}
        for name, facts in files:
            if present.get(name) != facts.bytes:
                problem = f"has {present[name]} bytes of {facts.bytes}" if name in present else "is missing"
                return f"{name} {problem}"
        if unknown := present.keys() - dict(files):
            return f"{min(unknown)} is none of its files"
        for name, facts in files[part::parts] if hashes else ():
            if sha256_of(path / name) != facts.sha256:
                return f"{name} is not what was written, by its SHA-256"
    except DamagedCheckpointError as error:
        return error.problem
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    return None


def read_state(path: Path) -> RunState:
    """The state of a checkpoint.

    Raises:
        DamagedCheckpointError: state.json is missing or not what was written.
        UserError: the checkpoint has the format of another version.
    """
    try:
        text = (path / STATE_FILE).read_bytes().decode()
        values = json.loads(text)
        version = values.get("format", 1)
        sealed = values.pop(SEAL, None) is not None or version not in UNSEALED_FORMATS
        if sealed and not is_sealed(text):
            raise ValueError("it is not what was written, by its SHA-256")
        if version in READABLE_FORMATS:
            files = {name: FileFacts(**facts) for name, facts in values["files"].items()}
            return RunState(**{**values, "cursor": Cursor(**values["cursor"]), "files": files})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DamagedCheckpointError(path, f"{STATE_FILE}: {reason}") from error
    raise UserError(
        f"resume: {path} is of checkpoint format {version} and this version reads format {FORMAT}; "
        f"use the version that wrote it ({values.get('version')})"
    )


def check_resumable(state: RunState, path: Path, config: dict[str, Any]) -> None:
    """Refuse a resume with a configuration that contradicts the checkpoint.

    Raises:
        UserError: names the field and both values.
    """
    fixed = {*FIXED_FIELDS, *_fixed_by_tasks(state), *(NAMES_OF_CONTENT if state.facts is None else ())}
    for name, saved, given in differences(state.config, config):
        if name in fixed:
            raise UserError(
                f"{name}: {given!r} differs from {saved!r} in {path}; "
                f"set it back ({MAY_CHANGE}), or use another --output"
            )


def _fixed_by_tasks(state: RunState) -> Iterator[str]:
    saved = flat(state.config)
    pruned = saved.get("prune.heads", 1.0) < 1.0 or saved.get("prune.neurons", 1.0) < 1.0
    if pruned or saved.get("adapter.method") == "adalora":  # what is kept is a function of them
        yield from ("train.steps", "train.epochs")
    for entry in task_entries():
        yield from (f"{entry.section}.{name}" for name in entry.fixed)
        # The order of samples grouped by length depends on the global batch, so a cursor is valid for one size only.
        if entry.grouping is not None and saved.get(f"{entry.section}.{entry.grouping}"):
            yield "train.global_batch"


def differences(saved: dict[str, Any], given: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted field, saved value, given value) of every field that differs, in the order of the given ones.

    A checkpoint that is older than an option counts as having its default.
    """
    before = {**flat(RunConfig().to_dict()), **flat(saved)}
    left, right = json.loads(json.dumps(before)), json.loads(json.dumps(flat(given)))
    pairs = [(name, left.get(name), value) for name, value in right.items()]
    return [(name, old, new) for name, old, new in pairs if old != new and (old or new)]


def changes(state: RunState, config: dict[str, Any]) -> str:
    """The options that have changed since a checkpoint, in words; empty if none has."""
    told = flat(state.config).keys() - set(UNTOLD_FIELDS)
    changed = [difference for difference in differences(state.config, config) if difference[0] in told]
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changed)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one dict with dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def load(zero: ZeroEngine, path: Path, state: RunState) -> None:
    """Restore the states of model, optimizer and random generators; collective.

    With another number of ranks than at the save the generators are seeded anew, from the run's seed and the step.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    zero.load_states(path)
    rank = torch.distributed.get_rank()
    if zero.world_size != state.world_size:
        dist.seed_everything(state.config["seed"], rank, state.step)
        return
    try:
        rng = torch.load(path / generators_file(rank), weights_only=False)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise DamagedCheckpointError(path, first_line(error)) from error
    dist.set_rng_state(rng)


def resumption(state: RunState, path: Path, world_size: int, config: dict[str, Any]) -> str:
    """The message about a resume: where it goes on, which options changed, and what follows from that."""
    stage = int(config["train"]["zero_stage"])
    told = f"resumed {path} at step {state.step}"
    saved = (state.world_size, int(state.config["train"]["zero_stage"]))
    if saved != (world_size, stage):
        told += f", saved by {saved[0]} rank(s) at ZeRO stage {saved[1]}, now {world_size} rank(s) at stage {stage}"
    if saved[0] != world_size:
        told += "\nfrom here on dropout differs from that of the undisturbed run, whose ranks are other ones"
    if changed := changes(state, config):
        told += f"\nchanged since then: {changed}"
    if state.facts is None:
        told += (
            "\nan earlier version saved it, without labels, tokenizer and data: make sure that they are the same; "
            "text with over-long sentences comes in another order from here on"
        )
    return told
