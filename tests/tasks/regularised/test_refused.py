"""Regularisers of the loss that can't be had: one line that names field, value and remedy."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from launch.configure.options import parse_options

START = ["--model.init_from=bert", "--labelled.train=train.jsonl", "--output=run"]
#: fields that single tasks can't do without
NEEDED = {"embeddings": ["--labelled.text_pair=other"], "multiple_choice": ["--labelled.options=options"]}
R_DROP, MIXUP, FGM = "--regularise.r_drop=1", "--regularise.mixup=0.4", "--regularise.adversarial=fgm"
#: task, options, and what is said
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "embeddings": (
        "embeddings", [R_DROP],
        "regularise.r_drop: 1.0 is not allowed; the loss of task embeddings isn't defined with it; leave it out",
    ),
    "embeddings with noise": (
        "embeddings", [FGM],
        "regularise.adversarial: 'fgm' is not allowed; the loss of task embeddings isn't defined with it; leave it out",
    ),
    "pre-training": (
        "pretrain", [R_DROP], "regularise.r_drop: 1.0 is not allowed; task pretrain is no task on labelled data",
    ),
    "two of them": (
        "regression", [R_DROP, FGM],
        "regularise.adversarial: 'fgm' is not allowed; regularise.r_drop is given too, and no loss is defined with "
        "both; give one of them",
    ),
    "two others": (
        "regression", [FGM, MIXUP], "regularise.mixup: 0.4 is not allowed; regularise.adversarial is given too, and",
    ),
    "all": ("regression", [R_DROP, FGM, MIXUP], "regularise.adversarial: 'fgm' is not allowed; regularise.r_drop is"),
    "prompt under noise": (
        "regression", ["--adapter.method=prompt", FGM],
        "adapter.method: 'prompt' is not allowed; regularise.adversarial has noise for the words of texts, and a",
    ),
    "noise of a kind": (
        "regression", ["--regularise.adversarial=pgd"],
        "regularise.adversarial: 'pgd' is not allowed; give one of none, fgm, freelb",
    ),
    "no room for noise": (
        "regression", [FGM, "--regularise.adversarial_norm=0"],
        "regularise.adversarial_norm: 0.0 is not allowed; give a positive number",
    ),
    "steps of one": (
        "regression", [FGM, "--regularise.adversarial_steps=5"],
        "regularise.adversarial_steps: 5 is not allowed; it needs regularise.adversarial freelb",
    ),
    "norm of none": (
        "regression", ["--regularise.adversarial_norm=2"],
        "regularise.adversarial_norm: 2.0 is not allowed; it needs regularise.adversarial fgm or freelb",
    ),
    "no steps": (
        "regression", ["--regularise.adversarial=freelb", "--regularise.adversarial_steps=0"],
        "regularise.adversarial_steps: 0 is not allowed; give a whole number of at least 1",
    ),
    "mixed tags": (
        "token_classification", [MIXUP],
        "regularise.mixup: 0.4 is not allowed; the loss of task token_classification isn't defined with it; leave it",
    ),
    "mixed options": ("multiple_choice", [MIXUP], "the loss of task multiple_choice isn't defined with it"),
    "mixed answers": ("question_answering", [MIXUP], "the loss of task question_answering isn't defined with it"),
    "nothing to mix": (
        "regression", [MIXUP, "--train.micro_batch=1"],
        "train.micro_batch: 1 is not allowed; regularise.mixup pairs the examples of a micro-batch; give at least 2",
    ),
    "mixed less than nothing": (
        "regression", ["--regularise.mixup=-0.1"], "regularise.mixup: -0.1 is not allowed; give 0 or more",
    ),
    "negative": ("regression", ["--regularise.r_drop=-1"], "regularise.r_drop: -1.0 is not allowed; give 0 or more"),
    "infinite": ("regression", ["--regularise.r_drop=inf"], "regularise.r_drop: 'inf' is not allowed"),
    "in words": ("regression", ["--regularise.r_drop=much"], "regularise.r_drop: 'much' is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_is_refused(name: str) -> None:
    task, options, message = REFUSED[name]
    start = ["--output=run"] if task == "pretrain" else [*START, *NEEDED.get(task, ())]
    with pytest.raises(UserError) as caught:
        parse_options([f"--task={task}", *start, *options])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["pretrain", "regression"])
def test_the_configuration_of_an_earlier_run_is_read_though_defaults_have_changed(task: str) -> None:
    start = ["--output=run"] if task == "pretrain" else START
    earlier = ["--regularise.adversarial_norm=1.0", "--regularise.adversarial_rate=0.1"]
    assert parse_options([f"--task={task}", *start, *earlier]).config.regularise.adversarial_norm == 1.0
