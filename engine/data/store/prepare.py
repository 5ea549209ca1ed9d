"""Raw text -> token store: read, learn the vocabulary, split, tokenize in parallel, write shards.

The reader cuts the documents into blocks of text and hands them to an executor; a block becomes one shard per
split. Blocks depend on the text alone, so the store has the same bytes for every number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from engine.config import Objective
from engine.data.store.blocks import FIRST_DOCUMENTS, HELD_OUT_OF_FIRST, Document, Tokenization, read_blocks, run_blocks
from engine.data.store.executor import InlineExecutor
from engine.data.store.manifest import FORMAT_VERSION, Counts, Manifest, StoreShard, count, numbered
from engine.data.store.workspace import Workspace, find_complete, identity, remove
from engine.data.text.corpus import (
    CorpusConfig,
    Documents,
    Source,
    list_sources,
    read_documents,
    record_source,
    stored_bytes,
)
from engine.data.text.progress import LearningProgress, ReadingProgress
from engine.data.text.readers import Position
from engine.data.text.sentences import Lines, split_sentences
from engine.data.text.survey import describe_reading, describe_sources, resolved, with_lines
from engine.data.tokenizer.bpe import train_bpe
from engine.data.tokenizer.check import sample
from engine.data.tokenizer.given import Given, open_given
from engine.data.tokenizer.unknown import MAX_UNKNOWN_SHARE, check_unknown, count_unknown, share
from engine.data.tokenizer.wordpiece import MIN_VOCAB_SIZE, Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError

log = logging.getLogger(__name__)

VocabularyKind = Literal["wordpiece", "bpe"]
#: defaults of a learned vocabulary: its tokens, and the megabytes of text that it is learned from
VOCAB_SIZE, SAMPLE_MB = 30522, 200


@dataclass(kw_only=True)
class PrepareConfig(CorpusConfig):
    """Turn raw text into a token store for pre-training."""

    output: str
    """folder of the store"""
    tokenizer: str | None = None
    """vocab.txt, tokenizer.json or Hugging Face folder to use, or else the name of a model on the hub; null learns a
    vocabulary from the text"""
    vocabulary: VocabularyKind | None = None
    """kind of a learned vocabulary: wordpiece, BERT's, or bpe, ModernBERT's byte-level BPE, which keeps case and knows
    every text; null: wordpiece"""
    vocab_size: int | None = None
    """tokens of a learned vocabulary, special tokens included; null: 30,522"""
    lowercase: bool | None = None
    """lowercase the text and strip accents (learned wordpiece or bare vocab.txt); null: true"""
    special_tokens: list[str] = field(default_factory=list)
    """further special tokens: of a learned vocabulary, after [PAD] [UNK] [CLS] [SEP] [MASK]; of a given tokenizer,
    after its last token unless it has them"""
    sample_mb: int | None = None
    """megabytes of text, from the start of the corpus, that a vocabulary is learned from; null: 200"""
    max_unknown_share: float = MAX_UNKNOWN_SHARE
    """largest share of [UNK] among the word pieces; 1 takes any"""
    language: str = "en"
    """ISO 639-1 code for the sentence splitter"""
    validation_fraction: float = 0.01
    """share of documents held out for evaluation, at least two; 0 holds out none"""
    seed: int = 1
    """seed of the choice of held-out documents"""
    objective: Objective = "mlm_nsp"
    """data.objective of the runs that the store is for: mlm_nsp needs two documents a split, mlm one; the store is the
    same"""
    shard_mb: int = 8
    """megabytes of text per shard; a worker needs 200 MB of memory and some three times a shard's text"""
    source_names: bool = True
    """name the sources in the manifest; false numbers them (their hashes stay, and messages still name files)"""
    workers: int | None = None
    """worker processes; null takes one per core, 0 none; under mpirun the other ranks are the workers"""
    overwrite: bool = False
    """replace a store that was made with other settings"""

    def validate(self) -> None:
        """Check every field that needs no data.

        Raises:
            UserError: names the first field that is wrong.
        """
        fraction = self.validation_fraction
        _require(bool(self.output), "output", self.output, "give a folder")
        _require_choice("documents", self.documents, get_args(Documents))
        _require_choice("lines", self.lines, get_args(Lines))
        objectives = get_args(Objective)
        remedy = f"choose {' or '.join(objectives)}"
        _require(self.objective in objectives, "objective", self.objective, remedy)
        _require(0.0 <= fraction < 1.0, "validation_fraction", fraction, "give a share in [0, 1)")
        kind, kinds = self.vocabulary, get_args(VocabularyKind)
        _require(kind in (None, *kinds), "vocabulary", kind, f"choose {' or '.join(kinds)}")
        cased = "byte-level BPE keeps case: leave the option out, or take vocabulary wordpiece"
        _require(kind != "bpe" or not self.lowercase, "lowercase", self.lowercase, cased)
        size, megabytes, bound = self.vocab_size, self.sample_mb, self.max_unknown_share
        _require(size is None or size >= MIN_VOCAB_SIZE, "vocab_size", size, f"give at least {MIN_VOCAB_SIZE}")
        _require(megabytes is None or megabytes >= 1, "sample_mb", megabytes, "give at least 1")
        _require(0.0 <= bound <= 1.0, "max_unknown_share", bound, "give a share in [0, 1]")
        # an Arrow list counts its values in 31 bits
        _require(1 <= self.shard_mb <= 1000, "shard_mb", self.shard_mb, "give 1 to 1000")
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more")


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{name}: {value!r} is not allowed; {remedy}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in ("auto", *choices), name, value, f"choose auto, {', '.join(choices[:-1])} or {choices[-1]}")


