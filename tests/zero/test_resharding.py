"""A run saved in one layout goes on in another: bit by bit what it was, and with the losses of an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import UserError
from engine.precision import DTYPES
from engine.zero.archive import (
    INDEX_FILE,
    Archive,
    Index,
    Range,
    Record,
    full_weights,
    rank_file,
    write_index,
    write_tensors,
)
from engine.zero.states import shared_out
from tests.train.runs import NO_DROPOUT, execute, losses, run
from tests.zero.partition_worker import CASES, Model
from tests.zero.resharding_worker import BUFFER, COUNTERS, ORDER, SCALER, STATES, STEP, frozen, truth

SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}
TRAINED = {name for name, p in Model().named_parameters() if p.requires_grad}
#: ranks of each launch, and those that saved what it loads beside its own
LAUNCHES = {2: None, 1: 2, 4: 1, 3: 4}
every_launch = pytest.mark.parametrize(
    "ranks", [pytest.param(ranks, marks=[] if ranks < 3 else pytest.mark.slow) for ranks in LAUNCHES]
)
Launch = Callable[[int], Path]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs the worker on some ranks, once, after those whose states it loads; gives the folder of what it wrote."""
    folder = tmp_path_factory.mktemp("resharding")

    @cache
    def worker(ranks: int) -> Path:
        other = LAUNCHES[ranks]
        arguments = [str(folder)] if other is None else [str(worker(other).parent), str(other)]
        done = execute("tests/zero/resharding_worker.py", *arguments, ranks=ranks)
        (folder / str(ranks) / "printed").write_text(done.stdout)
        return folder / str(ranks)

    return worker


def loaded(folder: Path) -> list[tuple[dict[str, Any], dict[str, Record]]]:
    """What every rank recorded after each load, with the index of what it loaded."""
    assert (folder / "0.pt").is_file(), (folder / "printed").read_text()
    records = [torch.load(path, weights_only=False) for path in sorted(folder.glob("?.pt"))]
    found = [one for of_rank in records for one in of_rank if "source" in one]
    assert found
    return [(one, Archive(Path(one["source"])).index.parameters) for one in found]


def saved(folder: Path) -> list[Path]:
    """The folders of the states that a launch saved."""
    assert (folder / "0.pt").is_file(), (folder / "printed").read_text()
    return [folder / name for name in ORDER if (folder / name).is_dir()]


def expected(state: str, name: str, record: Record) -> Tensor:
    """What a parameter's weight or state was made to be; 0 if the optimizer had not made it (no gradient, stage 0)."""
    full = truth(state, name, SHAPES[name])
    return full if state == "weight" or state in record.states else torch.zeros_like(full)


@pytest.mark.slow
@every_launch
def test_every_layout_saves_the_same_and_nothing_twice(launch: Launch, ranks: int) -> None:
    for folder in saved(launch(ranks)):
        archive = Archive(folder)
        assert archive.index.parameters.keys() == TRAINED
        for name, record in archive.index.parameters.items():
            for state in ("weight", *record.states):
                assert torch.equal(archive.whole(name, state), truth(state, name, SHAPES[name])), (folder, name)
            assert sum(length for _, length, _ in record.pieces) == prod(SHAPES[name])
            assert record.scalars == ({"step": ["float32", STEP]} if record.states else {})
        assert archive.index.counters == COUNTERS
        assert archive.kept("counts").tolist() == BUFFER
        exported = full_weights(folder)
        assert exported.keys() == {*SHAPES, "decoder.weight"}
        assert torch.equal(exported["decoder.weight"], truth("weight", "embedding.weight", SHAPES["embedding.weight"]))
        assert torch.equal(exported["position.weight"], frozen("position.weight", SHAPES["position.weight"]))


