"""Back-translation: texts translated to another language and back by two models (Sennrich et al. 2016).

Beam search, so that nothing is drawn but which of the best translations is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.data.augment.draws import Draws
from engine.data.augment.words import Words, split_text
from engine.durable import sha256_of
from engine.errors import UserError, first_line

#: texts that are translated at once
TEXTS = {"cpu": 16, "cuda": 128}


class Translator:
    """A sequence-to-sequence model of a folder, such as one of Marian's."""

    def __init__(self, folder: str, option: str, beams: int, device: torch.device) -> None:
        """
        Args:
            option: that names the folder, for messages.
            beams: of the search, and how many translations of a text there are.

        Raises:
            UserError: no folder, or none that transformers opens as such a model.
        """
        import transformers

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise UserError(f"{option}: {folder!r} has no config.json; give the folder of a model that translates")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            remedy = "give the folder of a sequence-to-sequence model with its tokenizer"
            raise UserError(f"{option}: transformers can't open {folder!r} ({first_line(error)}); {remedy}") from error
        self._model.to(device).eval()
        self._beams, self._device = beams, device
        files = sorted(each for each in path.iterdir() if each.is_file())
        self.fingerprint = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The best translations of each text, the best first."""
        found: list[list[str]] = []
        size, beams = TEXTS[self._device.type], self._beams
        for start in range(0, len(texts), size):
            part = list(texts[start : start + size])
            inputs = self._tokenizer(part, return_tensors="pt", padding=True, truncation=True).to(self._device)
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                made = self._model.generate(**inputs, num_beams=beams, num_return_sequences=beams, do_sample=False)
            decoded = self._tokenizer.batch_decode(made, skip_special_tokens=True)
            found += [decoded[place : place + beams] for place in range(0, len(decoded), beams)]
        return found


class BackTranslation:
    """A text in the words that two translations leave of it; tags would be lost."""

    def __init__(self, forward: Translator, back: Translator) -> None:
        self._forward, self._back = forward, back
        self.fingerprint = hashlib.sha256((forward.fingerprint + back.fingerprint).encode()).hexdigest()

    def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
        """See `Method`; a text without a word left stays as it was."""
        foreign = _translated(self._forward, [words.text for words in examples], draws)
        back = _translated(self._back, foreign, draws)
        return [split_text(new) if new.strip() else words for words, new in zip(examples, back, strict=True)]


def _translated(translator: Translator, texts: Sequence[str], draws: Sequence[Draws]) -> list[str]:
    """One of the translations of each text; a text that is there several times is translated once."""
    different = list(dict.fromkeys(texts))
    found = dict(zip(different, translator(different), strict=True))
    return [own.one_of(found[text]) for text, own in zip(texts, draws, strict=True)]