def prepare(config: PrepareConfig, executor: Executor | None = None, workers: int = 1) -> Manifest:
    """Make the store of `config`, go on with an unfinished one, or return the one that is already there.

    Args:
        executor: tokenizes the blocks (`engine.data.store.executor.open_executor`); this process when None.
        workers: tasks that the executor runs at a time, which bounds the number of blocks in memory.

    Raises:
        UserError: a wrong field, unreadable text, too little text, an output folder with another store.
    """
    config.validate()
    listed = list_sources(config)
    given = open_given(config)
    named = [record_source(source, config) for source in listed]
    records = named if config.source_names else numbered(named)
    sources, rules = with_lines(listed, config, config.language)
    settings = {**_settings(config, given), **resolved(sources, config)}
    wanted = identity(settings, records)
    output = Path(config.output).absolute()
    if done := find_complete(output, wanted, config.overwrite):
        log.info("%s is already prepared: %s", output, summary(done))
        return done
    for line in describe_sources(sources, config) + rules:
        log.info("%s", line)
    try:
        with Workspace(output, wanted, config.overwrite) as work:
            if work.resumed:
                log.info("going on with what an earlier run left in %s", work.folder)
            vocabulary = _vocabulary(config, sources, work, given)
            splits = _tokenize(config, sources, work, vocabulary, executor or InlineExecutor(), workers)
            _check_unknown(splits, config)
            made = (vocabulary.fingerprint, vocabulary.vocab_size, _versions())
            manifest = Manifest(FORMAT_VERSION, splits, records, settings, *made)
            work.publish(manifest)
    except BrokenExecutor as error:
        raise UserError(
            "workers: a worker process died, perhaps out of memory; lower workers or shard_mb and run again"
        ) from error
    log.info("%s: %s", output, summary(manifest))
    return manifest


def summary(manifest: Manifest) -> str:
    """One line about a store."""
    parts = []
    for split in manifest.splits:
        counts = manifest.counts(split)
        parts.append(
            f"{split} {counts.documents:,} documents, {counts.sentences:,} sentences, {counts.tokens:,} tokens"
            f"{_unknown(counts)}"
        )
    return f"{'; '.join(parts)}; vocabulary {manifest.vocab_size:,}; fingerprint {manifest.fingerprint[:16]}"


def _unknown(counts: Counts) -> str:
    return "" if counts.unknown is None else f" ({share(counts.unknown, counts.tokens):.2%} [UNK])"


def _settings(config: PrepareConfig, given: Given | None) -> dict[str, Any]:
    """The options that decide the store's content; those of a learned vocabulary only where one is learned."""
    names = ["text_field", "split", "language", "validation_fraction", "seed", "shard_mb"]
    if not config.source_names:
        names.append("source_names")
    settings = {name: getattr(config, name) for name in names}
    if given is not None:
        return {"tokenizer": given.vocabulary.fingerprint, **settings}
    learned = {
        "vocab_size": config.vocab_size or VOCAB_SIZE,
        "lowercase": config.vocabulary != "bpe" and config.lowercase is not False,
        "special_tokens": config.special_tokens,
        "sample_mb": config.sample_mb or SAMPLE_MB,
    }
    if config.vocabulary == "bpe":
        learned["vocabulary"] = "bpe"
    return {"tokenizer": None, **settings, **learned}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("datasets", "pyarrow", "sentencex", "tokenizers")}


def _vocabulary(config: PrepareConfig, sources: list[Source], work: Workspace, given: Given | None) -> Vocabulary:
    if work.tokenizer.is_dir():
        return load_tokenizer(work.tokenizer)
    aside = work.folder / "tokenizer.tmp"
    remove(aside)
    sentences = _first_sentences(config, sources)
    if given is not None:
        given.compare(sentences)
        vocabulary = given.vocabulary
        vocabulary.save(aside)
    else:
        vocabulary = _learn(config, sources, aside)
    ids = np.fromiter(chain.from_iterable(vocabulary.encode_batch(sentences)), np.int64)
    unknown, pieces = count_unknown(vocabulary, ids)
    check_unknown(unknown, pieces, config.max_unknown_share, "the first documents", "max_unknown_share")
    aside.rename(work.tokenizer)
    return vocabulary


