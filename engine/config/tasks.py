"""What can be trained, by name: all that a command line, a resume and a page of curves need to know of a task.

Nothing here imports torch; the class that does the work is named and imported when a run begins. Another module adds
a task of its own with `TASKS.register` before it calls `launch.train.main`; no part of the package then knows its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.data import DataConfig
from engine.config.labelled_tasks import (
    EMBEDDINGS,
    MULTI_LABEL_CLASSIFICATION,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from engine.config.task_entry import TaskEntry, Title
from engine.errors import require
from engine.registry import Registry

if TYPE_CHECKING:
    from engine.config.run import RunConfig


def _validate_pretraining(config: RunConfig, complete: bool) -> None:
    length, limit = config.data.sequence_length, config.model.positions
    fits = bool(config.model.init_from) or length <= limit
    require(fits, "data.sequence_length", length, f"it exceeds model.max_positions ({limit}); lower it or raise that")


_MASKING = (
    "objective", "sequence_length", "short_sequence_probability", "mask_probability", "mask_probability_end",
    "eval_mask_probability", "mask_replace_probability", "random_replace_probability", "mean_span_length",
    "whole_word_masking",
)  # fmt: skip


def _largest_masked_share(config: RunConfig) -> float:
    """That at the beginning or at the end of the run."""
    return max(config.data.mask_probability, config.data.mask_probability_end or 0.0)


PRETRAIN = TaskEntry(
    about="MLM + NSP, or MLM alone",
    section="data",
    options=DataConfig,
    implementation="engine.tasks.pretrain:Pretraining",
    length="sequence_length",
    inputs=("path",),
    read_share=_largest_masked_share,
    decodes=True,
    pools=lambda config: config.data.objective == "mlm_nsp",
    fixed=_MASKING,
    distils=("teachers",),
    compared=_MASKING,
    results=tuple(f"eval/{name}" for name in ("mlm_loss", "perplexity", "mlm_accuracy", "nsp_accuracy")),
    scores={
        "mlm_loss": Title(
            "masked-language-model loss [nats]",
            "Cross-entropy of a masked token; its exponential is the perplexity.",
        ),
        "nsp_loss": Title("next-sentence loss [nats]", "Cross-entropy of a pair; ln 2 = 0.693 is guessing."),
        "mlm_accuracy": Title("masked-language-model accuracy [share]", "Masked tokens guessed right."),
        "nsp_accuracy": Title("next-sentence accuracy [share]", "Pairs told right; 0.5 is guessing."),
        "perplexity": Title("perplexity", "The exponential of the masked-language-model loss; no unit."),
    },
    validate=_validate_pretraining,
)

TASKS: Registry[TaskEntry] = Registry(
    "task",
    {
        "pretrain": PRETRAIN,
        "sequence_classification": SEQUENCE_CLASSIFICATION,
        "token_classification": TOKEN_CLASSIFICATION,
        "regression": REGRESSION,
        "multi_label_classification": MULTI_LABEL_CLASSIFICATION,
        "multiple_choice": MULTIPLE_CHOICE,
        "question_answering": QUESTION_ANSWERING,
        "embeddings": EMBEDDINGS,
    },
)


def task_entries() -> list[TaskEntry]:
    """The tasks in the order in which they were registered."""
    return [TASKS.get(name) for name in TASKS.names]


def task_choices() -> str:
    """The names that the option takes and what each is, in words."""
    return " or ".join(f"{name} ({TASKS.get(name).about})" for name in TASKS.names)


def tasks_with_field() -> dict[str, tuple[str, ...]]:
    """The dotted fields that name data or decide what is learned from it, and the tasks that read them."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, entry in zip(TASKS.names, task_entries(), strict=True):
        for own in dict.fromkeys((*entry.inputs, *entry.fixed)):
            option = f"{entry.section}.{own}"
            readers[option] = (*readers.get(option, ()), name)
    return readers