@every_launch
def test_weights_and_states_arrive_bit_by_bit(launch: Launch, ranks: int) -> None:
    for record, parameters in loaded(launch(ranks)):
        assert record["wrapper"] == CASES[record["case"]].wrapper.replace("Recorder", record["wrapper"])
        seen = set()
        for state, name, part, values in record["pieces"]:
            assert torch.equal(values, expected(state, name, parameters[name]).view(-1)[part]), (record["case"], name)
            seen.add((state, name))
        assert record["padding"] == 0
        for name, values in record["moments"].items():
            assert torch.equal(values, expected("exp_avg", name, parameters[name])), (record["case"], name)
        if ranks == 1:
            assert {name for _, name in seen} == TRAINED
            made = {(state, name) for state in STATES for name in TRAINED if state in parameters[name].states}
            assert made <= seen


@every_launch
def test_the_model_computes_with_the_rounded_weights_and_exports_the_masters(launch: Launch, ranks: int) -> None:
    for record, _ in loaded(launch(ranks)):
        dtype = DTYPES[CASES[record["case"]].precision]
        for name, values in record["model"].items():
            full = truth("weight", name, SHAPES[name]) if name in TRAINED else frozen(name, SHAPES[name])
            assert torch.equal(values.view(full.shape), full.to(dtype).float()), (record["case"], name)
        for name in TRAINED & record["full"].keys():
            assert torch.equal(record["full"][name], truth("weight", name, SHAPES[name])), (record["case"], name)
        assert record["buffers"] == (BUFFER, [0.0, 0.0])


@every_launch
def test_steps_counters_and_loss_scale_go_on(launch: Launch, ranks: int) -> None:
    for record, parameters in loaded(launch(ranks)):
        whole = CASES[record["case"]].stage == 0
        stepped = sum(bool(one.states) for one in parameters.values())
        assert len(record["steps"]) == stepped if whole else len(record["steps"]) >= 2
        assert set(record["steps"]) == {(torch.float32, STEP)}
        assert record["distinct"]
        assert record["counters"] == COUNTERS
        assert record["micro_steps"] == COUNTERS["global_steps"]
        of_fp16 = [CASES[name].precision == "fp16" for name in (record["case"], Path(record["source"]).name)]
        assert record["scaler"] == SCALER or not all(of_fp16)


@every_launch
def test_a_loaded_optimizer_steps_on(launch: Launch, ranks: int) -> None:
    folder = launch(ranks)
    for path in folder.glob("?.pt"):
        steps = {one["case"]: one["stepped"] for one in torch.load(path, weights_only=False) if "stepped" in one}
        assert all(set(found) == {STEP + 1.0} for name, found in steps.items() if name != ORDER[0])


def test_replicas_share_the_writing(launch: Launch) -> None:
    """At stage 0 every rank has everything; 12 bytes a parameter are written all the same, half by each."""
    folder = launch(2) / "0-fp32"
    sizes = [(folder / rank_file(rank)).stat().st_size for rank in range(2)]
    numel = sum(prod(SHAPES[name]) for name in TRAINED)
    assert 12 * numel < sum(sizes) < 13 * numel + 4 * prod(SHAPES["position.weight"])
    lengths = [0, 0]
    for record in Archive(folder).index.parameters.values():
        for _, length, rank in record.pieces:
            lengths[rank] += length
    assert max(lengths) - min(lengths) <= 1