def _first_sentences(config: PrepareConfig, sources: list[Source]) -> list[str]:
    """Sentences on which a vocabulary is checked before the whole text is tokenized."""
    documents = sample(read_documents(config, sources))
    return [sentence for text in documents for sentence in split_sentences(text, config.language)]


def _learn(config: PrepareConfig, sources: list[Source], folder: Path) -> Vocabulary:
    size, lowercase = config.vocab_size or VOCAB_SIZE, config.lowercase is not False
    log.info("learning a vocabulary of %d pieces", size)
    with LearningProgress(passes=1 if config.vocabulary == "bpe" else 2) as progress:
        texts = TextSample(config, sources, config.sample_mb or SAMPLE_MB, progress)
        if config.vocabulary == "bpe":
            vocabulary = train_bpe(texts, folder, size, config.special_tokens)
        else:
            vocabulary = train_wordpiece(texts, folder, size, lowercase, config.special_tokens)
    if vocabulary.vocab_size < size:
        log.warning("the text has only %d pieces, not %d", vocabulary.vocab_size, size)
    return vocabulary


def _tokenize(
    config: PrepareConfig,
    sources: list[Source],
    work: Workspace,
    vocabulary: Vocabulary,
    executor: Executor,
    workers: int,
) -> dict[str, list[StoreShard]]:
    position = Position()
    progress = ReadingProgress(stored_bytes(sources))

    def documents() -> Iterator[Document]:
        for source in sources:
            for text in read_documents(config, [source], position):
                progress.update(position.bytes)
                yield Document(text, source.lines)

    blocks = read_blocks(documents(), config.shard_mb, config.validation_fraction, config.seed)
    how = Tokenization(work.folder, work.tokenizer, vocabulary.fingerprint, config.language)
    try:
        splits = run_blocks(blocks, work, how, executor, workers)
    finally:
        progress.close()
    for line in describe_reading(sources, position):
        log.info("%s", line)
    _check_enough(splits, config)
    return splits


def _check_unknown(splits: dict[str, list[StoreShard]], config: PrepareConfig) -> None:
    counts = count([shard for shards in splits.values() for shard in shards])
    if counts.unknown is not None:
        names = ", ".join(config.source)
        check_unknown(counts.unknown, counts.tokens, config.max_unknown_share, names, "max_unknown_share")


def _check_enough(splits: dict[str, list[StoreShard]], config: PrepareConfig) -> None:
    """Refuse too little text: NSP needs two documents, for random pairs, and one with two sentences, for true ones."""
    names = ", ".join(config.source)
    train, validation = count(splits["train"]), count(splits["validation"])
    documents = train.documents + validation.documents
    remedy = "give more text or check where documents end (documents, text_field)"
    least, held_out = (2, 4) if config.objective == "mlm_nsp" else (1, FIRST_DOCUMENTS - HELD_OUT_OF_FIRST + 1)
    if least == 2:
        remedy += "; or pass --objective mlm, which needs no pairs"
        if documents < 2:
            raise UserError(f"source: {names} has {documents} documents, next-sentence pairs need at least 2; {remedy}")
        if train.sentences + validation.sentences == documents:
            raise UserError(
                f"source: no document of {names} has two sentences, next-sentence pairs need them; {remedy}"
            )
    elif documents == 0:
        raise UserError(f"source: {names} holds no text; {remedy}")
    if config.validation_fraction and min(train.documents, validation.documents) < least:
        raise UserError(
            f"source: {names} has {documents} documents, a training and a held-out split need at least {held_out}; "
            "give more text or pass --validation_fraction 0"
        )


@dataclass(frozen=True)
class TextSample:
    """The first megabytes of a corpus, which a vocabulary is learned from; each iteration reads anew."""

    config: CorpusConfig
    sources: Sequence[Source]
    megabytes: int
    progress: LearningProgress

    def __iter__(self) -> Iterator[str]:
        limit, total = self.megabytes * 1_000_000, stored_bytes(self.sources)
        seen, position = 0, Position()
        self.progress.begin_pass()
        for text in read_documents(self.config, self.sources, position):
            yield text
            seen += len(text)
            self.progress.update(max(seen / limit, position.bytes / total if total else 0.0))
            if seen >= limit:
                break
        if not seen:
            named = ", ".join(self.config.source)
            raise UserError(f"source: {named} holds no text; give a file or folder of text")
        self.progress.end_pass()
