"""`zerobert plan`: choices, refusals, and files that are read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from launch.forecast.command import main
from launch.forecast.hardware import GIB
from tests.conftest import ROOT

RECIPES = ROOT / "launch" / "recipes"
CLUSTER = ["--gpus=64", "--gpus-per-node=8", "--gpu-memory=80GiB"]
LARGE = ["--model=bert-large", "--sequence-length=512", "--global-batch=32768", *CLUSTER]


def plan(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    assert main([*options, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert-base", "large", "1.3b"])
@pytest.mark.parametrize(("gpus", "memory"), [(1, 24), (8, 80), (64, 80)])
def test_the_choice_fits_and_multiplies_out(
    capsys: pytest.CaptureFixture[str], model: str, gpus: int, memory: int
) -> None:
    found = plan(capsys, f"--model={model}", "--global-batch=4096", f"--gpus={gpus}", f"--gpu-memory={memory}GiB")
    choice, deepspeed = found["choice"], found["deepspeed"]
    assert choice["memory"]["total"] <= memory * GIB
    assert choice["micro_batch"] * choice["accumulation"] * gpus == 4096 == deepspeed["train_batch_size"]
    assert deepspeed["train_micro_batch_size_per_gpu"] == choice["micro_batch"]
    assert deepspeed["zero_optimization"]["stage"] == choice["stage"]
    assert "auto" not in json.dumps(deepspeed)


def test_no_cheaper_candidate_that_fits_was_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *LARGE)
    chosen = found["choice"]["cost"]["communication"]
    fitting = [row for row in found["candidates"] if row["fits"] and row["offload_optimizer"] == "none"]
    assert chosen <= 1.05 * min(row["cost"]["communication"] for row in fitting)


def test_a_micro_batch_of_twice_the_size_would_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from engine.config import ModelConfig
    from launch.forecast.memory import Workload, forecast, shape_of

    choice = plan(capsys, *LARGE)["choice"]
    assert choice["accumulation"] > 1
    work = Workload(
        shape_of(ModelConfig(size="large"), 30522), 512, choice["micro_batch"], choice["stage"], 64, 8, "bf16",
        activation_checkpointing=choice["activation_checkpointing"],
    )  # fmt: skip
    assert forecast(work).total <= 80 * GIB < forecast(replace(work, micro_batch=2 * work.micro_batch)).total


def test_little_memory_shards_recomputes_or_offloads(capsys: pytest.CaptureFixture[str]) -> None:
    """1.3B parameters take 16 bytes each: 20 GiB of states fit no 16 GiB."""
    found = plan(capsys, "--model=1.3b", "--gpus=1", "--gpu-memory=16GiB", "--sequence-length=512")
    assert found["choice"]["offload_optimizer"] == "cpu"
    assert not any(row["fits"] for row in found["candidates"] if row["offload_optimizer"] == "none")
    sharded = plan(capsys, "--model=1.3b", "--gpus=8", "--gpu-memory=16GiB", "--sequence-length=512")
    assert sharded["choice"]["offload_optimizer"] == "none"
    assert sharded["choice"]["stage"] >= 1


def test_what_fits_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=1.3b", "--gpus=1", "--gpu-memory=2GiB"]
    assert plan(capsys, *options, code=1)["choice"] is None
    assert main(options) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_a_recipe_gives_model_batch_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--config=launch/recipes/pretrain_large_phase1.yaml", *CLUSTER)
    request = found["request"]
    assert (request["model"]["size"], request["global_batch"], request["precision"]) == ("large", 256, "bf16")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[!l]*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned_as_it_is(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    from launch.configure.options import parse_options

    found = plan(capsys, f"--config={path}", *CLUSTER[:1], "--gpu=h100", "--host-memory=2TB", *BATCH.get(path.stem, []))
    config = parse_options([f"--config={path}"], complete=False).config
    request, own = found["request"], found["recipe"]
    length = config.data.sequence_length if config.task == "pretrain" else config.labelled.max_length
    assert (request["sequence_length"], request["precision"]) == (length, config.train.precision)
    assert request["optimizer"] == config.optim.name
    of_all_tokens = ("token_classification", "question_answering", "embeddings")
    read = {"pretrain": config.data.mask_probability} | dict.fromkeys(of_all_tokens, 1.0)
    assert request["read_share"] == read.get(config.task, 0.0)
    assert (own["stage"], own["fits"]) == (config.train.zero_stage, True)
    assert own["offload_optimizer"] == config.zero.offload_optimizer
    assert own["offload_parameters"] == config.zero.offload_parameters
    assert own["activation_checkpointing"] == config.model.activation_checkpointing
    assert request["checkpointing"] == ("on" if config.model.activation_checkpointing else "auto")
    assert request["steps"] == config.train.steps
    if config.train.steps is not None:
        assert own["days"] == pytest.approx(config.train.steps * own["cost"]["seconds"] / 86400)
    else:
        assert own["days"] is None
        assert any("give --steps" in note for note in request["notes"])
    assert found["deepspeed"]["gradient_clipping"] == config.optim.max_grad_norm


#: 64 GPUs don't share smaller batches
BATCH = {path.stem: ["--global-batch=64"] for path in RECIPES.glob("*finetune*.yaml")}


def recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return f"--config={folder / 'recipe.yaml'}"


def test_options_of_the_plan_win_over_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=bert-base", "--sequence-length=256", "--global-batch=512", "--precision=fp16", "--steps=1000"]
    options += ["--optimizer=lamb", "--activation-checkpointing=off", "--vocabulary=1000"]
    found = plan(capsys, f"--config={RECIPES}/pretrain_large_phase1.yaml", *options, *CLUSTER)
    request = found["request"]
    assert (request["model"]["size"], request["vocabulary"], request["sequence_length"]) == ("base", 1000, 256)
    assert (request["global_batch"], request["precision"], request["optimizer"]) == (512, "fp16", "lamb")
    assert (request["checkpointing"], request["steps"]) == ("off", 1000)
    assert not found["choice"]["activation_checkpointing"]
    assert found["deepspeed"]["fp16"]["enabled"]
    main([f"--config={RECIPES}/pretrain_large_phase1.yaml", *options, *CLUSTER])
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("launch/train.py"))
    for option in ("--optim.name lamb", "--train.precision fp16", "--train.global_batch 512", "--model.size base"):
        assert option in last


def test_the_printed_options_train_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """They are read by the training command, over the recipe, and mean what was planned."""
    from launch.configure.options import parse

    for options in (
        [f"--config={RECIPES}/pretrain_1.3b_one_gpu.yaml", *CLUSTER],
        [f"--config={RECIPES}/pretrain_base_phase2.yaml", "--model=large", "--sequence-length=1024", *CLUSTER],
        LARGE,
    ):
        choice = plan(capsys, *options)["choice"]
        main(options)
        printed = capsys.readouterr().out.splitlines()
        words = next(line for line in printed if line.startswith("launch/train.py")).split()[1:]
        config = parse(words)
        assert (config.train.zero_stage, config.train.micro_batch) == (choice["stage"], choice["micro_batch"])
        assert config.zero.offload_optimizer == choice["offload_optimizer"]
        assert config.zero.offload_parameters == choice["offload_parameters"]
        assert config.model.activation_checkpointing == choice["activation_checkpointing"]


def test_dimensions_and_vocabulary_come_from_the_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    numbers = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 999, "max_position_embeddings": 64, **numbers}))
    text = f"task: sequence_classification\nmodel: {{init_from: {tmp_path}}}\nlabelled: {{max_length: 64}}\n"
    request = plan(capsys, recipe(tmp_path, text), "--gpus=1", "--gpu=l4")["request"]
    assert (request["model"]["hidden_size"], request["model"]["layers"], request["vocabulary"]) == (48, 3, 999)
    assert (request["sequence_length"], request["precision"], request["steps"]) == (64, "fp32", 1000)
    assert request["notes"] == []
    with pytest.raises(UserError, match=r"65 is not allowed; it exceeds model.max_positions \(64\)"):
        main([recipe(tmp_path, text), "--gpus=1", "--sequence-length=65"])
    (tmp_path / "config.json").write_text("{}")
    request = plan(capsys, recipe(tmp_path, text), "--gpus=1", "--gpu=l4")["request"]
    assert request["model"]["size"] == "base"
    assert "planned as BERT-base; give --model for another" in request["notes"][0]


def test_the_vocabulary_is_that_of_the_recipes_store(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    text = f"data: {{path: {store}}}"
    assert plan(capsys, recipe(tmp_path, text), "--gpus=1")["request"]["vocabulary"] == 1000
    assert plan(capsys, recipe(tmp_path, text), "--gpus=1", "--vocabulary=77")["request"]["vocabulary"] == 77


def test_a_recipe_that_does_not_fit_or_cannot_be_trained_so_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "model: {size: 1.3b}\ntrain: {zero_stage: 0, precision: bf16, global_batch: 8, micro_batch: 8, steps: 100}"
    main([recipe(tmp_path, text), "--gpus=1", "--gpu-memory=16"])
    printed = capsys.readouterr().out
    assert "The recipe: ZeRO-0, micro-batch 8 x 1, without recomputation, doesn't fit: it needs" in printed
    assert "of 16.0 GiB." in printed
    main([recipe(tmp_path, text), "--gpus=1", "--gpu=t4", "--precision=fp16"])
    assert "note: the recipe can't be trained as it is: train.zero_stage" in capsys.readouterr().out
    main([recipe(tmp_path, text), "--gpus=2", "--gpu=h100"])
    assert "note: the recipe can't be trained as it is: train.global_batch: 8 is not" in capsys.readouterr().out


def test_a_recipe_that_leaves_its_micro_batch_open_gets_the_one_of_these_gpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "model: {size: large}\ntrain: {zero_stage: 2, precision: bf16, global_batch: 4096}"
    options = [recipe(tmp_path, text), "--gpus=8"]
    assert plan(capsys, *options, "--gpu-memory=80")["recipe"]["micro_batch"] == 128
    small = plan(capsys, *options, "--gpu-memory=12")["recipe"]
    assert small["fits"]
    assert small["micro_batch"] < 128
    assert plan(capsys, *options, "--gpu-memory=80", "--sequence-length=512")["recipe"]["micro_batch"] == 32
    assert plan(capsys, recipe(tmp_path, f"{text[:-1]}, micro_batch: 8}}"), "--gpus=8")["recipe"]["micro_batch"] == 8


@pytest.mark.parametrize(("options", "count"), [("ending0,ending1,ending2,ending3,ending4", 5), ("endings", 4)])
def test_a_question_counts_as_its_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str, count: int
) -> None:
    text = "model: {size: base}\ntrain: {zero_stage: 2, global_batch: 4096, steps: 100}"
    given = ["--gpus=2", "--gpu-memory=80"]
    texts = plan(capsys, recipe(tmp_path, f"{text}\ntask: sequence_classification"), *given)
    asked = recipe(tmp_path, f"{text}\ntask: multiple_choice\nlabelled: {{options: '{options}'}}")
    questions = plan(capsys, asked, *given)
    limit = -(-16384 // (128 * count))
    assert limit / 2 < questions["recipe"]["micro_batch"] <= limit
    seconds = [each["recipe"]["cost"]["seconds"] for each in (questions, texts)]
    assert seconds[0] == pytest.approx(count * seconds[1], rel=0.2)
    assert any(note.startswith(f"a sample counts as {count} sequences") for note in questions["request"]["notes"])


@pytest.mark.parametrize("gpu", ["v100", "t4", "V100-16GB"])
def test_fp16_is_planned_where_the_gpu_lacks_bf16(capsys: pytest.CaptureFixture[str], gpu: str) -> None:
    found = plan(capsys, "--model=base", "--gpus=8", f"--gpu={gpu}")
    assert found["request"]["precision"] == "fp16"
    assert found["deepspeed"]["fp16"]["enabled"]
    assert found["choice"]["stage"] >= 1


def test_memory_in_words_never_contradicts_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """A little less than what the smallest choice needs: the sentence and the table show that it is less."""
    options = ["--model=base", "--gpus=1", "--gpu=a10", "--global-batch=1"]
    least = min(row["memory"]["total"] for row in plan(capsys, *options)["candidates"])
    short = f"--gpu-memory={(least - (1 << 20)) / GIB:.6f}"
    assert main([*options, short]) == 1
    printed = capsys.readouterr().out
    needed, there = re.findall(r"needs ([\d.]+) GiB of ([\d.]+) GiB a GPU", printed)[0]
    assert float(needed) > float(there)
    header = re.findall(r"a10 with ([\d.]+) GiB", printed)[0]
    totals = [float(line.split()[-3]) for line in printed.splitlines() if line.endswith(" no")]
    assert len(totals) >= 7
    assert min(totals) > float(header)


def test_too_little_host_memory_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=1.3b", "--gpus=1", "--gpu-memory=16", "--host-memory=8"]
    assert main(options) == 1
    printed = capsys.readouterr().out
    assert re.search(r"needs [\d.]+ GiB of 8\.0 GiB of a node's host memory; take nodes with more memory", printed)


def test_days_are_steps_times_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *LARGE, "--steps=7038")
    assert found["choice"]["days"] == pytest.approx(7038 * found["choice"]["cost"]["seconds"] / 86400)
    found = plan(capsys, *LARGE)
    assert found["request"]["tokens"] == 256 * (900_000 * 128 + 100_000 * 512)


def test_table_picture_and_deepspeed_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, file = tmp_path / "plan.png", tmp_path / "ds.json"
    assert main([*LARGE, f"--plot={picture}", f"--output={file}"]) == 0
    printed = capsys.readouterr().out
    assert "ZeRO-3 + optimizer on CPU" in printed
    assert "Predicted, not measured" in printed
    assert "launch/train.py --train.zero_stage" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text()) == plan(capsys, *LARGE)["deepspeed"]


def test_the_plan_says_what_its_utilisation_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    cost = plan(capsys, *LARGE)["choice"]["cost"]
    main(LARGE)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"{cost['utilisation']:.0%} of 312 TFLOP/s (derived from the roofline: limited by {cost['limit']})" in printed
    )
    given = [*LARGE, "--utilisation=0.3"]
    assert plan(capsys, *given)["choice"]["cost"]["utilisation"] == pytest.approx(0.3)
    main(given)
    assert "Predicted, not measured: 30% of 312 TFLOP/s, memory" in capsys.readouterr().out


def test_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--model=tiny", "--global-batch=64", "--precision=fp32")
    assert found["hardware"]["memory"] > 0
    assert found["choice"]["micro_batch"] >= 1
    assert found["choice"]["cost"]["utilisation"] == pytest.approx(0.45)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model: not given; give --model bert-base or --config RECIPE"),
        (["--model=bert-huge"], "model: 'bert-huge' is unknown; choose one of tiny"),
        (["--model=base", "--gpus=0"], "gpus: 0 is not allowed; give a positive number"),
        (["--model=base", "--gpus=3", "--global-batch=256"], "global-batch: 256 is not a multiple of 3 GPUs; give 255"),
        (["--model=base", "--gpu=h900"], "gpu: 'h900' is unknown"),
        (["--model=base", "--gpu-memory=lots"], "gpu-memory: 'lots' is no amount of memory"),
        (["--model=base", "--precision=int8"], "precision: 'int8' is not allowed; choose one of bf16, fp16, fp32"),
        (["--model=base", "--optimizer=lion"], "optimizer: 'lion' is not allowed"),
        (["--model=base", "--attention=ring"], "attention: 'ring' is not allowed"),
        (["--model=base", "--activation-checkpointing=maybe"], "activation-checkpointing: 'maybe' is not allowed"),
        (["--model=base", "--sequence-length=-1"], "sequence-length: -1 is not allowed"),
        (
            ["--model=base", "--utilisation=1.5"],
            r"utilisation: 1.5 is not allowed; give a share of the peak in \(0, 1\]",
        ),
        (["--model=base", "--tokens=-1"], "tokens: -1.0 is not allowed"),
        (["--model=base", "--steps=0"], "steps: 0.0 is not allowed; give a positive number"),
        (["--model=base", "--steps=nan"], "steps: 'nan' is not allowed|steps: nan is not allowed"),
        (["--model=base", "--steps=5", "--tokens=9"], "tokens: 9.0 and steps 5.0 exclude each other"),
        (
            ["--model=base", "--gpus=8", "--gpu=v100", "--precision=bf16"],
            "precision: 'bf16' can't be had: v100 doesn't",
        ),
        ([f"--config={RECIPES}/pretrain_base_phase1.yaml", "--gpu=t4"], "train.precision: 'bf16' can't be had: t4"),
        (["--model=base", "--precision=fp16"], "precision: 'fp16' needs a GPU, and this machine has none"),
        (["--model=base", "--gpu-memory=40B"], "gpu-memory: '40B' is too little"),
        (["--model=base", "--host-memory=1e9", "--gpus=1"], "host-memory: '1e9' is no amount of memory"),
        (
            ["--model=base", "--gpus=1", "--host-memory=85899345920"],
            "host-memory: '85899345920' is more than any machine",
        ),
        (["--config=/nowhere.yaml", "--gpus=1"], "config: '/nowhere.yaml' can't be read"),
        (["--config=/tmp", "--gpus=1"], "config: '/tmp' is a folder; give a YAML file"),
        (["--gpus"], "gpus: its value is missing"),
        (["--model=base", "--gpus=8", "--output=/nowhere/ds.json"], "output: '/nowhere/ds.json' can't be written"),
        (["--model=base", "--gpus=8", "--plot=/tmp/plan.xyz"], "plot: '/tmp/plan.xyz' can't be written"),
        (["--model=base", "--gpus=many"], "gpus: 'many' is not allowed; give a whole number"),
    ],
)
def test_mistakes_name_the_option(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)
