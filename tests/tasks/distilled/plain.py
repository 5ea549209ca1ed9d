"""Distillation once more in plain torch on transformers' models, one sequence at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config import DistilConfig, RegulariseConfig, architecture_of
from engine.data.loading.source import MicroBatch
from engine.model.folder import TOKENIZER_FILES
from engine.tasks.finetune import FineTuning
from tests.tasks.regularised.plain import distributions, make, wide

__all__ = ["make_taught", "save_teacher", "their_hidden", "their_passes", "their_relations", "their_soft", "wide"]
#: dimensions of a teacher that has another width and depth than the tests' students
LARGER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}


def save_teacher(task: FineTuning, folder: Path, seed: int, **sizes: int) -> Path:
    """A folder of the task's own class with weights of its own, and with the run's tokenizer."""
    config = type(task.model_config).from_dict({**task.model_config.to_dict(), **sizes})
    kind = architecture_of(config).export_class(task.export_class(config))
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that its predictions are no guesses
            parameter.mul_((100.0 if name == "classifier.weight" else 5.0) if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (task.tokenizer / name).is_file():
            shutil.copy(task.tokenizer / name, folder / name)
    return folder


def make_taught(folder: Path, name: str, sizes: tuple[dict[str, int], ...] = ({},), **distil: Any) -> FineTuning:
    """A task with a teacher for each of the given sizes, and no other regulariser."""
    plain = make(folder, name, RegulariseConfig())
    teachers = [save_teacher(plain, folder / f"teacher-{seed}", seed, **each) for seed, each in enumerate(sizes)]
    options = DistilConfig(teachers=",".join(map(str, teachers)), **distil)
    return make(folder, name, RegulariseConfig(), distil=options)


def their_passes(theirs: Any, batch: MicroBatch) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """What transformers' BERT gives of each sequence: logits as ours, hidden states behind each layer, and queries,
    keys and values of each layer."""
    lengths = batch.inputs["lengths"].tolist()
    logits, hidden, projected = [], [], []
    both = (batch.inputs[name].split(lengths) for name in ("input_ids", "token_type_ids"))
    for ids, segments in zip(*both, strict=True):
        one = (None, None) if "question" in batch.inputs else (None,)
        output = theirs(ids[one], token_type_ids=segments[one], output_hidden_states=True)
        if "start_logits" in output:
            logits.append(torch.stack((output.start_logits[0], output.end_logits[0]), 1))
        else:
            logits.append(output.logits.flatten(0, -2))
        states = [each[0] for each in output.hidden_states]
        hidden.append(states[1:])
        attentions = [layer.attention.self for layer in theirs.base_model.encoder.layer]
        projected.append(
            [
                torch.stack([part(entered) for part in (attention.query, attention.key, attention.value)])
                for attention, entered in zip(attentions, states, strict=False)
            ]
        )
    found = torch.cat(logits)
    return found[batch.inputs["read"]] if "read" in batch.inputs else found, hidden, projected


def their_soft(name: str, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
    """The mean over what is learned of the softened divergence."""
    if name == "regression":
        return functional.mse_loss(student, teacher)

    def apart(own: Tensor, told: Tensor) -> Tensor:
        softened = (torch.log_softmax(each / temperature, 1) for each in (own, told))
        return functional.kl_div(*softened, reduction="batchmean", log_target=True) * temperature**2

    if name == "multi_label_classification":
        return apart(*(torch.stack((one, torch.zeros_like(one)), 2).flatten(0, 1) for one in (student, teacher)))
    if name in ("multiple_choice", "question_answering"):
        rows = zip(distributions(student, batch), distributions(teacher, batch), strict=True)
        return torch.stack([apart(*both) for both in rows]).mean()
    return apart(student, teacher)


def their_hidden(own: list[list[Tensor]], told: list[list[Tensor]], project: nn.Module | None) -> Tensor:
    """Jiao et al. 2020, equation 8, of each of the student's layers; the mean over layers and sequences."""
    found = []
    for mine, theirs in zip(own, told, strict=True):
        for index, states in enumerate(mine):
            chosen = theirs[-(-(index + 1) * len(theirs) // len(mine)) - 1]
            found.append(functional.mse_loss(states if project is None else project(states), chosen))
    return torch.stack(found).mean()


def their_relations(own: list[list[Tensor]], told: list[list[Tensor]], heads: int, layer: int) -> Tensor:
    """Wang et al. 2021, equations 4 to 7, summed over queries, keys and values; the mean over sequences."""
    found = []
    for mine, theirs in zip(own, told, strict=True):
        of_sequence = torch.zeros(())
        for student, teacher in zip(mine[-1], theirs[layer], strict=True):
            logs = []
            for states in (student, teacher):
                cut = states.view(len(states), heads, -1).transpose(0, 1)
                logs.append((cut @ cut.transpose(1, 2) / cut.shape[2] ** 0.5).log_softmax(2))
            divergence = functional.kl_div(*logs, reduction="none", log_target=True).sum(2)
            of_sequence = of_sequence + divergence.mean()
        found.append(of_sequence)
    return torch.stack(found).mean()
