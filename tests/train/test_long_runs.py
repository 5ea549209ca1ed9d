"""The recipes of ModernBERT at toy size: 1,024 tokens, then 8,192, then a classifier of texts as long."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.train.runs import losses, run
from tests.train.test_layouts import largest_difference

LONG = 8192
RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
TOY = ("--train.precision=fp32", "--train.save_interval=null", "--train.eval_samples=1", "--train.eval_interval=0")
#: a run of 4 steps has no room for phases of thousands
SCHEDULE = ("--optim.warmup=0", "--optim.learning_rate=2e-3")
WORDS = {"fruit": "apple", "tool": "hammer"}


def recipe(name: str) -> Path:
    """The file of a recipe."""
    return RECIPES / f"{name}.yaml"


@pytest.fixture(scope="module")
def short(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phase 1: 20 steps of sequences of 1,024 tokens."""
    output = tmp_path_factory.mktemp("short")
    dimensions = ("--model.hidden_size=64", "--model.heads=1", "--model.layers=4", "--model.max_positions=1024")
    run(
        output,
        f"--config={recipe('pretrain_modernbert_base')}",
        f"--data.path={store}",
        "--data.sequence_length=1024",
        *dimensions,
        *TOY,
        *SCHEDULE,
        "--train.steps=20",
        "--train.global_batch=4",
    )
    return output


def longer(store: Path, short: Path, output: Path, *more: str, ranks: int = 1) -> None:
    """Phase 2: 4 steps of sequences of 8,192 tokens."""
    run(
        output,
        f"--config={recipe('pretrain_modernbert_base_long')}",
        f"--data.path={store}",
        f"--model.init_from={short / 'export'}",
        f"--model.max_positions={LONG}",
        f"--data.sequence_length={LONG}",
        *TOY,
        *SCHEDULE,
        "--optim.decay=1",
        "--train.steps=4",
        "--train.global_batch=2",
        *more,
        ranks=ranks,
    )


@pytest.mark.slow
def test_the_recipes_lengthen_the_context(store: Path, short: Path, tmp_path: Path) -> None:
    """The loss goes on from phase 1's, at any layout, and the export has the positions and the greater theta."""
    one, two = tmp_path / "one", tmp_path / "two"
    longer(store, short, one)
    before, after = losses(short)[-1][1], losses(one)
    assert all(abs(loss - before) < 0.5 for _, loss in after)
    config = AutoConfig.from_pretrained(one / "export")
    assert config.max_position_embeddings == LONG
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    longer(store, short, two, "--train.zero_stage=3", ranks=2)
    assert largest_difference(losses(two), after) < 1e-6


@pytest.mark.slow
def test_a_classifier_reads_texts_of_8192_tokens(short: Path, tmp_path: Path) -> None:
    """The word that tells the class stands at the end of each text."""
    generator = random.Random(0)
    filler = ["the", "module", "returns", "a", "list", "of", "names", "and", "values"]
    rows = []
    for _ in range(24):
        kind = generator.choice(list(WORDS))
        text = " ".join([*generator.choices(filler, k=LONG - 400), WORDS[kind]])
        rows.append(json.dumps({"sentence": text, "label": kind}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    printed = run(
        tmp_path / "tuned",
        "--task=sequence_classification",
        f"--model.init_from={short / 'export'}",
        f"--model.max_positions={LONG}",
        f"--labelled.train={tmp_path / 'train.jsonl'}",
        f"--labelled.max_length={LONG}",
        "--train.steps=4",
        "--train.global_batch=4",
        "--train.zero_stage=2",
        ranks=2,
    )
    assert "update verified: step 1" in printed
    assert len(losses(tmp_path / "tuned")) == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned" / "export").model_max_length == LONG
