"""Steps of AdaLoRA by our engine and, on the same batches, by transformers, torch's AdamW and peft's AdaLoraModel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from engine.config import (
    TASKS,
    AdapterConfig,
    LabelledConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.model.adapters import budget
from engine.optim.build import build_optimizer
from engine.train.adapters.adapting import Adapting
from engine.train.adapters.allocation import STATES
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config

STEPS, RATE, BATCH = 12, 5e-3, 16
ADAPTER = AdapterConfig(method="adalora", initial_rank=6, rank=3, warmup=0.2, final=0.25, interval=2)


def build(
    bert: Path,
    data: str,
    stage: int,
    adapter: AdapterConfig = ADAPTER,
    *,
    freeze: str | None = None,
    precision: Precision = "fp32",
    seed: int = 1,
) -> tuple[Any, nn.Module]:
    """A classifier's task, and its model with adapters."""
    config = RunConfig(
        task="sequence_classification",
        seed=seed,
        model=ModelConfig(init_from=str(bert), hidden_dropout=0.0, attention_dropout=0.0),
        labelled=LabelledConfig(train=data, validation=data, max_length=14),
        adapter=adapter,
        train=TrainConfig(steps=STEPS, global_batch=BATCH, zero_stage=stage, freeze=freeze, precision=precision),
        optim=OptimConfig(),
    )
    config.validate()
    task = TASKS.get(config.task).load()(config)
    return task, task.build_model()


def engine(task: Any, model: nn.Module, stage: int) -> tuple[ZeroEngine, Adapting]:
    """On one rank, with nothing left whole at stage 3."""
    values = deepspeed_config(task.config, BatchLayout(BATCH, BATCH), "cpu")
    values["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    optimizer = build_optimizer(model, task.config.optim, torch.device("cpu"), stage)
    zero = ZeroEngine(model, optimizer, values)
    return zero, Adapting(zero, task.adaptation)


def micro_batches(task: Any) -> Iterator[MicroBatch]:
    return training_batches(task.train_source(), BatchLayout(BATCH, BATCH), Cursor(), workers=0)


def theirs(task: Any, bert: Path, ours: nn.Module) -> nn.Module:
    """peft's model over transformers', with the initial values of ours."""
    config = transformers.BertConfig.from_pretrained(
        bert, num_labels=task.model_config.num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    base = transformers.BertForSequenceClassification.from_pretrained(bert, config=config)
    schedule = budget.Schedule.of(ADAPTER, STEPS)
    names = [name for name, _ in base.named_modules() if name in budget.adapted(ours)]
    told = peft.AdaLoraConfig(
        init_r=schedule.initial, target_r=schedule.target, tinit=schedule.warmup, tfinal=STEPS - schedule.last,
        total_step=STEPS, deltaT=schedule.interval, lora_alpha=ADAPTER.scale, target_modules=names,
        orth_reg_weight=ADAPTER.orthogonality, task_type="SEQ_CLS", modules_to_save=["classifier"],
    )  # fmt: skip
    model = peft.get_peft_model(base, told)
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[own_name(name)])
    return model


def own_name(name: str) -> str:
    """Ours of a parameter of peft's."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def padded(batch: MicroBatch) -> dict[str, Tensor]:
    """transformers' arguments of a packed batch."""
    lengths = batch.inputs["lengths"].tolist()
    rows = [row.long() for row in batch.inputs["input_ids"].split(lengths)]
    ones = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence(ones, batch_first=True),
        "labels": batch.inputs["labels"].long(),
    }


def differences(bert: Path, data: str, stage: int, precision: Precision = "fp32") -> list[dict[str, float]]:
    """Of each step the largest differences of weights, sensitivity and uncertainty, in how many triplets the masks
    differ, and how many are kept."""
    task, own = build(bert, data, stage, precision=precision)
    reference: Any = theirs(task, bert, own)
    zero, adapting = engine(task, own, stage)
    terms = task.config.optim
    trained = [p for p in reference.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": terms.weight_decay}]
    groups.append({"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=terms.eps)
    found = []
    for step, batch in zip(range(1, STEPS + 1), micro_batches(task), strict=False):
        zero.backward(adapting.penalised(task.step(zero.model, batch)).loss)
        zero.step(RATE, last_micro_batch=True)
        adapting.after_update()
        reference(**padded(batch)).loss.backward()
        nn.utils.clip_grad_norm_(trained, terms.max_grad_norm)
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(compared(zero, reference, reference.base_model.rankallocator))
    return found


def compared(zero: ZeroEngine, reference: Any, allocator: Any) -> dict[str, float]:
    weights = zero.full_state_dict()
    own = {own_name(name): p.detach() for name, p in reference.named_parameters() if p.requires_grad}
    values = {"weights": max(float((weights[name] - p).abs().max()) for name, p in own.items())}
    zeros = [(weights[name] == 0) != (p == 0) for name, p in own.items() if ".lora_E." in name]
    values["mask"] = float(sum(int(each.sum()) for each in zeros))
    values["kept"] = float(sum(int((weights[name] != 0).sum()) for name in own if ".lora_E." in name))
    for state, theirs in zip(STATES, (allocator.exp_avg_ipt, allocator.exp_avg_unc), strict=True):
        values[state] = max(
            (distance(zero, state, own_name(name), value) for name, value in theirs.items()), default=0.0
        )
    return values


def distance(zero: ZeroEngine, state: str, name: str, expected: Tensor) -> float:
    """The largest difference of a state of a parameter on one rank, in units of the largest that is expected."""
    for shard in zero.wrapper.shards():
        for piece in shard.fragments:
            if shard.parameters[piece.parameter].name == name:
                held = zero.wrapper.client.state[shard.tensor][state].view(-1)[piece.start : piece.start + piece.length]
                return float((held - expected.view(-1)).abs().max() / expected.abs().max().clamp(min=1e-30))
    raise AssertionError(name)
