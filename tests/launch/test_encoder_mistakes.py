"""Mistakes with ModernBERT, each given to the real command: one line that names the field or file, exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import ModernBertConfig, ModernBertForMaskedLM

from engine.data.store.prepare import PrepareConfig, prepare
from tests.train.runs import ROOT, environment
from tests.warm import SERVER

Edit = Callable[[Path], None]
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
NO_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
COMMON = ["--data.workers=0", "--train.steps=1", "--data.objective=mlm", "--data.sequence_length=64"]
#: a model of the run's own dimensions
FRESH = ["--model.architecture=modernbert", "--model.hidden_size=32", "--model.heads=2", "--model.max_positions=64"]


def field(name: str, value: Any) -> Edit:
    """Change a field of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return edit


def rope(**values: Any) -> Edit:
    return field("rope_parameters", {"full_attention": {**PLAIN, **values}, "sliding_attention": PLAIN})


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def other_words(folder: Path) -> None:
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()


def every_layer_zero(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["layer_types"]
    path.write_text(json.dumps({**values, "global_attn_every_n_layers": 0}))


#: what is done to a sound folder that the run starts from, and what is said
FOLDERS: dict[str, tuple[Edit, str]] = {
    "T5": (field("model_type", "t5"), "its model_type is 't5'; give a model of type"),
    "decoder": (field("model_type", "modernbert-decoder"), "its model_type is 'modernbert-decoder'"),
    "unknown rope type": (rope(rope_type="spiral"), "give a model where it is of rope_type 'default'"),
    "stretched rope": (rope(rope_type="yarn", factor=2.0), "give a model where it is of rope_type 'default'"),
    "theta 0": (rope(rope_theta=0.0), "with a rope_theta above 0"),
    "negative theta": (rope(rope_theta=-5.0), "with a rope_theta above 0"),
    "theta in words": (rope(rope_theta="big"), "with a rope_theta above 0"),
    "rope that is a list": (field("rope_parameters", [1]), "field 'rope_parameters'"),
    "fewer types than layers": (
        field("layer_types", ["full_attention"]),
        "equal to the number of `layer_types`",
    ),
    "unknown attention": (field("layer_types", ["banana"] * 2), "correct that field"),
    "no layer is global": (every_layer_zero, "a field that must not be 0"),
    "window of one": (
        field("local_attention", 1),
        "local_attention 1 is not allowed; give a model",
    ),
    "window in words": (field("local_attention", "wide"), "field 'local_attention'"),
    "heads that don't divide": (field("num_attention_heads", 3), "num_attention_heads 3 is not supported"),
    "heads of odd width": (field("num_attention_heads", 32), "gives heads of even width"),
    "no heads": (field("num_attention_heads", 0), "num_attention_heads 0 is not allowed"),
    "width that the weights lack": (field("hidden_size", 64), "give weights that match their config.json"),
    "biases that the weights lack": (field("norm_bias", True), "its weights lack 5 parameters of the encoder"),
    "unknown activation": (field("hidden_activation", "mish"), "hidden_activation 'mish' is not supported"),
    "unknown pooling": (field("classifier_pooling", "max"), "field 'classifier_pooling'"),
    "negative epsilon": (field("norm_eps", -1.0), "norm_eps -1.0 is not allowed"),
    "epsilon that is no number": (field("norm_eps", float("nan")), "norm_eps nan is not allowed"),
    "negative deviation": (field("initializer_range", -1.0), "initializer_range -1.0 is not allowed"),
    "negative cut": (field("initializer_cutoff_factor", -2.0), "initializer_cutoff_factor -2.0 is not allowed"),
    "untied decoder": (field("tie_word_embeddings", False), "tie_word_embeddings False is not supported"),
    "few positions": (field("max_position_embeddings", 32), "data.sequence_length: 64 exceeds the 32 positions"),
    "another vocabulary": (field("vocab_size", 200), "has word embeddings of 200 tokens and a vocabulary of 300"),
    "another word list": (other_words, "was prepared with; prepare the data with --tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it holds no weights"),
    "cut weights": (cut_weights, "model.safetensors: cannot be read"),
    "broken config": (broken_config, "not valid JSON"),
}
#: options, and what is said; SOUND is a sound folder
OPTIONS: dict[str, tuple[list[str], str]] = {
    "heads that don't divide, fresh": ([*FRESH, "--model.heads=5"], "model.heads: 5 is not allowed"),
    "heads of odd width, fresh": (
        [*FRESH, "--model.hidden_size=30"],
        "model.heads: 2 is not allowed; model.hidden_size 30 / model.heads must be even",
    ),
    "size that it lacks": (
        ["--model.architecture=modernbert", "--model.size=1.3b"],
        "model.size: '1.3b' is not allowed; choose one of tiny, mini, small, medium, base, large",
    ),
    "unknown architecture": (["--model.architecture=modern_bert"], "model.architecture: 'modern_bert' is not allowed"),
    "pairs": ([*FRESH, "--data.objective=mlm_nsp"], "data.objective: 'mlm_nsp' needs a head that no modernbert has"),
    "pairs' option": ([*FRESH, "--data.short_sequence_probability=0.2"], "no effect while data.objective is mlm"),
    "length beyond the positions": (
        [*FRESH, "--data.sequence_length=65"],
        "data.sequence_length: 65 is not allowed; it exceeds model.max_positions (64); lower it or raise that",
    ),
    "architecture against the folder": (
        ["--model.init_from=SOUND", "--model.architecture=bert"],
        "model.architecture: 'bert' has no effect: model.init_from",
    ),
    "dimension against the folder": (["--model.init_from=SOUND", "--model.layers=7"], "model.layers: 7 has no effect"),
    "size against the folder": (["--model.init_from=SOUND", "--model.size=base"], "model.size: 'base' has no effect"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """Every command's end, two at a time."""
    base = tmp_path_factory.mktemp("encoders")
    store, sound = base / "store", base / "sound"
    prepare(PrepareConfig(source=["embedded"], output=str(store), vocab_size=300, workers=0))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertConfig(vocab_size=300, pad_token_id=0, max_position_embeddings=64, **sizes, **NO_TOKENS)
    ModernBertForMaskedLM(config).save_pretrained(sound)
    shutil.copytree(store / "tokenizer", sound, dirs_exist_ok=True)
    options = {name: [text.replace("SOUND", str(sound)) for text in given] for name, (given, _) in OPTIONS.items()}
    for name, (edit, _) in FOLDERS.items():
        folder = base / name.replace(" ", "-")
        shutil.copytree(sound, folder)
        edit(folder)
        options[name] = [f"--model.init_from={folder}"]

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        output, given = base / "output" / name.replace(" ", "-"), {o.partition("=")[0] for o in options[name]}
        common = [option for option in COMMON if option.partition("=")[0] not in given]
        own = list({option.partition("=")[0]: option for option in options[name]}.values())
        script = str(ROOT / "launch" / "train.py")
        command = [script, f"--output={output}", f"--data.path={store}", *common, *own]
        return SERVER.run(command, [environment()], ROOT), output

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(options, pool.map(run, options), strict=True))


@pytest.mark.parametrize("name", [*FOLDERS, *OPTIONS])
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(
    name: str, outcomes: dict[str, tuple[subprocess.CompletedProcess[str], Path]]
) -> None:
    done, output = outcomes[name]
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert {**FOLDERS, **OPTIONS}[name][1] in line
    assert not output.exists()
