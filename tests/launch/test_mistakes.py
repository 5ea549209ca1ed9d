"""Mistakes of a user, each given to the real command in a process of its own.

Each prints one line that names the field, the value and the remedy, exits with code 2 and leaves nothing behind.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.mistake_inputs import write_inputs
from tests.train.runs import ROOT, environment
from tests.train.runs import run as launch
from tests.warm import SERVER

#: from the folder of the inputs and of the output to the arguments after `zerobert`
Arguments = Callable[[Path, Path], list[str]]


def pretrain(*options: str) -> Arguments:
    return lambda inputs, output: [
        "train",
        f"--output={output}",
        f"--data.path={inputs / 'store'}",
        *fill(options, inputs),
    ]


def finetune(*options: str) -> Arguments:
    start = ["--task=sequence_classification", "--model.init_from=IN/model", "--labelled.train=IN/train.jsonl"]
    start.append("--labelled.max_length=16")
    return lambda inputs, output: ["train", f"--output={output}", *fill((*start, *options), inputs)]


def tagging(train: str, *options: str) -> Arguments:
    start = ["--task=token_classification", "--model.init_from=IN/model", f"--labelled.train=IN/{train}"]
    start.append("--labelled.max_length=16")
    return lambda inputs, output: ["train", f"--output={output}", *fill((*start, *options), inputs)]


def answering(train: str, *options: str) -> Arguments:
    start = ["--task=question_answering", "--model.init_from=IN/model", f"--labelled.train=IN/{train}"]
    start += ["--labelled.max_length=16", "--labelled.stride=4"]
    return lambda inputs, output: ["train", f"--output={output}", *fill((*start, *options), inputs)]


def preparing(source: str, *options: str) -> Arguments:
    return lambda inputs, output: [
        "prepare",
        f"--output={output}",
        *fill((f"--source={source}", "--workers=0", *options), inputs),
    ]


def fill(options: tuple[str, ...], inputs: Path) -> list[str]:
    return [option.replace("IN", str(inputs)) for option in options]


MISTAKES: dict[str, tuple[Arguments, str]] = {
    "missing recipe": (pretrain("--config=IN/none.yaml"), "config: "),
    "objective of a classifier": (
        finetune("--data.objective=mlm"),
        "data.objective: 'mlm' has no effect while task is sequence_classification; give --task pretrain",
    ),
    "recipe with a typo": (pretrain("--config=IN/typo.yaml"), "train.step: no such field; did you mean train.steps?"),
    "recipe that is not YAML": (pretrain("--config=IN/broken.yaml"), "config: the recipe is not YAML"),
    "recipe with a key twice": (
        pretrain("--config=IN/twice.yaml"),
        "train: given twice in IN/twice.yaml, in line 1 and line 2; join the two sections",
    ),
    "recipe that is a list": (pretrain("--config=IN/list.yaml"), "list.yaml holds a list, and no fields"),
    "recipe that is empty": (pretrain("--config=IN/empty.txt"), "empty.txt is empty; write fields such as"),
    "recipe that is a folder": (pretrain("--config=IN/empty"), "empty' is a folder; give a YAML file"),
    "recipe with an empty section": (pretrain("--config=IN/section.yaml"), "train: nothing stands under it; indent"),
    "recipe of two documents": (pretrain("--config=IN/documents.yaml"), "documents.yaml holds 2 documents"),
    "recipe with tabs": (pretrain("--config=IN/tabs.yaml"), "indent with spaces, not tabs"),
    "labelled data without the task": (pretrain("--labelled.train=IN/train.jsonl"), "labelled.train: "),
    "dimensions against the folder's": (finetune("--model.layers=7"), "model.layers: 7 has no effect: model.init_from"),
    "section as an option": (pretrain("--train={steps: 3}"), "train: it is a section; give its fields one by one"),
    "plan in a precision that the GPU lacks": (
        lambda *_: ["plan", "--model=base", "--gpus=8", "--gpu=v100", "--precision=bf16"],
        "precision: 'bf16' can't be had: v100 doesn't compute in it (compute capability 8.0 does); give",
    ),
    "plan with bytes for GiB": (
        lambda *_: ["plan", "--model=base", "--gpus=8", "--gpu-memory=85899345920"],
        "gpu-memory: '85899345920' is more than any machine has; a plain number means GiB",
    ),
    "unknown option": (pretrain("--optim.lr=1"), "optim.lr: no such field"),
    "number that is none": (pretrain("--train.steps=ten"), "train.steps: 'ten' is not allowed; give a whole number"),
    "steps and epochs": (pretrain("--train.steps=1", "--train.epochs=1"), "train.epochs: 1.0 is not allowed"),
    "fp16 on a CPU": (pretrain("--train.precision=fp16"), "train.precision: 'fp16' needs a GPU"),
    "DeepSpeed file with a typo": (
        pretrain("--deepspeed_config=IN/deepspeed_typo.json"),
        "train_batchsize is no key of DeepSpeed, which would ignore it; did you mean train_batch_size?",
    ),
    "DeepSpeed file against an option": (
        pretrain("--deepspeed_config=IN/deepspeed_sizes.json", "--train.zero_stage=2"),
        "zero_optimization.stage is 1, but train.zero_stage is given as 2; give one of them",
    ),
    "DeepSpeed file whose batch sizes don't multiply out": (
        pretrain("--deepspeed_config=IN/deepspeed_sizes.json"),
        "train_batch_size 64 is not micro-batch 8 x accumulation 2 x 1 rank(s) = 16",
    ),
    "DeepSpeed file with a wrong type": (
        pretrain("--deepspeed_config=IN/deepspeed_type.json"),
        "zero_optimization.reduce_bucket_size is '5e8'; give a whole number, without quotes",
    ),
    "offload to no folder": (
        pretrain("--train.zero_stage=3", "--zero.offload_optimizer=nvme", "--zero.nvme_path=/dev/null/swap"),
        "zero.nvme_path: /dev/null/swap can't be used (Not a directory); give a folder that this user can write to",
    ),
    "no store": (pretrain("--data.path=IN/nowhere"), "nowhere"),
    "folder that is no store": (pretrain("--data.path=IN/empty"), "empty"),
    "truncated shard": (pretrain("--data.path=IN/truncated"), "train-00000.arrow"),
    "sequence longer than the positions": (
        pretrain("--data.sequence_length=1024"),
        "data.sequence_length: 1024 is not allowed; it exceeds model.max_positions (512)",
    ),
    "global batch that doesn't divide": (
        pretrain("--train.global_batch=64", "--train.micro_batch=5"),
        "train.global_batch: 64 is not a multiple of train.micro_batch 5 x 1 rank(s); give 60 or 65",
    ),
    "warm-up longer than the run": (pretrain("--train.steps=5", "--optim.warmup=9"), "optim.warmup: 9 steps"),
    "model with another vocabulary": (pretrain("--model.init_from=IN/model"), "model.init_from: "),
    "model that is not there": (pretrain("--model.init_from=IN/nowhere"), "nowhere"),
    "model of another family": (pretrain("--model.init_from=IN/t5"), "its model_type is 't5'"),
    "resume from nothing": (pretrain("--resume=IN/empty"), "resume: "),
    "checkpoint of another format": (pretrain("--resume=IN/old"), "this version reads format 4; use the version that"),
    "missing labelled file": (finetune("--labelled.train=IN/none.csv"), "none.csv"),
    "labelled file of an unknown kind": (finetune("--labelled.train=IN/typo.yaml"), "typo.yaml"),
    "column that is not there": (finetune("--labelled.text=sentense"), "sentense"),
    "label unseen in training": (finetune("--labelled.test=IN/unseen.jsonl"), "mauve"),
    "one class only": (finetune("--labelled.train=IN/oneclass.jsonl"), "class"),
    "broken row": (finetune("--labelled.train=IN/brokenrow.jsonl"), "brokenrow.jsonl"),
    "examples longer than the positions": (finetune("--labelled.max_length=64"), "labelled.max_length: 64"),
    "unknown metric": (finetune("--labelled.metric=f1"), "labelled.metric: 'f1' is not allowed"),
    "weight of an unknown class": (
        finetune("--labelled.class_weights=green=2"),
        "labelled.class_weights: 'green=2' is not allowed; 'green' is not among the classes",
    ),
    "weights of a task without classes": (
        finetune("--task=regression", "--labelled.class_weights=balanced"),
        "labelled.class_weights: 'balanced' has no effect while task is regression; give --task seq",
    ),
    "smoothing in words": (
        finetune("--labelled.label_smoothing=some"),
        "labelled.label_smoothing: 'some' is not allowed",
    ),
    "words for numbers": (
        finetune("--task=regression"),
        "' is no finite number; correct it",
    ),
    "question without options": (
        finetune("--task=multiple_choice"),
        "train.jsonl, line 1: no column 'options'; it has",
    ),
    "embeddings without positives": (
        finetune("--task=embeddings"),
        "labelled.text_pair: None is not allowed; name the column of the positives",
    ),
    "temperature of 0": (
        finetune("--task=embeddings", "--labelled.text_pair=other", "--labelled.temperature=0"),
        "labelled.temperature: 0.0 is not allowed; give a number from 0.001 to 10",
    ),
    "temperature of a classifier": (
        finetune("--labelled.temperature=0.1"),
        "labelled.temperature: 0.1 has no effect while task is sequence_classification; give --task embeddings",
    ),
    "row with a quote": (finetune("--labelled.train=IN/quoted.csv"), "quoted.csv, line 4: ',' expected after"),
    "ids for labels": (finetune("--labelled.label=id"), "40 of 40 examples have a label of their own"),
    "one column twice": (finetune("--labelled.text_pair=sentence"), "labelled.text_pair: 'sentence' is labelled.text"),
    "pointer for labelled data": (finetune("--labelled.train=IN/pointer.csv"), "pointer.csv is a Git LFS pointer"),
    "labelled data in UTF-16": (finetune("--labelled.train=IN/utf16.csv"), "utf16.csv: UTF-16, not UTF-8"),
    "row of tags with one column": (
        tagging("onecolumn.conll"),
        "onecolumn.conll, line 2: 1 column, and the first row has",
    ),
    "tags of two schemes": (tagging("schemes.conll"), "schemes.conll, line 4: tag E-LOC is of another scheme"),
    "tag unseen in training": (
        tagging("tags.jsonl", "--labelled.test=IN/unseen.conll"),
        "unseen.conll, line 2: type 'ORG' of 'EU' is not among the training examples (LOC)",
    ),
    "span behind its text": (
        tagging("spans.jsonl"),
        "spans.jsonl, line 1: span [3, 9, 'LOC'] is not within the text of 7",
    ),
    "lists of two lengths": (tagging("lengths.jsonl"), "lengths.jsonl, line 1: 2 tokens and 1 tags"),
    "windows that share all": (
        tagging("tags.jsonl", "--labelled.stride=14"),
        "labelled.stride: 14 is not allowed; give 0 or more, and less than the 14 pieces of a window",
    ),
    "second text of tags": (
        tagging("tags.jsonl", "--labelled.text_pair=other"),
        "labelled.text_pair: 'other' has no effect while task is token_classification",
    ),
    "answer not at its offset": (
        answering("offset.jsonl"),
        "offset.jsonl, line 1: answer 'Rome' is not at 1, where the context has 'n Ro'; it stands at 3",
    ),
    "answer behind its context": (
        answering("squad.json"),
        "squad.json, data[0].paragraphs[0].qas[0]: answer 'Rome' at 9 is not within the context of 7 characters",
    ),
    "question longer than a window": (
        answering("asked.jsonl", "--labelled.max_length=8", "--labelled.validation=IN/asked.jsonl"),
        "asked.jsonl, line 1: the question has ",
    ),
    "answers of no length": (
        answering("asked.jsonl", "--labelled.max_answer_length=0"),
        "labelled.max_answer_length: 0 is not allowed; give at least 1",
    ),
    "label of answers": (
        answering("asked.jsonl", "--labelled.label=answers"),
        "labelled.label: 'answers' has no effect while task is question_answering",
    ),
    "metric of another task": (
        answering("asked.jsonl", "--labelled.metric=accuracy"),
        "labelled.metric: 'accuracy' is not allowed; choose one of f1, exact_match, loss",
    ),
    "pointer for a source": (preparing("IN/pointer.csv.txt"), "pointer.csv.txt is a Git LFS pointer"),
    "source in UTF-16": (preparing("IN/utf16.txt"), "utf16.txt: UTF-16, not UTF-8"),
    "array of JSON": (preparing("IN/array.json"), "array.json:1: a JSON list, not an object; write one object a line"),
    "number too long": (preparing("IN/number.jsonl"), "number.jsonl:1: not JSON (a number of too many digits)"),
    "unknown rule for documents": (preparing("embedded", "--documents=line"), "documents: 'line' is not allowed"),
    "unknown rule for lines": (preparing("embedded", "--lines=joined"), "lines: 'joined' is not allowed"),
    "tokenizer of another kind": (
        finetune("--model.init_from=IN/kobert"),
        "tokenizer_class 'KoBertTokenizer' in tokenizer_config.json is not supported",
    ),
    "start without a tokenizer": (pretrain("--model.init_from=IN/bare"), "bare' holds no tokenizer"),
    "start with another word list": (pretrain("--model.init_from=IN/words"), "prepare the data with --tokenizer"),
    "share of unknown pieces above 1": (
        finetune("--labelled.max_unknown_share=20"),
        "labelled.max_unknown_share: 20.0 is not allowed; give a share in [0, 1]",
    ),
    "text in another language": (
        finetune("--labelled.train=IN/korean.jsonl"),
        "labelled.max_unknown_share: 100.0% of the 36 word pieces of the training examples are [UNK]",
    ),
    "vocabulary size beside a tokenizer": (
        preparing("embedded", "--tokenizer=IN/store/tokenizer", "--vocab_size=500"),
        "vocab_size: 500 is not allowed; the tokenizer",
    ),
    "casing beside a tokenizer": (
        preparing("embedded", "--tokenizer=IN/store/tokenizer", "--lowercase=false"),
        "lowercase: False is not allowed; the tokenizer",
    ),
    "sample beside a tokenizer": (
        preparing("embedded", "--tokenizer=IN/store/tokenizer", "--sample_mb=5"),
        "sample_mb: 5 is not allowed beside tokenizer",
    ),
    "special token with a space": (
        preparing("embedded", "--tokenizer=IN/store/tokenizer", "--special_tokens", "two words"),
        "special_tokens: 'two words' is not allowed",
    ),
    "vocabulary size in words": (preparing("embedded", "--vocab_size=ten"), "vocab_size: 'ten' is not allowed"),
    "unknown kind of vocabulary": (
        preparing("embedded", "--vocabulary=unigram"),
        "vocabulary: 'unigram' is not allowed; give one of wordpiece, bpe or null",
    ),
    "kind of vocabulary beside a tokenizer": (
        preparing("embedded", "--tokenizer=IN/store/tokenizer", "--vocabulary=wordpiece"),
        "vocabulary: 'wordpiece' is not allowed beside tokenizer",
    ),
    "lowercase bytes": (
        preparing("embedded", "--vocabulary=bpe", "--lowercase=true"),
        "lowercase: True is not allowed; byte-level BPE keeps case",
    ),
    "no room for the bytes": (
        preparing("embedded", "--vocabulary=bpe", "--vocab_size=100"),
        "vocab_size: 100 is too small for 256 bytes",
    ),
    "casing in words": (preparing("embedded", "--lowercase=maybe"), "lowercase: 'maybe' is not allowed"),
    "negative share of unknown pieces": (
        preparing("embedded", "--max_unknown_share=-0.1"),
        "max_unknown_share: -0.1 is not allowed; give a share in [0, 1]",
    ),
    "corpus in another language": (
        preparing("IN/korean.txt", "--tokenizer=IN/store/tokenizer"),
        "max_unknown_share: 71.4% of the 63 word pieces of the first documents are [UNK]",
    ),
    "tokenizer with two word lists": (
        preparing("embedded", "--tokenizer=IN/edited"),
        "in vocab.txt and 'a' in tokenizer.json; remove the file that is out of date",
    ),
    "missing source": (preparing("IN/none.txt"), "none.txt"),
    "empty corpus": (preparing("IN/empty.txt"), "empty.txt holds no text"),
    "one-sentence corpus": (preparing("IN/one.txt"), "one.txt has 1 documents"),
    "line that is not JSON": (preparing("IN/brokenrow.jsonl", "--text_field=text"), "brokenrow.jsonl"),
    "field that is not there": (preparing("IN/train.jsonl", "--text_field=body"), "body"),
    "text that is not UTF-8": (preparing("IN/latin.txt"), "latin.txt"),
    "damaged compression": (preparing("IN/cut.jsonl.gz"), "cut.jsonl.gz"),
    "vocabulary too small": (preparing("embedded", "--vocab_size=10"), "vocab_size: 10"),
    "unknown prepare option": (
        preparing("embedded", "--vocabsize=10"),
        "vocabsize: no such field; did you mean vocab_size?",
    ),
    "run that is not there": (lambda inputs, _: ["curves", str(inputs / "nowhere")], "run: "),
    "export of nothing": (lambda inputs, output: ["export", str(inputs), f"--output={output}"], "run: "),
    "unknown command": (lambda *_: ["tarin"], "command: 'tarin' is unknown; did you mean train?"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """Every command's end, two at a time."""
    base = tmp_path_factory.mktemp("mistakes")
    write_inputs(base)

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        output = base / "output" / name.replace(" ", "-")
        command = [str(ROOT / "launch" / "__main__.py"), *MISTAKES[name][0](base, output)]
        return SERVER.run(command, [environment()], ROOT), output

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(run, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(
    name: str, outcomes: dict[str, tuple[subprocess.CompletedProcess[str], Path]]
) -> None:
    done, output = outcomes[name]
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert MISTAKES[name][1].replace("IN", str(output.parent.parent)) in lines[0]
    assert not output.exists()


@pytest.mark.parametrize("launcher", [None, pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_ranks_report_a_mistake_once(launcher: str | None, tmp_path: Path) -> None:
    """The launcher adds its own line about the exit code; ours appears once."""
    options = [f"--data.path={tmp_path}", "--train.micro_batch=5"]
    printed = launch(tmp_path / "out", *options, launcher=launcher, ranks=2, code=2)
    assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()
