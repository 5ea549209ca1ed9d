"""Augmentation: new examples a second of each method, and what labelled.augment adds to a batch.

    python -m benchmarks.augment --data train.jsonl --model ENCODER
    python -m benchmarks.augment --data train.jsonl --masked PRETRAINED --translator SEQ2SEQ --count 256

Times are processor time of this process, so that other programs on the core don't count. Of `--data`, which has a
column sentence, the first `--count` rows are read. A batch is made as a loader process makes it, without and with the
change of every second example.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.data.augment.build import WORD_SHARE, cheap_method
from engine.data.augment.draws import draws_for
from engine.data.augment.eda import OPERATIONS
from engine.data.augment.method import Method
from engine.data.augment.mlm import MaskedWords
from engine.data.augment.source import Augmentation, AugmentedSource
from engine.data.augment.translate import BackTranslation, Translator
from engine.data.augment.words import split_text
from engine.data.labelled.encoded import LabelledSource, encode
from engine.data.labelled.files import Examples, read_examples
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.hub import local_folder

CHEAP = ("eda", "eda_neighbours", "characters")
BATCH, LENGTH = 32, 128


def main() -> None:
    """Print a row for each method as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled rows with a column sentence")
    parser.add_argument("--model", help="folder of an encoder: measure the cheap methods")
    parser.add_argument("--masked", help="folder of a pre-trained model: measure mlm")
    parser.add_argument(
        "--translator", help="folder of a sequence-to-sequence model, taken both ways: measure translate"
    )
    parser.add_argument("--count", type=int, default=4096, help="rows")
    given = parser.parse_args()
    read = read_examples(given.data, "sentence", None, "label")
    examples = Examples(read.path, read.texts[: given.count], None, read.labels[: given.count], [])
    slow: dict[str, Callable[[], Method]] = {}
    if given.masked:
        slow["mlm"] = lambda: MaskedWords(given.masked, WORD_SHARE, ("replace", "insert"), 10, torch.device("cpu"))
    if given.translator:
        slow["translate"] = lambda: BackTranslation(*(Translator(given.translator, "", 4, torch.device("cpu")),) * 2)
    for name, build in slow.items():
        print(json.dumps({"method": name, "examples_per_s": round(rate(build(), examples.texts), 2)}), flush=True)
    for name in CHEAP if given.model else ():
        method = cheap_method(name, WORD_SHARE, given.model, OPERATIONS)
        row = {"method": name, "examples_per_s": round(rate(method, examples.texts))}
        print(json.dumps(row | on_the_fly(method, examples, given.model)), flush=True)


def rate(method: Method, texts: list[str], batch: int = 1024) -> float:
    """New examples a second of processor time."""

    def work() -> None:
        for start in range(0, len(texts), batch):
            part = [split_text(text) for text in texts[start : start + batch]]
            method(part, draws_for(1, np.arange(start, start + len(part))))

    return len(texts) / seconds(work)


def on_the_fly(method: Method, examples: Examples, model: str) -> dict[str, Any]:
    """Milliseconds of a batch without and with changed examples, once the method knows its words."""
    vocabulary = load_tokenizer(local_folder(model))
    source = LabelledSource(encode(vocabulary, examples.texts, None, LENGTH), np.zeros(len(examples)), 1)
    changing = AugmentedSource(source, examples, Augmentation(method, 0.5, 1), vocabulary, LENGTH)
    found = {}
    for name, each in (("plain", source), ("augmented", changing)):

        def work(each: LabelledSource = each) -> None:
            for start in range(0, len(examples) // BATCH * BATCH, BATCH):
                each.collate(each.describe(0, np.arange(start, start + BATCH)))

        work()
        found[f"{name}_ms_a_batch"] = round(1e3 * seconds(work) / (len(examples) // BATCH), 2)
    return found


def seconds(work: Callable[[], None]) -> float:
    """Processor time of a call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
