"""The configuration of `peft` for each method that it implements; imported with peft when a run has adapters."""

from __future__ import annotations

from typing import Any

import peft

from engine.config import AdapterConfig, Architecture
from engine.config.methods.adapter import VIRTUAL
from engine.model.adapters.budget import DECAY, Schedule

#: by head of `Architecture.export_classes`, what peft calls its task; it has no name for choices
TASK_TYPES = {
    "sequence_classification": peft.TaskType.SEQ_CLS,
    "token_classification": peft.TaskType.TOKEN_CLS,
    "question_answering": peft.TaskType.QUESTION_ANS,
}


def task_type(adapter: AdapterConfig, head: str) -> str | None:
    """What peft is told of the task, which decides the class that opens a folder.

    Its class for answers (0.21) keeps the segments of question and context from the model. Its class without a task
    doesn't, and opens all but virtual tokens.
    """
    plain = head == "question_answering" and adapter.method not in VIRTUAL
    return None if plain else TASK_TYPES.get(head)


def virtual_config(adapter: AdapterConfig, config: Any) -> Any:
    """What peft is told of a prompt or a prefix.

    Args:
        config: the transformers configuration of the model.
    """
    sizes = {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers}
    sizes |= {"num_attention_heads": config.num_attention_heads, "num_transformer_submodules": 1}
    if adapter.method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=adapter.virtual_tokens, **sizes)
    sizes |= {"encoder_hidden_size": config.hidden_size}
    return peft.PrefixTuningConfig(num_virtual_tokens=adapter.virtual_tokens, **sizes)


def peft_config(adapter: AdapterConfig, architecture: Architecture, targets: list[str], steps: int) -> Any:
    """What peft is told of the adapters.

    Args:
        targets: names of the modules that are adapted.
        steps: optimizer steps of the run, which AdaLoRA's budget depends on.
    """
    method = adapter.method
    if method == "ia3":
        inner = architecture.linear["feed-forward-output"]
        behind = [
            name for name in targets if name.endswith(f".{inner}") and not name.endswith("attention.output.dense")
        ]
        return peft.IA3Config(target_modules=targets, feedforward_modules=behind)
    terms: dict[str, Any] = {"target_modules": targets, "lora_alpha": adapter.scale, "lora_dropout": adapter.dropout}
    if method == "adalora":
        schedule = Schedule.of(adapter, steps)
        terms |= {"tinit": schedule.warmup, "tfinal": steps - schedule.last, "total_step": steps}
        terms |= {"beta1": DECAY, "beta2": DECAY}
        terms |= {"init_r": adapter.initial_rank, "target_r": adapter.rank, "deltaT": adapter.interval}
        return peft.AdaLoraConfig(**terms, orth_reg_weight=adapter.orthogonality)
    assert method in ("lora", "dora")
    return peft.LoraConfig(**terms, r=adapter.rank, use_rslora=adapter.rslora, use_dora=method == "dora")
