"""The map of ZeRO's tensors to parameters, against what real DeepSpeed ranks do at every stage and precision."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.optim.shard import Fragment, Shard
from engine.precision import DTYPES
from engine.zero.wrappers.known import wrapper_of
from engine.zero.wrappers.pieces import window
from tests.train.runs import execute
from tests.zero.partition_worker import CASES, Model, slope, update, weight

SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}
TRAINABLE = {name for name, p in Model().named_parameters() if p.requires_grad}
MAPPED = {name: case for name, case in CASES.items() if not case.zero.get("round_robin_gradients")}
RUNS = [
    pytest.param(ranks, name, id=f"{ranks}-ranks-{name}", marks=[] if ranks == 2 else pytest.mark.slow)
    for ranks in (1, 2, 3, 4)
    for name, case in MAPPED.items()
    if ranks in case.ranks
]
every_run = pytest.mark.parametrize(("ranks", "name"), RUNS)


@cache
def launch(ranks: int) -> list[dict[str, dict[str, Any]]] | str:
    """What each of `ranks` ranks recorded: {case: record}, all cases in one launch; what it printed if it failed."""
    with TemporaryDirectory() as folder:
        done = execute("tests/zero/partition_worker.py", folder, ranks=ranks)
        if done.returncode != 0:
            return done.stdout
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def recorded(ranks: int, name: str) -> list[dict[str, Any]]:
    """The record of one case on each rank."""
    records = launch(ranks)
    assert not isinstance(records, str), records
    return [of_rank[name] for of_rank in records]


def pieces(record: dict[str, Any]) -> list[tuple[dict[str, Any], str, slice, slice]]:
    """(shard, parameter's name, range of the shard, range of the parameter) of every fragment of a rank."""
    found = []
    for shard in record["shards"]:
        for parameter, start, length, parameter_start in shard["fragments"]:
            part = slice(parameter_start, parameter_start + length)
            found.append((shard, shard["parameters"][parameter][0], slice(start, start + length), part))
    return found


@pytest.mark.slow
@every_run
def test_a_fragment_holds_its_range_of_the_parameter(ranks: int, name: str) -> None:
    for record in recorded(ranks, name):
        assert record["wrapper"] == CASES[name].wrapper
        for shard, parameter, here, there in pieces(record):
            assert torch.equal(shard["values"][here], weight(parameter, SHAPES[parameter]).view(-1)[there]), parameter


@every_run
def test_a_fragment_of_the_gradient_is_the_parameters(ranks: int, name: str) -> None:
    """Halves are averaged over three ranks in their own precision, where a third is not exact."""
    tolerance = 0.0 if CASES[name].precision == "fp32" else 1e-2
    for record in recorded(ranks, name):
        for shard, parameter, here, there in pieces(record):
            uses = {"pooler": 0, "embedding": 2}.get(parameter.partition(".")[0], 1)
            expected = uses * slope(parameter, SHAPES[parameter]).view(-1)[there]
            torch.testing.assert_close(shard["gradient"][here], expected, rtol=tolerance, atol=0.0, msg=parameter)


@every_run
def test_fragments_cover_every_trainable_parameter_once_and_nothing_else(ranks: int, name: str) -> None:
    split = CASES[name].stage > 0 and ranks > 1
    counts = {parameter: torch.zeros(prod(shape)) for parameter, shape in SHAPES.items()}
    for record in recorded(ranks, name):
        covered = [torch.zeros(len(shard["values"])) for shard in record["shards"]]
        for index, shard in enumerate(record["shards"]):
            for _, start, length, _ in shard["fragments"]:
                covered[index][start : start + length] += 1
        assert max(float(places.max()) for places in covered) == 1.0
        for _, parameter, _, there in pieces(record):
            counts[parameter][there] += 1
    for parameter, count in counts.items():
        times = (1 if split else ranks) if parameter in TRAINABLE else 0
        assert count.eq(times).all(), parameter


@every_run
def test_what_is_written_through_fragments_arrives_in_the_model(ranks: int, name: str) -> None:
    for record in recorded(ranks, name):
        for parameter, trained in record["weights"].items():
            new = update if parameter in TRAINABLE else weight
            expected = new(parameter, SHAPES[parameter]).to(DTYPES[CASES[name].precision]).float()
            assert torch.equal(trained.view(expected.shape), expected), parameter


@every_run
def test_a_step_gets_exactly_the_mapped_tensors(ranks: int, name: str) -> None:
    for record in recorded(ranks, name):
        stepped = [index for call in record["calls"] for index in call]
        assert stepped == list(range(len(record["shards"])))


@every_run
def test_ranks_agree_on_shards_and_parameters(ranks: int, name: str) -> None:
    """So a table of one row a parameter can be reduced over the shard's ranks."""
    split = CASES[name].stage > 0 and ranks > 1
    shared = [
        [(shard["group"], shard["parameters"], shard["split"]) for shard in record["shards"]]
        for record in recorded(ranks, name)
    ]
    assert all(of_rank == shared[0] for of_rank in shared)
    for group, parameters, is_split in shared[0]:
        assert is_split == split
        assert all((group == 0) == (len(shape) >= 2) and SHAPES[parameter] == shape for parameter, shape in parameters)
    named = Counter(parameter for _, parameters, _ in shared[0] for parameter, _ in parameters)
    assert named == Counter(TRAINABLE)


def test_the_cases_are_as_hard_as_they_should_be() -> None:
    """Padding, parameters cut between ranks, ranks without a piece, several sub-groups a group."""
    runs = {name: recorded(2, name) for name in ("2-fp32", "2-fp32-aligned", "3-fp32", "3-fp32-small-groups")}
    sizes = {
        name: [[len(shard["values"]) for shard in record["shards"]] for record in run] for name, run in runs.items()
    }
    padding = {
        name: sum(map(sum, sizes[name])) - sum(prod(SHAPES[parameter]) for parameter in TRAINABLE) for name in runs
    }
    assert 0 < padding["2-fp32"] < padding["2-fp32-aligned"]
    assert padding["3-fp32"] == padding["3-fp32-small-groups"] > 0
    assert any(there.start > 0 for _, _, _, there in pieces(runs["2-fp32"][1]))
    assert len(sizes["3-fp32"][0]) == 2 < len(sizes["3-fp32-small-groups"][0])


def test_round_robin_gradients_are_refused() -> None:
    for record in recorded(2, "2-round-robin"):
        assert record["refused"].startswith("zero_optimization.round_robin_gradients: true ")
        assert record["refused"].endswith("set it to false")


def test_window_cuts_fragments_and_drops_what_is_outside() -> None:
    whole = [Fragment(0, 0, 4, 0), Fragment(1, 4, 3, 0), Fragment(2, 8, 2, 0)]
    assert window(whole, 0, 10) == tuple(whole)
    assert window(whole, 2, 6) == (Fragment(0, 0, 2, 2), Fragment(1, 2, 2, 0))
    assert window(whole, 6, 9) == (Fragment(1, 0, 1, 2), Fragment(2, 2, 1, 0))
    assert window(whole, 5, 6) == (Fragment(1, 0, 1, 1),)
    assert window(whole, 7, 8) == window(whole, 10, 20) == ()


class DeepSpeedZeroOptimizer:
    """As DeepSpeed's, of one rank, for a group of a 2x3 and a 2-element parameter."""

    def __init__(self, flat: Tensor, places: list[int]) -> None:
        self.round_robin_gradients = False
        shapes = [(2, 3), (2,)]
        views = [flat[place:][: prod(shape)].view(shape) for place, shape in zip(places, shapes, strict=True)]
        self.bit16_groups = [[nn.Parameter(view) for view in views]]
        self.bit16_groups_flat = [flat]
        self.real_dp_process_group = [None]
        self.optimizer = SimpleNamespace(param_groups=[{"params": [torch.zeros(len(flat))]}])


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)


