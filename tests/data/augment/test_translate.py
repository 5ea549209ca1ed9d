"""Texts go through two sequence-to-sequence models of transformers; what comes back is one of the best translations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from engine.data.augment.draws import draws_for
from engine.data.augment.translate import BackTranslation, Translator
from engine.data.augment.words import split_text
from tests.predict.models import WORDS, some_texts

CPU = torch.device("cpu")


def write_marian(folder: Path, seed: int) -> Path:
    """A Marian model with random weights and a vocabulary of whole words."""
    names = ["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    config = transformers.MarianConfig(
        vocab_size=len(names), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=1, max_length=12, init_std=0.8,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.MarianMTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("marian")
    return write_marian(folder / "there", 1), write_marian(folder / "back", 2)


def test_a_new_text_is_one_of_the_best_translations_back(folders: tuple[Path, Path]) -> None:
    there, back = (Translator(str(folder), "x", 3, CPU) for folder in folders)
    texts = [text for text in some_texts(12) if text.split()][3:9]
    method = BackTranslation(there, back)
    examples = [split_text(text) for text in texts for _ in range(20)]
    new = [words.text for words in method(examples, draws_for(1, np.arange(len(examples))))]
    for place, text in enumerate(texts):
        possible = {second for first in there([text])[0] for second in back([first])[0]}
        found = set(new[20 * place : 20 * place + 20])
        assert found <= possible | {text}
        assert len(found) > 1
    model, tokenizer = (kind.from_pretrained(folders[0]) for kind in (
        transformers.AutoModelForSeq2SeqLM, transformers.AutoTokenizer
    ))  # fmt: skip
    made = model.generate(**tokenizer(texts[0], return_tensors="pt"), num_beams=3, do_sample=False)
    assert there(texts[:1])[0][0] == tokenizer.decode(made[0], skip_special_tokens=True)


def test_models_are_told_apart(folders: tuple[Path, Path]) -> None:
    there, back = (Translator(str(folder), "x", 1, CPU) for folder in folders)
    assert BackTranslation(there, back).fingerprint != BackTranslation(back, there).fingerprint
