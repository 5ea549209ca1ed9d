"""A run with adapters tells how far each moved, and fails where one did not."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from engine.config import AdapterConfig
from engine.errors import RunError
from engine.model.adapters.folder import saved_name
from engine.train.adapters.movement import COLUMNS, TABLE, Moved, Sums
from tests.single_rank import single_rank
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.adapters.against_peft import build
from tests.train.runs import NO_DROPOUT, free_port, losses, run

PREFIX = "bert.encoder.layer.0"
LINEAR = [
    f"{PREFIX}.attention.self.query", f"{PREFIX}.attention.self.key", f"{PREFIX}.attention.self.value",
    f"{PREFIX}.attention.output.dense", f"{PREFIX}.intermediate.dense", f"{PREFIX}.output.dense",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and labelled examples."""
    made = tmp_path_factory.mktemp("movement")
    tiny_bert(made / "bert")
    write(made / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(made / "validation.jsonl", ROWS["sequence_classification"](24, 2))
    return made


def options(folder: Path, *more: str) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", "--labelled.max_length=14",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        "--train.steps=4", "--optim.schedule=constant", "--optim.warmup=0", *NO_DROPOUT, *more,
    ]  # fmt: skip


def rows(output: Path) -> dict[str, dict[str, str]]:
    with (output / "report" / TABLE).open(newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        assert tuple(table.fieldnames or ()) == COLUMNS
        return {row["module"]: row for row in table}


@pytest.mark.slow
def test_the_table_is_what_export_and_base_tell(folder: Path) -> None:
    """On two ranks at ZeRO-3; the initial factors are known from the run's seed alone."""
    output = folder / "lora"
    more = ["--adapter.method=lora", "--adapter.rank=4", "--train.zero_stage=3", "--train.micro_batch=8"]
    said = run(output, *options(folder, *more, "--monitor.norm_interval=2"), ranks=2)
    table = rows(output)
    assert list(table) == [*LINEAR, "classifier"]
    trained = load_file(output / "export" / "adapter_model.safetensors")
    seed = yaml.safe_load((output / "config.yaml").read_text())["seed"]
    _, model = build(folder / "bert", str(folder / "train.jsonl"), 0, AdapterConfig(method="lora", rank=4), seed=seed)
    initial = {saved_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert initial.keys() == trained.keys()
    for module, row in table.items():
        own = [name for name in trained if name.startswith(f"base_model.model.{module}.")]
        norm = sum(float(trained[name].double().square().sum()) for name in own) ** 0.5
        change = sum(float((trained[name] - initial[name]).double().square().sum()) for name in own) ** 0.5
        assert int(row["parameters"]) == sum(trained[name].numel() for name in own)
        assert float(row["norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(row["change"]) == pytest.approx(change, rel=1e-6)
        assert float(row["ratio"]) == pytest.approx(change / norm, rel=1e-5)
    ratios = [float(row["ratio"]) for row in table.values()]
    assert f"adapters moved: 7 modules, change {min(ratios):.2g} to {max(ratios):.2g} of their norm" in said
    assert [step for step, _ in losses(output, "update_norm/layer.0")] == [2, 4]


@pytest.mark.slow
def test_adapters_that_stay_as_they_are_end_the_run(folder: Path) -> None:
    """Their learning rate is too small for fp32; that of the head is not. A resume at the last step says so again."""
    output = folder / "stuck"
    rates = ["--optim.learning_rate=1e-3", "--optim.layer_decay=1e-46"]
    small = options(folder, "--adapter.method=lora", *rates, "--train.verify_update=0")  # the certificate would see it
    said = [run(output, *small, code=1), run(output, *small, "--resume=auto", code=1)]
    for text in said:
        (line,) = [line for line in text.splitlines() if "not trained: " in line]
        assert f"not trained: {', '.join(LINEAR[:3])} and 3 more of 7 modules did not move" in line
        assert "Traceback" not in text
    assert "at step 4" in said[1]
    table = rows(output)
    assert [float(table[name]["change"]) for name in LINEAR] == [0.0] * 6
    assert float(table["classifier"]["change"]) > 0
    assert not (output / "report" / "report.txt").exists()


CASES = [
    (AdapterConfig(method="dora"), None, LINEAR),
    (AdapterConfig(method="adalora", interval=1), None, LINEAR),
    (AdapterConfig(method="ia3"), None, [LINEAR[1], LINEAR[2], LINEAR[5]]),
    (AdapterConfig(method="houlsby", bottleneck=4), None, [LINEAR[3], LINEAR[5]]),
    (AdapterConfig(method="prompt", virtual_tokens=2), None, ["bert.embeddings.word_embeddings"]),
    (AdapterConfig(method="prefix", virtual_tokens=2), None, [f"{PREFIX}.attention.self.prefix"]),
    (AdapterConfig(method="bitfit"), None, [*LINEAR, "bert.embeddings.LayerNorm", "bert.pooler.dense"]),
    (AdapterConfig(), "embeddings,layers", ["bert.pooler.dense"]),
]
"""adapters, train.freeze, and modules that move besides the head"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_every_method_moves_all_of_its_modules(folder: Path, stage: int) -> None:
    with single_rank(free_port()) as rank:
        for adapter, freeze, modules in CASES:
            moved = rank.apply(moved_by, (folder / "bert", str(folder / "train.jsonl"), stage, adapter, freeze))
            assert {*modules, "classifier"} <= moved.keys()
            assert [name for name, m in moved.items() if m.stuck or not 0 < m.change < m.norm * 10] == []


def moved_by(bert: Path, data: str, stage: int, adapter: AdapterConfig, freeze: str | None) -> dict[str, Moved]:
    """What three steps move, and before the first nothing."""
    from tests.train.adapters.against_peft import engine, micro_batches

    task, model = build(bert, data, stage, adapter, freeze=freeze)
    zero, adapting = engine(task, model, stage)
    assert adapting._movement is not None
    before = adapting._movement.measured()
    assert all(m.stuck and m.change == 0.0 for m in before.values())
    for _, batch in zip(range(3), micro_batches(task), strict=False):
        zero.backward(adapting.penalised(task.step(zero.model, batch)).loss)
        zero.step(5e-3, last_micro_batch=True)
        adapting.after_update()
    return adapting._movement.measured()


@pytest.mark.parametrize(("rate", "steps"), [(1e-3, 1000), (1e-4, 20), (1e-2, 3)])
def test_weight_decay_alone_is_no_training(rate: float, steps: int) -> None:
    """torch's AdamW with gradients of zero, as a parameter has that ZeRO forgets, and with others."""
    for factor, idle in ((0.0, True), (1e-3, False)):
        weight = torch.nn.Parameter(torch.ones(4, 16))  # as IA3's vectors begin
        initial = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.01)
        for step in range(steps):
            weight.grad = factor * torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        now, before = weight.detach().double(), initial.double()
        found = [float((a * b).sum()) for a, b in ((now, now), (now - before,) * 2, (before, before), (now, before))]
        sums = Sums(64, *found)
        assert sums.change > 0
        assert sums.idle is idle


def test_a_factor_of_zeros_that_moves_only_by_decay_elsewhere_is_stuck(tmp_path: Path) -> None:
    """As LoRA's B in https://github.com/huggingface/peft/issues/1402, whose A weight decay still moves."""
    from engine.train.adapters import movement

    squares = {"A": movement.Sums(8, 2.0, 0.1, 2.2, 2.05), "B": movement.Sums(8, 0.0, 0.0, 0.0, 0.0)}
    assert movement.together(squares, [("A", True), ("B", True)]).stuck
    assert not movement.together(squares, [("A", False), ("B", False)]).stuck  # a layer's weight, and its bias
    assert movement.together(squares, [("B", False)]).stuck

    class Measured(movement.Movement):
        def __init__(self) -> None:
            pass

        def measured(self) -> dict[str, Moved]:
            return {"query": Moved(8, 1.0, 0.5, False), "key": Moved(8, 1.0, 0.5, True)}

    with pytest.raises(RunError, match=r"^not trained: key of 2 modules"):
        movement.prove(Measured(), tmp_path)
    movement.prove(Measured(), tmp_path, emptied=frozenset({"key"}))


def test_a_whole_model_is_not_asked(folder: Path) -> None:
    run(folder / "all", *options(folder, "--train.steps=1"))
    assert not (folder / "all" / "report" / TABLE).exists()
    origin = json.loads((folder / "all" / "export" / "zerobert.json").read_text())
    assert "adaptation" not in origin
    BertForSequenceClassification.from_pretrained(folder / "all" / "export")