def test_ranks_with_the_same_ranges_write_equal_parts_of_them() -> None:
    left, right = [Range("a", 0, 5), Range("b", 0, 2)], [Range("a", 5, 4)]
    assert shared_out([left, right, left, right]) == [
        [(0, Range("a", 0, 3))],
        [(0, Range("a", 5, 2))],
        [(0, Range("a", 3, 2)), (1, Range("b", 0, 2))],
        [(0, Range("a", 7, 2))],
    ]
    assert shared_out([left, []]) == [list(enumerate(left)), []]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A parameter of 2 x 5 numbers, and its moments, in the files of two ranks; and a buffer."""
    numbers = torch.arange(10.0)
    pieces = [Range("layer.weight", 0, 4), Range("layer.weight", 4, 6)]
    for rank, part in enumerate(pieces):
        view = numbers[part.start : part.start + part.length]
        tensors = {part.key("weight"): view, part.key("exp_avg"): -view}
        write_tensors(tmp_path / rank_file(rank), tensors | ({"mask": torch.tensor([True])} if rank == 0 else {}))
    record = Record([2, 5], {"exp_avg": "float32"}, {"step": ["float32", 3.0]}, [[4, 6, 1], [0, 4, 0]])
    write_index(tmp_path, Index({"layer.weight": record}, {}, {"mask": [1]}, {"tied.weight": "layer.weight"}, {}, {}))
    return tmp_path


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_any_range_of_an_archive_can_be_read(archive: Path) -> None:
    opened = Archive(archive)
    for start in range(10):
        for end in range(start, 11):
            target = torch.empty(end - start)
            opened.fill(target, "layer.weight", start)
            assert target.tolist() == list(range(start, end))
    assert torch.equal(opened.whole("layer.weight", "exp_avg"), -torch.arange(10.0).view(2, 5))
    assert torch.equal(full_weights(archive)["tied.weight"], torch.arange(10.0).view(2, 5))
    assert opened.kept("mask").tolist() == [True]


def test_an_archives_files_are_safetensors(archive: Path) -> None:
    from safetensors.torch import load_file

    held = load_file(archive / rank_file(1))
    assert held.keys() == {"layer.weight@4/weight", "layer.weight@4/exp_avg"}
    assert held["layer.weight@4/weight"].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize("damage", ["remove", "cut", "overwrite", "other"])
def test_a_damaged_or_missing_file_is_named(archive: Path, damage: str) -> None:
    path = archive / rank_file(1)
    whole = path.read_bytes()
    path.unlink()
    if damage == "other":
        path.write_bytes((archive / rank_file(0)).read_bytes())
    elif damage != "remove":
        path.write_bytes(whole[:100] if damage == "cut" else b"\xff" * 8 + whole[8:])
    opened = Archive(archive)
    opened.fill(torch.empty(4), "layer.weight", 0)
    message = refused(lambda: opened.whole("layer.weight"))
    assert message.startswith(f"checkpoint: {path} is damaged (")
    assert "\n" not in message


def test_a_missing_range_is_named(archive: Path) -> None:
    index = json.loads((archive / INDEX_FILE).read_text())
    index["parameters"]["layer.weight"]["pieces"].pop(1)
    (archive / INDEX_FILE).write_text(json.dumps(index))
    message = refused(lambda: Archive(archive).whole("layer.weight"))
    assert f"{archive / INDEX_FILE} is damaged (elements 4 to 10 of layer.weight are in no file)" in message


def test_a_range_that_the_file_holds_otherwise_is_named(archive: Path) -> None:
    index = json.loads((archive / INDEX_FILE).read_text())
    index["parameters"]["layer.weight"]["pieces"] = [[0, 4, 0], [4, 5, 1], [9, 1, 1]]
    (archive / INDEX_FILE).write_text(json.dumps(index))
    message = refused(lambda: Archive(archive).whole("layer.weight"))
    assert f"{archive / rank_file(1)} is damaged (layer.weight@4/weight has shape [6], the index says [5])" in message


@pytest.mark.parametrize("content", ["", "[]", '{"parameters": {}}', '{"parameters": {"a": {"what": 1}}}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    assert refused(lambda: Archive(tmp_path)).startswith(f"checkpoint: {tmp_path / INDEX_FILE} is damaged (")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "holds shape [2, 5] and this run has none"),
        ({"layer.weight": (5, 2)}, "holds shape [2, 5] and this run has shape [5, 2]"),
        ({"layer.weight": (2, 5), "layer.bias": (5,)}, "holds none and this run has shape [5]"),
    ],
)
def test_another_model_is_refused_by_its_parameters(archive: Path, given: dict[str, Any], reason: str) -> None:
    opened = Archive(archive)
    shapes = {name: record.shape for name, record in opened.index.parameters.items()}
    message = refused(lambda: opened.check("parameter", shapes, given))
    assert message.startswith("checkpoint: of the parameter layer.")
    assert f"{archive / INDEX_FILE} {reason}; " in message


STEPS, SAVED_AT = 28, 8
LAUNCHER = {1: "python", 2: "deepspeed", 4: "deepspeed"}
#: ranks, stage and precision that a run is saved with, and those that it goes on with
PAIRS = [
    ((2, 2, "fp32"), (1, 0, "fp32")),
    ((2, 2, "fp32"), (1, 3, "fp32")),
    ((2, 2, "fp32"), (4, 3, "fp32")),
    ((2, 2, "fp32"), (1, 1, "fp32")),
    ((1, 0, "fp32"), (2, 3, "fp32")),
    ((2, 3, "fp32"), (2, 1, "fp32")),
    ((2, 3, "fp32"), (4, 0, "fp32")),
    ((2, 1, "bf16"), (1, 2, "bf16")),
    ((2, 0, "bf16"), (2, 3, "bf16")),
    ((2, 3, "bf16"), (1, 0, "bf16")),
]
FAST = PAIRS[:2]
LAMB = [((2, 2, "fp32"), (4, 3, "fp32")), ((2, 2, "fp32"), (1, 1, "fp32"))]
#: of the 20 losses, relative; measured: 1.3e-7 in fp32, twice the curves' resolution, and 1.8e-5 in bf16
BOUND = 1e-4


def options(store: Path, layout: tuple[int, int, str], dropout: bool, optimizer: str) -> list[str]:
    ranks, stage, precision = layout
    return [
        f"--data.path={store}",
        f"--train.steps={STEPS}",
        f"--train.zero_stage={stage}",
        f"--train.precision={precision}",
        f"--train.save_interval={SAVED_AT}",
        "--train.keep=9",
        f"--optim.name={optimizer}",
        f"--train.micro_batch={8 // ranks}",
        *([] if dropout else NO_DROPOUT),
    ]


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run to the end in one layout, with or without dropout, and with a checkpoint in the middle."""

    @cache
    def trained(layout: tuple[int, int, str], dropout: bool, optimizer: str) -> Path:
        output = tmp_path_factory.mktemp("undisturbed")
        run(output, *options(store, layout, dropout, optimizer), launcher=LAUNCHER[layout[0]], ranks=layout[0])
        return output

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        *(pytest.param(*pair, "adamw", marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS),
        *(pytest.param(*pair, "lamb", marks=pytest.mark.slow) for pair in LAMB),
    ],
)
def test_a_run_goes_on_in_another_layout(
    store: Path,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    before: tuple[int, int, str],
    after: tuple[int, int, str],
    optimizer: str,
) -> None:
    """With as many ranks as before, dropout draws the very numbers that it would have drawn."""
    dropout = before[0] == after[0]
    first = undisturbed(before, dropout, optimizer)
    resume = f"--resume={first / 'checkpoints' / f'step-{SAVED_AT:06d}'}"
    printed = run(
        tmp_path, *options(store, after, dropout, optimizer), resume, launcher=LAUNCHER[after[0]], ranks=after[0]
    )
    told = f"saved by {before[0]} rank(s) at ZeRO stage {before[1]}, now {after[0]} rank(s) at stage {after[1]}"
    assert f"at step {SAVED_AT}, {told}" in printed
    assert ("dropout differs" in printed) == (not dropout)
    whole, rest = losses(first), losses(tmp_path)
    assert [step for step, _ in rest] == list(range(SAVED_AT + 1, STEPS + 1))
    worst = max(abs(ours - theirs) / theirs for (_, ours), (_, theirs) in zip(rest, whole[SAVED_AT:], strict=True))
    print(f"{optimizer} {before} -> {after}: largest relative difference of the losses {worst:.1e}")
    assert worst < BOUND
