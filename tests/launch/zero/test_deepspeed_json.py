"""Users' DeepSpeed JSONs: resolved to the values that are meant, or refused in a line that names both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.data.loading.loader import resolve_layout
from engine.errors import UserError
from launch.configure.options import parse, parse_given
from launch.zero.keys import find
from launch.zero.run import complete, resolved
from launch.zero.user_json import load, option, with_ranks
from tests.conftest import ROOT
from tests.launch.zero.deepspeed_cases import BAD, GOOD, HF_ZERO_3


def resolve(folder: Path, text: str, options: list[str], ranks: int = 2) -> tuple[RunConfig, dict[str, Any]]:
    """What a command line with a file comes to on GPUs, as `train` does it."""
    file = folder / "ds.json"
    file.write_text(text)
    config, given = parse_given([f"--deepspeed_config={file}", *options])
    config = complete(config, given, ranks, "cuda")
    micro = None if config.train.micro_batch == "auto" else config.train.micro_batch
    layout = resolve_layout(config.train.global_batch, micro, ranks)
    return config, resolved(config, layout, "cuda").values


@pytest.mark.parametrize("name", GOOD)
def test_a_file_is_resolved(name: str, tmp_path: Path) -> None:
    content, options, expected = GOOD[name]
    config, values = resolve(tmp_path, json.dumps(content), options)
    parts = RunConfig.__dataclass_fields__
    for key, value in expected.items():
        part, _, field = key.partition(".")
        is_option = part in parts and hasattr(getattr(config, part), field)
        assert (option(config, key) if is_option else find(values, key)) == value, key
    assert "auto" not in json.dumps(values)
    ranks = 2
    micro, accumulation = values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]
    assert micro * accumulation * ranks == values["train_batch_size"] == config.train.global_batch


@pytest.mark.parametrize("name", BAD)
def test_a_file_is_refused_in_a_line_that_names_both_sides(name: str, tmp_path: Path) -> None:
    content, options, parts = BAD[name]
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, content if isinstance(content, str) else json.dumps(content), options)
    position = 0
    for part in parts:
        position = str(caught.value).find(part, position)
        assert position >= 0, f"{part!r} is not in {caught.value}"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json can't be read: No such file"):
        parse([f"--deepspeed_config={tmp_path / 'none.json'}"])


def test_fp16_of_a_file_is_refused_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": true}}')
    config, given = parse_given([f"--deepspeed_config={tmp_path / 'ds.json'}"])
    with pytest.raises(UserError, match=r"train\.precision: 'fp16' needs a GPU"):
        complete(config, given, 1, "cpu")


def test_a_value_of_the_recipe_counts_as_given(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "recipe.yaml").write_text(f"deepspeed_config: {tmp_path / 'ds.json'}\ntrain: {{zero_stage: 1}}\n")
    with pytest.raises(UserError, match=r"stage is 3, but train\.zero_stage is given as 1"):
        parse(["--config", str(tmp_path / "recipe.yaml")])


def test_a_run_can_be_repeated_from_the_recipe_that_it_saved(tmp_path: Path) -> None:
    """The saved options hold what was taken over from the file, which therefore contradicts nothing."""
    config, _ = resolve(tmp_path, json.dumps(HF_ZERO_3), ["--train.precision=bf16"])
    values = config.to_dict()
    values["optim"]["betas"] = list(values["optim"]["betas"])
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    again, given = parse_given(["--config", str(tmp_path / "config.yaml")])
    assert with_ranks(again, given, 2) == config


def test_debug_keeps_its_own_batch(tmp_path: Path) -> None:
    sizes = {"train_batch_size": 1024, "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 4}
    config, values = resolve(tmp_path, json.dumps(sizes), ["--debug"])
    assert config.train.global_batch == values["train_batch_size"] == 8


def test_old_names_and_keys_without_effect_are_told(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 2, "cpu_offload": True, "stage3_max_live_parameters": 5},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "tensorboard": {"enabled": True, "job_name": "mine"},
        "checkpoint": {"tag_validation": "Warn"},
    }
    config, _ = resolve(tmp_path, json.dumps(content), [])
    lines = "\n".join(load(str(config.deepspeed_config)).notes(config))
    for part in (
        "zero_optimization.cpu_offload is now zero_optimization.offload_optimizer",
        "warmup_type is missing; the warm-up is linear",
        "tensorboard.job_name has no effect",
        "checkpoint.tag_validation has no effect",
        "stage3_max_live_parameters has no meaning in this run",
    ):
        assert part in lines


def test_a_wrong_file_is_refused_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batchsize": 8}')
    code = (
        "import sys\nfrom launch.configure.options import parse\n"
        f"try:\n    parse(['--deepspeed_config={tmp_path / 'ds.json'}'])\n"
        "except ValueError as error:\n    print(error, {'torch', 'deepspeed'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "did you mean train_batch_size?" in done.stdout
    assert done.stdout.strip().endswith("set()")
