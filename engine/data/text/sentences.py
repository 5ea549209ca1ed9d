"""Documents -> sentences, by `sentencex`.

Chosen because it is maintained (Wikimedia), knows the abbreviations of some 300 languages with fallbacks for the
others, needs neither a model nor a download, and splits about 100 MB/s per core, so that it costs little
beside the tokenizer. Learned splitters are slower by orders of magnitude; NSP segments join neighbouring
sentences again, so their gain would not be seen.
"""

from __future__ import annotations

import re
from typing import Literal

#: what a line of text is: one sentence; whole sentences, such as a paragraph; or what fits the width of a page
Lines = Literal["sentence", "paragraph", "wrapped"]

_BLANK_LINE = re.compile(r"\n\s*\n")


def split_sentences(document: str, language: str = "en", lines: Lines = "wrapped") -> list[str]:
    """The sentences of a document, stripped, without empty ones.

    A blank line always ends a sentence. Where lines are wrapped, a single line break is white space, except before
    a list item; so a line without a final stop, such as a heading, needs a blank line after it.

    Args:
        language: ISO 639-1 code, which selects the abbreviations; an unknown one falls back to English's.
        lines: with "sentence" each line is one, whatever stops it holds; with "paragraph" the end of a line ends a
            sentence; with "wrapped" it is white space.
    """
    from sentencex import segment

    if lines == "sentence":
        return [sentence for line in document.split("\n") if (sentence := line.strip())]
    text = document.replace("\r\n", "\n")
    paragraphs = text.replace("\n", "\n\n") if lines == "paragraph" else _BLANK_LINE.sub("\n\n", text)
    return [sentence for part in segment(language, paragraphs) if (sentence := part.strip())]