def engine_of(wrapper: Any) -> Any:
    parameters = [p for group in getattr(wrapper, "bit16_groups", []) for p in group]
    module = SimpleNamespace(named_parameters=lambda: [(f"p{index}", p) for index, p in enumerate(parameters)])
    return SimpleNamespace(module=module, optimizer=wrapper)


def refusal(wrapper: Any) -> str:
    with pytest.raises(UserError) as caught:
        wrapper_of(engine_of(wrapper)).shards()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("one_rank")
def test_the_place_of_a_parameter_is_seen_from_its_memory() -> None:
    wrapper = DeepSpeedZeroOptimizer(torch.zeros(10), [3, 0])
    (shard,) = wrapper_of(engine_of(wrapper)).shards()
    assert isinstance(shard, Shard)
    assert shard.fragments == (Fragment(1, 0, 2, 0), Fragment(0, 3, 6, 0))
    assert [info.name for info in shard.parameters] == ["p0", "p1"]


class ZenFlowZeroOptimizer:
    """A wrapper that is not known."""


def test_an_unknown_wrapper_is_refused_by_name_and_version() -> None:
    for wrapper in (ZenFlowZeroOptimizer(), None, nn.Linear(1, 1)):
        message = refusal(wrapper)
        assert message.startswith("zero_optimization: ")
        assert f"{type(wrapper).__name__} of DeepSpeed 0." in message


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: delattr(w, "bit16_groups_flat"), "has no bit16_groups_flat"),
        (lambda w: w.bit16_groups_flat.append(torch.zeros(1)), "lists of [1, 2, 1, 1] entries"),
        (lambda w: w.optimizer.param_groups[0]["params"].append(torch.zeros(1)), "steps 2 tensors"),
        (lambda w: w.optimizer.param_groups[0].update(params=[torch.zeros(9)]), "1 ranks step 9 elements each of 10"),
        (lambda w: w.optimizer.param_groups[0].update(params=[torch.zeros(10).half()]), "torch.float16"),
        (lambda w: w.bit16_groups_flat.__setitem__(0, torch.zeros(10)), "no view of its group's flat buffer"),
        (lambda w: w.bit16_groups[0].append(nn.Parameter(w.bit16_groups_flat[0][5:8])), "p2 overlaps"),
        (lambda w: w.bit16_groups_flat.__setitem__(0, w.bit16_groups_flat[0][:7]), "p1 exceeds its tensor of 7"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(change: Any, reason: str) -> None:
    wrapper = DeepSpeedZeroOptimizer(torch.zeros(10), [0, 6])
    change(wrapper)
    message = refusal(wrapper)
    assert message.startswith("deepspeed: the tensors of DeepSpeedZeroOptimizer of DeepSpeed 0.")
    assert reason in message


def zero_3(**changes: Any) -> Any:
    """As DeepSpeed's wrapper at stage 3, of one rank, for one sub-group of a 2x3 and a 2-element parameter."""
    parameters = [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))]
    for p, shape in zip(parameters, [(2, 3), (2,)], strict=True):
        p.ds_shape = torch.Size(shape)  # type: ignore[attr-defined]
    attributes = {
        "swap_optimizer": False,
        "bit16_groups": [parameters],
        "fp16_groups": [parameters],
        "fp32_partitioned_groups_flat": [torch.zeros(8)],
        "sub_group_process_groups": [None],
        "grad_position": {0: [0, 0, 6], 1: [0, 6, 2]},
        "get_param_id": lambda parameter: 0 if parameter is parameters[0] else 1,
        "sub_group_to_group_id": {0: 3},
    }
    return type("DeepSpeedZeroOptimizer_Stage3", (SimpleNamespace,), {})(**(attributes | changes))


