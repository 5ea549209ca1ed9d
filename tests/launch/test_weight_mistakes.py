"""Mistakes with regularisers of weights: one line that names field, value and remedy."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from launch.configure.options import parse_options

LABELLED = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.jsonl"]
NVME = ["--zero.offload_optimizer=nvme", "--zero.nvme_path=disk", "--train.zero_stage=3"]
MISTAKES: list[tuple[list[str], str]] = [
    (["--regularise.start_decay=-1"], "regularise.start_decay: -1.0 is not allowed; give 0 or more"),
    (["--regularise.start_decay=nan"], "regularise.start_decay: 'nan' is not allowed"),
    (
        ["--regularise.start_decay=200", "--optim.learning_rate=1e-2"],
        "regularise.start_decay: 200.0 is not allowed; times optim.learning_rate 0.01 it is above 1",
    ),
    (["--regularise.start_decay=1", *NVME], "regularise.start_decay: 1.0 is not allowed; zero.offload_optimizer nvme"),
    (
        ["--regularise.start_decay=1", "--adapter.method=lora"],
        "regularise.start_decay: 1.0 is not allowed; adapter.method lora trains no pre-trained weight; leave it out",
    ),
    (["--regularise.ema=1"], "regularise.ema: 1.0 is not allowed; give a share in [0, 1)"),
    (["--regularise.ema=much"], "regularise.ema: 'much' is not allowed"),
    (["--regularise.ema=0.9", *NVME], "regularise.ema: 0.9 is not allowed; zero.offload_optimizer nvme has no place"),
    (
        ["--regularise.ema=0.9", "--adapter.method=adalora"],
        "regularise.ema: 0.9 is not allowed; adapter.method adalora sets weights to 0 between steps",
    ),
    (["--regularise.layer_drop=1"], "regularise.layer_drop: 1.0 is not allowed; give a share in [0, 1)"),
    (["--regularise.dropout_end=-0.1"], "regularise.dropout_end: -0.1 is not allowed; give a share of the first"),
    (["--regularise.fresh_layers=-1"], "regularise.fresh_layers: -1 is not allowed; give 0 or more"),
    (["--regularise.fresh_layers=1.5"], "regularise.fresh_layers: '1.5' is not allowed"),
    (
        ["--task=pretrain", "--regularise.ema=0.9"],
        "regularise.ema: 0.9 is not allowed; task pretrain is no task on labelled data; leave it out",
    ),
    (
        ["--optim.decay_of=heads=0.1"],
        "optim.decay_of: 'heads=0.1' is not allowed; 'heads=0.1' is no part and its decay",
    ),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_mistake_is_one_line(options: list[str], said: str) -> None:
    given = [] if options[0] == "--task=pretrain" else LABELLED
    with pytest.raises(UserError) as found:
        parse_options([*given, *options])
    assert said in str(found.value)
    assert "\n" not in str(found.value)
