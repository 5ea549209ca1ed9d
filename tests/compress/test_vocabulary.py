"""Trimmed vocabularies cut the texts that they were trimmed for as the whole ones do; models compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.compress.folder import open_source
from engine.compress.vocabulary import Counts, compare, count, kept_ids, trimmed, with_tokens
from engine.config import ARCHITECTURES, architecture_of
from engine.data.tokenizer.bpe import train_bpe
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.data.tokenizer.wordpiece import load_tokenizer, train_wordpiece
from engine.errors import UserError
from engine.model.build import initialise
from launch.prune.vocabulary import build_parser, run
from tests.model.pruning.tiny import SIZES
from tests.predict.models import WORDS, write_model

TEXTS = [" ".join(WORDS[start : start + 6]) for start in range(0, len(WORDS), 3)]
OWN = [" ".join(WORDS[:7]), "the quick brown fox", "fox over the dog"]


def unigram(folder: Path) -> Vocabulary:
    """A tokenizer of XLM-RoBERTa's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def vocabulary_of(kind: str, folder: Path) -> Vocabulary:
    if kind == "WordPiece":
        return train_wordpiece(TEXTS * 3, folder, 160)
    return train_bpe(TEXTS * 3, folder, 360) if kind == "BPE" else unigram(folder)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_a_trimmed_vocabulary_cuts_its_texts_alike(kind: str, tmp_path: Path) -> None:
    whole = vocabulary_of(kind, tmp_path / "whole")
    kept = kept_ids(whole, count(whole, OWN))
    small = trimmed(whole, kept)
    assert len(kept) < whole.vocab_size
    assert small.tokens == [whole.tokens[index] for index in kept]
    assert small.names == whole.names
    new = {old: index for index, old in enumerate(kept)}
    for text in OWN:
        before, after = (each.backend.encode(text, add_special_tokens=True).ids for each in (whole, small))
        assert after == [new[index] for index in before]
    small.save(tmp_path / "small")
    assert load_tokenizer(tmp_path / "small").fingerprint == small.fingerprint
    others = " ".join(WORDS[7:])
    assert small.unk_id not in small.encode_batch([others])[0]
    assert len(small.encode_batch([others])[0]) >= len(whole.encode_batch([others])[0])


def test_frequency_and_size_bound_what_stays(tmp_path: Path) -> None:
    whole = vocabulary_of("WordPiece", tmp_path / "whole")
    counts = count(whole, OWN)
    everything, frequent = kept_ids(whole, counts), kept_ids(whole, counts, least=2)
    assert set(frequent) < set(everything)
    assert len(kept_ids(whole, counts, most=len(everything) - 2)) == len(everything) - 2
    with pytest.raises(UserError, match=r"^size: 3 is not allowed; \d+ special tokens"):
        kept_ids(whole, counts, most=3)
    assert Counts(0, counts.pieces * 0).per_text() == 0.0


def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="of type 'WordLevel'; only WordPiece, BPE and Unigram"):
        kept_ids(Vocabulary(words), Counts(1, torch.zeros(2).numpy().astype(int)))


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "pretraining"), ("roberta", "masked_lm"), ("modernbert", "masked_lm")]
)
def test_models_compute_the_same_with_fewer_tokens(kind: str, head: str, tmp_path: Path) -> None:
    whole = vocabulary_of("WordPiece", tmp_path / "whole")
    sizes = {**SIZES, "vocab_size": whole.vocab_size + 3, "pad_token_id": whole.pad_id, "max_position_embeddings": 40}
    own = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    config = ARCHITECTURES.get(kind).config_class()(**sizes, **(own if kind == "modernbert" else {}))
    model = architecture_of(config).build(head, config, False).eval()
    initialise(model, 1)
    kept = kept_ids(whole, count(whole, OWN))
    small = with_tokens(model, head, kept)
    assert small.config.vocab_size == len(kept)  # type: ignore[union-attr]
    texts = [*OWN, "lazy dog in London", " ".join(OWN * 20)]
    alike, worst = compare((whole, model), (trimmed(whole, kept), small), head, kept, texts)
    assert alike == len(OWN) + 1  # the last one is longer than what the model reads
    assert worst <= 1e-6


def test_the_command_writes_a_folder_and_tells(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "SequenceClassification", ("a", "b"))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in OWN))
    (tmp_path / "other.txt").write_text("writes code about cafes\n")
    given = [str(folder), f"--text={tmp_path}/own.jsonl", "--text_field=sentence", f"--output={tmp_path}/small"]
    lines = run(build_parser().parse_args([*given[:1], "--text", f"{tmp_path}/own.jsonl", *given[2:]]))
    assert "texts: 3; [UNK] 0.000% -> 0.000%" in " ".join(lines)
    assert "same pieces: 3 of 3 texts; largest relative difference of a logit 0.0e+00" in lines
    source = open_source(f"{tmp_path}/small")
    assert source.config.vocab_size == load_tokenizer(source.folder).vocab_size
    assert source.config.vocab_size < load_tokenizer(folder).vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--least=0"], "least: 0 is not allowed"),
        (["--size=2"], "size: 2 is not allowed"),
        (["--output=."], r"output: '\.' is not allowed"),
        (["--text_field=body"], "no field 'body'|body"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "SequenceClassification", ("a", "b"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"sentence": "a fox"}) + "\n")
    given = [str(folder), "--text", f"{tmp_path}/own.jsonl", "--text_field=sentence", f"--output={tmp_path}/small"]
    with pytest.raises(UserError, match=message):
        run(build_parser().parse_args([*given, *options]))