@pytest.mark.usefixtures("one_rank")
def test_a_sub_group_knows_its_parameter_group() -> None:
    (shard,) = wrapper_of(engine_of(zero_3())).shards()
    assert shard.group == 3
    assert shard.fragments == (Fragment(0, 0, 6, 0), Fragment(1, 6, 2, 0))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grad_position": {0: [0, 0, 6], 1: [1, 6, 2]}}, "1 ranks have 2 elements each of p1, which has 2"),
        ({"grad_position": {0: [0, 0, 7], 1: [0, 7, 2]}}, "1 ranks have 7 elements each of p0, which has 6"),
        ({"grad_position": {0: [0, 0, 6], 1: [0, 5, 2]}}, "p1 overlaps"),
        ({"fp32_partitioned_groups_flat": [torch.zeros(7)]}, "p1 exceeds its tensor of 7"),
    ],
)
def test_a_sub_group_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(zero_3(**changes))


def test_a_master_of_another_shape_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    wrapper = type("FP16_UnfusedOptimizer", (SimpleNamespace,), {})(
        bit16_groups=[[parameter]],
        fp16_groups=[[parameter]],
        optimizer=SimpleNamespace(param_groups=[{"params": [torch.zeros(6)]}]),
    )
    assert "a master of [6] for a parameter of [2, 3]" in refusal(wrapper)
