"""Byte-level BPE: train a vocabulary with BERT's special tokens and ModernBERT's splitter (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.data.tokenizer.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    bert_template,
    check_special_tokens,
    join_lines,
)
from engine.errors import UserError

BYTES = 256
MIN_FREQUENCY = 2


def train_bpe(
    documents: Iterable[str], out_dir: Path, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Vocabulary:
    """Learn a byte-level BPE vocabulary, and save it to `out_dir`; case and accents stay, and no text has [UNK].

    `documents` is read once. Ids: the five special tokens, `special_tokens`, the 256 bytes, then pieces in the order in
    which they were learned. Equal documents give an equal vocabulary. It is smaller than `vocab_size` when too few
    pieces occur twice in the text. [MASK] takes the space before it, as in ModernBERT: the piece of a word has one too.

    Raises:
        UserError: a size without room for the bytes, or a special token that no text could hold.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    check_special_tokens(special_tokens)
    special = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    if vocab_size < BYTES + len(special):
        raise UserError(
            f"vocab_size: {vocab_size} is too small for {BYTES} bytes and {len(special)} special tokens; give at least "
            f"{BYTES + len(special)}"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[AddedToken(token, lstrip=token == "[MASK]", normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(join_lines, documents), trainer)
    backend.post_processor = bert_template(backend.get_vocab())
    vocabulary = Vocabulary(backend)
    vocabulary.save(out_dir)
    return vocabulary
