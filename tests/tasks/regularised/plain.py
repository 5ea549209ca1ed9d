"""Each fine-tuning task with regularisers, and its losses once more in plain torch on transformers' models.

Those take one sequence at a time, by the embeddings of its words, so that whoever asks may change these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config import (
    TASKS,
    AdapterConfig,
    LabelledConfig,
    ModelConfig,
    RegulariseConfig,
    RunConfig,
    TrainConfig,
    architecture_of,
)
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.tasks.finetune import FineTuning
from tests.tasks.answers import test_task as answers
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.tasks.tokens.folders import save_model, write_conll

#: tasks, and options of their data
TASKS_OF_LOGITS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"class_weights": "0=0.5,2=3", "label_smoothing": 0.1},
    "token_classification": {"class_weights": "balanced", "label_smoothing": 0.1, "max_length": 16, "stride": 4},
    "multi_label_classification": {},
    "regression": {},
    "multiple_choice": {},
    "question_answering": {"max_length": 28, "stride": 8},
}
#: what a pass of transformers' model does with the embeddings of a sequence's words, [length, H], and its number
Change = Callable[[Tensor, int], Tensor]


def make(folder: Path, task: str, regularise: RegulariseConfig, **parts: Any) -> FineTuning:
    """A task of a tiny BERT with dropout.

    Args:
        parts: of the configuration, but for `labelled`, whose fields these are, and what each task needs.
    """
    if task == "token_classification":
        model, files = save_model(folder / "bert"), [write_conll(folder / n, 40, n == "train") for n in SPLITS]
    elif task == "question_answering":
        model = answers.save_folder(folder / "bert")
        files = [write(folder / f"{n}.jsonl", answers.rows_of(40, n == "train")) for n in SPLITS]
    else:
        model = tiny_bert(folder / "bert")
        files = [write(folder / f"{n}.jsonl", ROWS[task](40, 1 + (n == "train"))) for n in SPLITS]
    values = {"max_length": 14} | TASKS_OF_LOGITS.get(task, {}) | parts.pop("labelled", {})
    given = {"adapter": AdapterConfig(), "train": TrainConfig()} | parts
    config = RunConfig(
        task=task,
        model=ModelConfig(init_from=str(model), hidden_dropout=0.1, attention_dropout=0.1),
        labelled=LabelledConfig(**dict(zip(SPLITS, files, strict=True)), **values),
        regularise=regularise,
        **given,
    )
    config.validate()
    config.monitor.tensorboard = False
    made: FineTuning = TASKS.get(task).load()(config)
    return made


SPLITS = ("train", "validation")


def global_batch(task: FineTuning, size: int = 8) -> MicroBatch:
    """The first one, as one micro-batch."""
    return next(training_batches(task.train_source(), BatchLayout(size, size), Cursor(), workers=0))


def wide(task: FineTuning) -> nn.Module:
    """The task's model in evaluation mode; weights near 0 would leave little but rounding of differences."""
    model = task.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def theirs_of(task: FineTuning, model: nn.Module) -> Any:
    """transformers' model with the same weights, in evaluation mode."""
    kind = architecture_of(task.model_config).export_class(task.export_class(task.model_config))
    theirs = kind(task.model_config).eval()
    missing = theirs.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    return theirs


def their_logits(theirs: Any, batch: MicroBatch, change: Change = lambda words, _: words) -> Tensor:
    """What our model gives for the batch, by one pass for each sequence."""
    lengths = batch.inputs["lengths"].tolist()
    found = []
    of_sequences = zip(
        batch.inputs["input_ids"].split(lengths), batch.inputs["token_type_ids"].split(lengths), strict=True
    )
    for number, (ids, segments) in enumerate(of_sequences):
        words = change(theirs.get_input_embeddings()(ids), number)
        one = (None, None) if "question" in batch.inputs else (None,)
        output = theirs(inputs_embeds=words[one], token_type_ids=segments[one])
        if "start_logits" in output:
            found.append(torch.stack((output.start_logits[0], output.end_logits[0]), 1))
        else:
            found.append(output.logits.flatten(0, -2))
    logits = torch.cat(found)
    return logits[batch.inputs["read"]] if "read" in batch.inputs else logits


def distributions(logits: Tensor, batch: MicroBatch) -> list[Tensor]:
    """The logits of each question's options, or of the first and of the last tokens of each window, in rows [1, n]."""
    if "question" in batch.inputs:
        questions = batch.inputs["question"]
        return [logits[questions == number].T for number in range(len(batch.inputs["labels"]))]
    return [column[None] for window in logits.split(batch.inputs["lengths"].tolist()) for column in window.unbind(1)]


def their_loss(task: FineTuning, logits: Tensor, batch: MicroBatch, labels: Tensor | None = None) -> Tensor:
    """The mean over what is learned."""
    labels = batch.inputs["labels"] if labels is None else labels
    name, smoothing = task.config.task, task.config.labelled.label_smoothing
    if name == "regression":
        return functional.mse_loss(logits[:, 0], labels)
    if name == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, labels.float())
    if name in ("multiple_choice", "question_answering"):
        rows = zip(distributions(logits, batch), labels.flatten(), strict=True)
        return torch.stack([functional.cross_entropy(row, label[None]) for row, label in rows]).mean()
    return functional.cross_entropy(logits, labels, task.class_weights, label_smoothing=smoothing)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Half of the sum of both directions, of logits [N, C]; the mean over N."""
    logs = first.log_softmax(1), second.log_softmax(1)
    ways = (logs, logs[::-1])
    return sum(functional.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ways) / 2  # type: ignore[return-value]


def their_divergence(name: str, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
    """Of what two passes predict, the mean over what is learned."""
    if name == "regression":
        return (first - second).square().mean()
    if name == "multi_label_classification":  # each label: has it, or not
        return divergence(*(torch.stack((one, torch.zeros_like(one)), 2).flatten(0, 1) for one in (first, second)))
    if name in ("multiple_choice", "question_answering"):
        rows = zip(distributions(first, batch), distributions(second, batch), strict=True)
        return torch.stack([divergence(*both) for both in rows]).mean()
    return divergence(first, second)


def same_gradients(ours: nn.Module, theirs: nn.Module, bound: float = 1e-5) -> None:
    """Whether the gradients of parameters of equal names differ by no more than a share of the largest element."""
    other = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in other.values() if p.grad is not None)
    compared = [name for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert compared
    for name in compared:
        gradient, expected = ours.get_parameter(name).grad, other[name].grad
        assert gradient is not None
        assert expected is not None, name
        torch.testing.assert_close(gradient, expected, rtol=0, atol=bound * largest, msg=name)
