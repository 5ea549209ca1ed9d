"""Mistakes with adapters: one line that names field, value and remedy; a few of them given to the real command."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ModernBertConfig, ModernBertModel

from engine.config import AdapterConfig
from engine.errors import UserError
from engine.export import Wish, export_best, export_checkpoint
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.folder import open_adapted
from engine.predict.model import open_folder
from launch.configure.options import parse_options
from tests.model.adapters.adapted import fresh_head
from tests.model.test_task_heads import both
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import WORDS, save_tokenizer, tiny_bert
from tests.train.runs import NO_DROPOUT, ROOT, environment, run
from tests.warm import SERVER

LABELLED = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.jsonl"]
#: options, and what is said; of a configuration alone
CONFIGURED: dict[str, tuple[list[str], str]] = {
    "unknown method": (["--adapter.method=lore"], "adapter.method: 'lore' is not allowed; give one of none, lora"),
    "unknown target": (
        ["--adapter.method=lora", "--adapter.targets=querry"],
        "adapter.targets: 'querry' is not allowed; 'querry' is none of query, key",
    ),
    "empty target": (["--adapter.method=lora", "--adapter.targets=query,,key"], "'' is none of query, key"),
    "target that houlsby lacks": (
        ["--adapter.method=houlsby", "--adapter.targets=query"],
        "adapter.targets: 'query' is not allowed; houlsby has its bottlenecks behind attention-output and",
    ),
    "rank 0": (["--adapter.method=lora", "--adapter.rank=0"], "adapter.rank: 0 is not allowed; give a whole number"),
    "rank in words": (["--adapter.method=lora", "--adapter.rank=ten"], "adapter.rank: 'ten' is not allowed"),
    "alpha 0": (["--adapter.method=dora", "--adapter.alpha=0"], "adapter.alpha: 0.0 is not allowed; give a positive"),
    "alpha nan": (["--adapter.method=dora", "--adapter.alpha=nan"], "adapter.alpha: 'nan' is not allowed"),
    "dropout 1": (["--adapter.method=lora", "--adapter.dropout=1"], "adapter.dropout: 1.0 is not allowed"),
    "bottleneck 0": (["--adapter.method=houlsby", "--adapter.bottleneck=0"], "adapter.bottleneck: 0 is not allowed"),
    "option without a method": (
        ["--adapter.rank=4"],
        "adapter.rank: 4 is not allowed; adapter.method none doesn't read it, only lora, dora, adalora; leave it out",
    ),
    "option of another method": (
        ["--adapter.method=ia3", "--adapter.dropout=0.1"],
        "adapter.dropout: 0.1 is not allowed; adapter.method ia3 doesn't read it, only lora, dora, adalora, houlsby",
    ),
    "targets of biases": (["--adapter.method=bitfit", "--adapter.targets=query"], "bitfit doesn't read it"),
    "adapters in pre-training": (
        ["--task=pretrain", "--adapter.method=lora"],
        "adapter.method: 'lora' is not allowed; task pretrain trains all weights; leave it out",
    ),
    "freeze in pre-training": (
        ["--task=pretrain", "--train.freeze=embeddings"],
        "train.freeze: 'embeddings' is not allowed; task pretrain trains all weights; leave it out",
    ),
    "rule that is none": (["--train.freeze=foo"], "train.freeze: 'foo' is not allowed; give embeddings, layers"),
    "empty rule": (["--train.freeze="], "train.freeze: '' is not allowed; give embeddings"),
    "range backwards": (["--train.freeze=layers:5-2"], "'layers:5-2' is not allowed; layers:5-2 ends before it"),
    "range without an end": (["--train.freeze=layers:5-"], "train.freeze: 'layers:5-' is not allowed; give"),
    "ratio without A and B": (
        ["--adapter.method=ia3", "--optim.lora_ratio=4"],
        "optim.lora_ratio: 4.0 is not allowed; adapter.method ia3 has no factors A and B; leave it out",
    ),
    "ratio 0": (["--adapter.method=lora", "--optim.lora_ratio=0"], "optim.lora_ratio: 0.0 is not allowed; give a pos"),
    "layer decay 0": (["--optim.layer_decay=0"], "optim.layer_decay: 0.0 is not allowed; give a share in (0, 1]"),
    "layer decay above 1": (["--optim.layer_decay=1.1"], "optim.layer_decay: 1.1 is not allowed; give a share"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configuration_is_refused(name: str) -> None:
    options, message = CONFIGURED[name]
    start = [] if "--task=pretrain" in options else LABELLED
    with pytest.raises(UserError) as caught:
        parse_options([*start, "--output=run", *options])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


#: architecture, options of the adapter, train.freeze, and what is said when the model is there
APPLIED: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "part of a matrix": (
        "modernbert",
        {"method": "lora", "targets": "query"},
        None,
        "adapter.targets: 'query' is not allowed; a model of type 'modernbert' has query, key, value in one matrix; "
        "give attention-input",
    ),
    "layer beyond the model": (
        "bert", {}, "layers:9", "train.freeze: 'layers:9' is not allowed; the model has layers 0 to 2",
    ),
    "range beyond the model": (
        "bert", {"method": "lora"}, "layers:1-3", "'layers:1-3' is not allowed; the model has layers 0 to 2",
    ),
    "no layer left": (
        "bert", {"method": "lora"}, "layers",
        "train.freeze: 'layers' is not allowed; it leaves no layer to adapt",
    ),
    "nothing left for houlsby": (
        "bert", {"method": "houlsby"}, "encoder", "train.freeze: 'encoder' is not allowed; it leaves no layer to adapt",
    ),
    "no biases": (
        "modernbert", {"method": "bitfit"}, None,
        "adapter.method: 'bitfit' is not allowed; the model has no bias that it may train; choose another method",
    ),
    "no biases left": ("bert", {"method": "bitfit"}, "encoder", "the model has no bias that it may train"),
    "no pooler": (
        "modernbert", {}, "pooler",
        "train.freeze: 'pooler' is not allowed; the model has no pooler with weights from base; leave pooler out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APPLIED)
def test_a_model_that_does_not_fit_is_refused(name: str) -> None:
    architecture, options, freeze, message = APPLIED[name]
    _, model = both(architecture, "sequence_classification")
    with pytest.raises(UserError) as caught:
        Adaptation(AdapterConfig(**options), freeze, 1, 10, "base").apply(model, fresh_head(model))
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of LoRA, bottlenecks and biases over a tiny BERT, a whole ModernBERT, and damaged copies."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bert").mkdir()
    tiny_bert(folder / "bert")
    write(folder / "train.jsonl", ROWS["sequence_classification"](40, 1))
    write(folder / "validation.jsonl", ROWS["sequence_classification"](20, 2))
    (folder / "validation.txt").write_text("good film\nbad film\n")
    for method in ("lora", "houlsby", "bitfit"):
        run(folder / method, *given(folder), f"--adapter.method={method}")
    torch.manual_seed(3)
    config = ModernBertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    (folder / "modernbert").mkdir()
    save_tokenizer(folder / "modernbert")
    ModernBertModel(config).save_pretrained(folder / "modernbert")
    shutil.copytree(folder / "bert", folder / "other")
    change_weights(folder / "other")
    return folder


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def given(folder: Path) -> list[str]:
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}", "--labelled.max_length=14",
        f"--labelled.train={folder / 'train.jsonl'}", f"--labelled.validation={folder / 'validation.jsonl'}",
        "--train.steps=2", "--train.micro_batch=16", "--train.save_interval=2", *NO_DROPOUT,
    ]  # fmt: skip


def predict(model: str) -> Callable[[Path], list[str]]:
    return lambda folder: [
        "predict", f"{folder}/{model}", f"--input={folder}/validation.txt", f"--output={folder}/predicted.jsonl"
    ]  # fmt: skip


def train(*options: str) -> Callable[[Path], list[str]]:
    return lambda folder: [
        "train", f"--output={folder}/new", *given(folder), *(option.replace("IN", str(folder)) for option in options)
    ]  # fmt: skip


def resume(*options: str) -> Callable[[Path], list[str]]:
    more = ("--output=IN/lora", "--resume=auto", "--adapter.method=lora", "--train.steps=4", *options)
    return lambda folder: ["train", *given(folder), *(option.replace("IN", str(folder)) for option in more)]


#: the command, and what is said; IN is the folder of the inputs
LAUNCHED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "start from adapters": (
        train("--model.init_from=IN/lora/export", "--adapter.method=lora"),
        "IN/lora/export: it holds adapters without the weights below them; give a whole model, as zerobert export",
    ),
    "layers that the model lacks": (train("--train.freeze=layers:9"), "the model has layers 0 to 0"),
    "resume over other weights": (resume("--model.init_from=IN/other"), "model.init_from: the base weights of this"),
    "resume over another architecture": (resume("--model.init_from=IN/modernbert"), "model.init_from: the "),
    "resume with another rank": (resume("--adapter.rank=4"), "adapter.rank: 4 differs from"),
    "resume with another method": (resume("--adapter.method=dora"), "adapter.method: 'dora' differs from"),
    "resume with other frozen layers": (resume("--train.freeze=embeddings"), "train.freeze: 'embeddings' differs from"),
    "merge what can't be": (
        lambda folder: ["export", f"{folder}/houlsby", f"--output={folder}/new", "--merge"],
        "merge: adapters of method houlsby can't be merged into the base, only those of lora, dora, adalora, ia3",
    ),
    "base of a whole model": (
        lambda folder: [*predict("bitfit")(folder), f"--base={folder}/bert"],
        "bitfit' is a whole model, which has no base; leave it out",
    ),
}


@pytest.fixture(scope="module")
def outcomes(inputs: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    script = str(ROOT / "launch" / "__main__.py")
    return {
        name: SERVER.run([script, *command(inputs)], [environment()], ROOT, timeout=120.0)
        for name, (command, _) in LAUNCHED.items()
    }


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_command_ends_with_one_line_and_code_2(
    name: str, outcomes: dict[str, subprocess.CompletedProcess[str]], inputs: Path
) -> None:
    done = outcomes[name]
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert LAUNCHED[name][1].replace("IN", str(inputs)) in lines[0]
    assert not (inputs / "new").exists()


Damage = Callable[[Path], Any]


def origin(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "zerobert.json"
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told))

    return edit


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED: dict[str, tuple[Damage, str]] = {
    "cut weights": (cut, "adapter_model.safetensors: it is not what was written there; copy the folder again"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is not what was written there"),
    "no origin": (lambda folder: (folder / "zerobert.json").unlink(), "its adapters are of no run of zerobert; merge"),
    "no adaptation": (origin(lambda told: told.pop("adaptation")), "its adapters are of no run of zerobert; merge"),
    "no base": (origin(lambda told: told["facts"].pop("base weights")), "zerobert.json: it is not what was written"),
    "unknown option": (
        origin(lambda told: told["adaptation"]["adapter"].update(colour=1)),
        "zerobert.json: it is not what was written there",
    ),
    "base that is gone": (
        origin(lambda told: told["adaptation"].update(base="/nowhere/bert")),
        "base: the weights that FOLDER was trained over are not in '/nowhere/bert'",
    ),
    "foreign": (
        lambda folder: [(folder / name).unlink() for name in ("zerobert.json", "config.json")],
        "its adapters are of no run of zerobert; merge them into their base (peft's merge_and_unload) and give that",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_of_adapters_is_refused(name: str, inputs: Path, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    folder = tmp_path / "adapters"
    shutil.copytree(inputs / "lora" / "export", folder)
    sound = open_folder(str(folder))
    damage(folder)
    with pytest.raises(UserError) as caught:
        open_folder(str(folder)).load(torch.device("cpu"), "fp32")
    assert message.replace("FOLDER", str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "base that is gone":
        assert "--base" in str(caught.value)
        open_adapted(folder, sound.config, sound.head, str(inputs / "bert"))
        with pytest.raises(UserError, match=r"has other weights \(sha256 .*--base"):
            open_adapted(folder, sound.config, sound.head, str(inputs / "other"))


def test_an_export_needs_its_base_and_says_so(inputs: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(inputs / "bert", tmp_path / "bert")
    options = [*given(inputs), "--adapter.method=lora", f"--model.init_from={tmp_path / 'bert'}"]
    run(runs, *options)
    (tmp_path / "bert").rename(tmp_path / "moved")
    checkpoint = runs / "checkpoints" / "step-000002"
    exports: list[Callable[[Wish], Any]] = [
        lambda wish: export_checkpoint(checkpoint, tmp_path / "new", wish),
        lambda wish: export_best(runs, tmp_path / "new", wish),
    ]
    for export in exports:
        for base, message in (
            (None, f"are not in '{tmp_path / 'bert'}'"),
            (str(inputs / "other"), "has other weights (sha256"),
            (str(inputs / "modernbert"), "has other weights (sha256"),
            (str(tmp_path), "it holds no weights"),
        ):
            with pytest.raises(UserError) as caught:
                export(Wish(base=base))
            assert message in str(caught.value)
            assert "--base" in str(caught.value)
            assert "\n" not in str(caught.value)
        for merge in (False, True):
            export(Wish(base=str(tmp_path / "moved"), merge=merge))
            assert (tmp_path / "new" / "zerobert.json").is_file()
    for what, wish in (("merge", Wish(merge=True)), ("base", Wish(base="x"))):
        with pytest.raises(UserError, match=f"{what}: .*leave it out"):
            export_best(inputs / "bitfit", tmp_path / "other", wish)
