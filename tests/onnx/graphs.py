"""Tiny models of every architecture and head, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from engine.config import architecture_of
from engine.export import source_of
from engine.model.sentence import SentenceConfig, sentence_files
from engine.onnx.folder import Source
from engine.predict.model import open_folder
from tests.predict.models import write_tokenizer

LABELS = ("bad", "fair", "good")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bert": (transformers.BertConfig, {"max_position_embeddings": 80}),
    "roberta": (transformers.RobertaConfig, {"max_position_embeddings": 81, "type_vocab_size": 1}),
    "modernbert": (transformers.ModernBertConfig, {"max_position_embeddings": 80, "local_attention": 8}),
}


def write_folder(folder: Path, kind: str, head: str, *, pooling: str = "mean") -> Path:
    """A folder as `save_pretrained` leaves it, of an architecture and head; its weights are wide."""
    write_tokenizer(folder)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    of_kind, more = CONFIGS[kind]
    if kind == "modernbert":
        more = {**more, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))}
    names = {} if head in ("question_answering", "embeddings") else {
        "id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)},
    }  # fmt: skip
    config = of_kind(
        vocab_size=len(words), initializer_range=0.3, pad_token_id=words.index("[PAD]"), **SIZES, **more, **names
    )
    architecture = architecture_of(config)
    torch.manual_seed(5)
    architecture.export_class(architecture.class_for(head))(config).save_pretrained(folder)
    if head == "embeddings":
        SentenceConfig(pooling, True, 60).put_into(config)  # type: ignore[arg-type]
        for name, content in sentence_files(config).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def source(folder: Path) -> Source:
    """A folder as the source of a graph."""
    return source_of(open_folder(str(folder)))
