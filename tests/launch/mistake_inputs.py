"""Files that the mistakes of `tests.launch.test_mistakes` refer to, good ones and bad ones."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import BertConfig

from engine.data.store.prepare import PrepareConfig, prepare
from engine.model.bert import BertForPreTraining
from engine.model.build import initialise
from engine.model.folder import export_huggingface, tokenizer_files


def rows(count: int, label: Callable[[int], str]) -> str:
    return "".join(
        json.dumps({"sentence": f"word number {i}", "label": label(i), "id": i}) + "\n" for i in range(count)
    )


def asked(question: str, answers: list[list[object]]) -> str:
    places = [{"text": text, "answer_start": start} for start, text in answers]
    return json.dumps({"question": question, "context": "in Rome", "answers": places}) + "\n"


def write_inputs(folder: Path) -> None:
    """Everything that the mistakes refer to."""
    prepare(PrepareConfig(source=["embedded"], output=str(folder / "store"), vocab_size=300, workers=0))
    shutil.copytree(folder / "store", folder / "truncated")
    shard = folder / "truncated" / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    prepare(PrepareConfig(source=["embedded"], output=str(folder / "other"), vocab_size=400, workers=0))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=400, max_position_embeddings=32, **sizes)
    model = BertForPreTraining(config)
    initialise(model, 1)
    config.architectures = ["BertForPreTraining"]
    export_huggingface(model.state_dict(), config, tokenizer_files(folder / "other" / "tokenizer"), folder / "model")
    for name in ("kobert", "bare", "words"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "kobert" / "tokenizer_config.json").write_text('{"tokenizer_class": "KoBertTokenizer"}')
    for path in [*(folder / "bare").glob("*.txt"), *(folder / "bare").glob("tokenizer*")]:
        path.unlink()
    (folder / "words" / "tokenizer.json").unlink()
    shutil.copytree(folder / "store" / "tokenizer", folder / "edited")
    words = (folder / "edited" / "vocab.txt").read_text(encoding="utf-8")
    (folder / "edited" / "vocab.txt").write_text(words.replace("\na\n", "\n[DEID]\n"), encoding="utf-8")
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (folder / "empty").mkdir()
    (folder / "old").mkdir()
    (folder / "old" / "state.json").write_text('{"step": 5, "version": "0.0.9"}')
    texts = {
        "typo.yaml": "train: {step: 5}\n",
        "broken.yaml": "train: [1, {",
        "twice.yaml": "train: {steps: 5}\ntrain: {keep: 1}\n",
        "list.yaml": "- train\n",
        "section.yaml": "train:\nseed: 1\n",
        "documents.yaml": "seed: 1\n---\nseed: 2\n",
        "tabs.yaml": "train:\n\tsteps: 5\n",
        "deepspeed_typo.json": '{"train_batchsize": 64}',
        "deepspeed_sizes.json": '{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, '
        '"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}',
        "deepspeed_type.json": '{"zero_optimization": {"reduce_bucket_size": "5e8"}}',
        "train.jsonl": rows(40, lambda i: ("red", "blue")[i % 2]),
        "unseen.jsonl": rows(4, lambda i: "mauve"),
        "tags.jsonl": '{"tokens": ["in", "Rome"], "tags": ["O", "B-LOC"]}\n' * 20,
        "lengths.jsonl": '{"tokens": ["in", "Rome"], "tags": ["O"]}\n',
        "spans.jsonl": '{"text": "in Rome", "spans": [[3, 9, "LOC"]]}\n',
        "offset.jsonl": asked("where", [[1, "Rome"]]),
        "asked.jsonl": asked("where is it " + "a " * 4, [[3, "Rome"]]),
        "squad.json": json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "in Rome",
                                "qas": [
                                    {"id": "a", "question": "where", "answers": [{"text": "Rome", "answer_start": 9}]}
                                ],
                            }
                        ]
                    }
                ]
            }
        ),
        "onecolumn.conll": "in O\nRome\n",
        "schemes.conll": "in O\nRome U-LOC\n\nRome E-LOC\n",
        "unseen.conll": "the O\nEU B-ORG\n",
        "korean.jsonl": rows(40, lambda i: ("red", "blue")[i % 2]).replace("word number", "한국어").replace(" ", ""),
        "korean.txt": "안녕하세요 여러분. 오늘은 날씨가 좋습니다.\n\n" * 9,
        "oneclass.jsonl": rows(40, lambda i: "red"),
        "brokenrow.jsonl": rows(2, lambda i: "red") + '{"sentence": \n',
        "empty.txt": "",
        "quoted.csv": 'sentence,label\n"a\nb",red\n"the cat" sat,blue\n',
        "pointer.csv": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n",
        "pointer.csv.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n",
        "array.json": '[{"text": "a"}, {"text": "b"}]',
        "number.jsonl": '{"text": "a", "id": ' + "1" * 5000 + "}",
        "one.txt": "There is only this sentence.\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("utf16.csv", "utf16.txt"):
        (folder / name).write_text("sentence,label\nword,red\n", encoding="utf-16")
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-30])
