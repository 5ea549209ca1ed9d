"""Prompts and prefixes train alike on every layout; their exports open in peft and predict what the run reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from launch.curves import Curve
from tests.tasks.answers.test_task import rows_of, save_folder
from tests.tasks.embeddings import worlds
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import TINY, WORDS, save_tokenizer, tiny_bert
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference

BOUND = 1e-4
STEPS = 5
VECTORS = 3
METHODS = ("prompt", "prefix")
ROWS_HELD = ROWS["sequence_classification"](24, 2)
#: without this ZeRO-3 keeps parameters as small as these whole
DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("virtual")
    tiny_bert(folder / "bert")
    write(folder / "train.jsonl", ROWS["sequence_classification"](90, 1))
    write(folder / "validation.jsonl", ROWS_HELD)
    (folder / "divided.json").write_text(json.dumps(DIVIDED))
    return folder


def options(data: Path, method: str, *more: str) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={data / 'bert'}",
        f"--labelled.train={data / 'train.jsonl'}", f"--labelled.validation={data / 'validation.jsonl'}",
        "--labelled.max_length=12", f"--adapter.method={method}", f"--adapter.virtual_tokens={VECTORS}",
        f"--train.steps={STEPS}", "--optim.learning_rate=2e-2", "--optim.schedule=constant", "--optim.warmup=0",
        "--train.save_interval=null", "--train.verify_update=2", *more,
    ]  # fmt: skip


def layout(data: Path, ranks: int, stage: int, accumulation: int) -> list[str]:
    divided = [f"--deepspeed_config={data / 'divided.json'}"] if stage == 3 else []
    return [f"--train.micro_batch={16 // ranks // accumulation}", f"--train.zero_stage={stage}", *divided]


@pytest.fixture(scope="module", params=METHODS)
def alone(data: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A method, and the folder of its run in one process."""
    output = data / f"alone {request.param}"
    run(output, *options(data, request.param, *NO_DROPOUT, *layout(data, 1, 0, 1)))
    return request.param, output


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "accumulation", "more"),
    [
        (3, 2, ["--model.activation_checkpointing=true"]),
        pytest.param(3, 2, [], marks=pytest.mark.slow),
        pytest.param(2, 2, [], marks=pytest.mark.slow),
        pytest.param(1, 1, [], marks=pytest.mark.slow),
        pytest.param(0, 2, ["--model.activation_checkpointing=true"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_what_one_learns(
    data: Path, alone: tuple[str, Path], tmp_path: Path, stage: int, accumulation: int, more: list[str]
) -> None:
    method, one = alone
    run(tmp_path / "two", *options(data, method, *NO_DROPOUT, *layout(data, 2, stage, accumulation), *more), ranks=2)
    together, whole = losses(tmp_path / "two"), losses(one)
    worst = largest_difference(together, whole)
    print(
        f"{method}, 2 ranks, ZeRO-{stage}, accumulation {accumulation} {more}: largest relative difference {worst:.1e}"
    )
    assert len(together) == STEPS
    assert worst < BOUND
    assert report(tmp_path / "two")["scores"] == pytest.approx(report(one)["scores"], rel=BOUND)
    ours, theirs = (load_file(folder / "export" / "adapter_model.safetensors") for folder in (tmp_path / "two", one))
    assert ours.keys() == theirs.keys()
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-4 for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_goes_on_bit_for_bit_with_dropout_on(data: Path, tmp_path: Path, method: str, stage: int) -> None:
    given = [*options(data, method, *layout(data, 2, stage, 1)), "--model.hidden_dropout=0.1"]
    run(tmp_path / "whole", *given, ranks=2)
    run(tmp_path / "parts", *given, "--train.steps=2", "--train.save_interval=1", ranks=2)
    assert "resumed" in run(tmp_path / "parts", *given, "--resume=auto", ranks=2)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_learns_the_same_but_for_rounding(data: Path, alone: tuple[str, Path], tmp_path: Path, stage: int) -> None:
    method, one = alone
    given = options(data, method, *NO_DROPOUT, *layout(data, 2, stage, 1), "--train.precision=bf16")
    run(tmp_path / "two", *given, ranks=2)
    worst = largest_difference(losses(tmp_path / "two"), losses(one))
    print(f"{method}, bf16, ZeRO-{stage}: {worst:.1e}")
    assert worst < 0.03


@pytest.mark.slow
def test_vectors_are_trained_and_the_loss_falls(data: Path, alone: tuple[str, Path], tmp_path: Path) -> None:
    method, one = alone
    curve: Curve = losses(one)
    assert curve[-1][1] < 0.95 * curve[0][1]
    run(tmp_path / "still", *options(data, method, "--optim.learning_rate=1e-6", "--train.verify_update=0"))
    drawn = load_file(tmp_path / "still" / "export" / "adapter_model.safetensors")["prompt_embeddings"]
    trained = load_file(one / "export" / "adapter_model.safetensors")["prompt_embeddings"]
    assert float((trained - drawn).abs().min()) > 0


def test_the_export_predicts_what_the_run_reported(alone: tuple[str, Path]) -> None:
    _, output = alone
    records = [{"sentence": row["sentence"]} for row in ROWS_HELD]
    rows = list(predict_rows(PredictConfig(str(output), "rows", "-", probabilities=True), records))
    chances = torch.tensor(
        [row["predicted_probabilities"][str(held["label"])] for row, held in zip(rows, ROWS_HELD, strict=True)]
    )
    scores = report(output)["scores"]
    assert float(-chances.log().mean()) == pytest.approx(scores["loss"], rel=1e-5)
    right = [row["predicted_label"] == str(held["label"]) for row, held in zip(rows, ROWS_HELD, strict=True)]
    assert sum(right) / len(right) == pytest.approx(scores["accuracy"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_opens_the_export(data: Path, alone: tuple[str, Path]) -> None:
    """A prompt runs in peft; a prefix does in transformers, with the cache that peft makes of it."""
    method, output = alone
    config = transformers.AutoConfig.from_pretrained(output / "export")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(data / "bert", config=config)
    opened = peft.PeftModel.from_pretrained(base, output / "export").eval()
    assert opened.active_peft_config.peft_type == f"{method.upper()}_TUNING"
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "export")
    losses_of = []
    for row in ROWS_HELD:
        inputs = tokenizer(row["sentence"], return_tensors="pt", truncation=True, max_length=12)
        labels = torch.tensor([config.label2id[str(row["label"])]])
        with torch.no_grad():
            if method == "prompt":
                found = opened(**inputs, labels=labels)
            else:
                inputs["attention_mask"] = torch.ones(1, VECTORS + inputs["input_ids"].shape[1])
                found = opened.base_model(**inputs, labels=labels, past_key_values=opened.get_prompt(1))
        losses_of.append(float(found.loss))
    assert sum(losses_of) / len(losses_of) == pytest.approx(report(output)["scores"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_answers_and_choices(tmp_path: Path, method: str) -> None:
    """Each export was compared in logits before it was written; what it was compared with is told."""
    save_folder(tmp_path / "bert")
    tiny_bert(tmp_path / "tiny")
    for seed, split in enumerate(("train", "validation")):
        write(tmp_path / f"{split}.jsonl", rows_of(40, seed, 0.3))
        write(tmp_path / f"{split}-choices.jsonl", ROWS["multiple_choice"](40, seed))
    own = [f"--adapter.method={method}", f"--adapter.virtual_tokens={VECTORS}", "--train.steps=3"]
    asked = ["--labelled.max_length=28", "--labelled.stride=8", "--labelled.max_answer_length=4"]
    tasks = {
        "question_answering": ("bert", "", asked, "BertForQuestionAnswering with the prompt"),
        "multiple_choice": ("tiny", "-choices", ["--labelled.max_length=12"], "BertForMultipleChoice with the prompt"),
    }
    for task, (folder, suffix, more, judge) in tasks.items():
        splits = [f"--labelled.{split}={tmp_path / split}{suffix}.jsonl" for split in ("train", "validation")]
        run(tmp_path / task, f"--task={task}", f"--model.init_from={tmp_path / folder}", *splits, *more, *own)
        told = json.loads((tmp_path / task / "export" / "zerobert.json").read_text())["round_trip"]
        assert max(told["differences"].values()) < told["bound"]
        assert method == "prefix" or told["judge"].startswith(judge)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["--labelled.max_length=14"],
            "labelled.max_length: 14 is not allowed; BERT has 16 positions and adapter.virtual_tokens take 3 of them: "
            "give at most 13",
        ),
        (
            ["--adapter.virtual_tokens=16"],
            "adapter.virtual_tokens: 16 is not allowed; BERT has 16 positions, and each sequence needs some of its "
            "own: give fewer",
        ),
        (["--adapter.virtual_tokens=0"], "adapter.virtual_tokens: 0 is not allowed; give a whole number above 0"),
        (
            ["--train.freeze=layers:0"],
            "train.freeze: 'layers:0' is not allowed; adapter.method prompt freezes the whole",
        ),
        (["--adapter.targets=query"], "adapter.targets: 'query' is not allowed; adapter.method prompt doesn't read it"),
    ],
)
def test_mistakes_are_one_line(data: Path, tmp_path: Path, given: list[str], told: str) -> None:
    printed = run(tmp_path / "run", *options(data, "prompt", *given), code=2)
    assert told.replace("BERT", str(data / "bert")) in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_modernbert_takes_a_prompt_and_no_prefix(data: Path, tmp_path: Path) -> None:
    sizes = {name: getattr(TINY, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.ModernBertConfig(
        **sizes, vocab_size=len(WORDS), intermediate_size=24, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    (tmp_path / "modernbert").mkdir()
    save_tokenizer(tmp_path / "modernbert")
    transformers.ModernBertModel(config).save_pretrained(tmp_path / "modernbert")
    given = f"--model.init_from={tmp_path / 'modernbert'}"
    printed = run(tmp_path / "prefix", *options(data, "prefix", given), code=2)
    assert "adapter.method: 'prefix' is not allowed; a model of type 'modernbert' has no place for keys" in printed
    run(tmp_path / "prompt", *options(data, "prompt", given))
    told = json.loads((tmp_path / "prompt" / "export" / "zerobert.json").read_text())["round_trip"]
    assert told["judge"] == "PeftModel over ModernBertForSequenceClassification"
    assert max(told["differences"].values()) < told["bound"]


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_take_no_vectors(tmp_path: Path, method: str) -> None:
    folder = worlds.inputs(tmp_path / "inputs")
    given = [f"--labelled.train={folder / 'train.jsonl'}", "--labelled.text=text", "--labelled.text_pair=positive"]
    given += [f"--model.init_from={folder / 'bert'}", "--labelled.max_length=8", f"--adapter.method={method}"]
    printed = run(tmp_path / "run", "--task=embeddings", *given, "--adapter.virtual_tokens=2", code=2)
    assert f"adapter.method: {method!r} is not allowed; task embeddings pools all states of a sequence" in printed
    assert "Traceback" not in printed
