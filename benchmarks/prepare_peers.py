"""The peers of `benchmarks.prepare`, each in a process of its own: `python -m benchmarks.prepare_peers NAME ...`.

Prints one JSON line: the seconds of the work itself, without imports, without reading the text and without opening
the tokenizer, which favours the peers.

- `encode_batch` and `encode_batch_fast`: `tokenizers` on documents that are in memory, a thousand a call, on threads of
  its own, one a core. Nothing is kept or written.
- `datasets_1` and `datasets_2`: what transformers' `run_mlm.py` does with text that isn't taken line by line: tokenize
  batches of documents with `Dataset.map`, then join each batch and cut it into blocks of 128. Both maps write Arrow
  files; the number is their `num_proc`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

DOCUMENTS = 1000
BLOCK = 128


def texts(corpus: Path) -> list[str]:
    """The documents of a JSON lines file."""
    with corpus.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def encode(method: str, corpus: Path, tokenizer: Path) -> Callable[[], object]:
    """The work of `Tokenizer.encode_batch` or a method like it."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    documents, call = texts(corpus), getattr(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), method)

    def work() -> None:
        for start in range(0, len(documents), DOCUMENTS):
            call(documents[start : start + DOCUMENTS])

    return work


def blocks(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """The rows of a batch joined and cut into blocks; a shorter last one is dropped."""
    joined = {name: list(chain.from_iterable(rows)) for name, rows in batch.items()}
    total = len(joined["input_ids"]) // BLOCK * BLOCK
    cut = {name: [ids[at : at + BLOCK] for at in range(0, total, BLOCK)] for name, ids in joined.items()}
    return {**cut, "labels": [list(ids) for ids in cut["input_ids"]]}


def map_twice(processes: int, corpus: Path, tokenizer: Path) -> Callable[[], object]:
    """The work of the two maps."""
    import datasets
    import transformers

    # `map` forks: with threads on, the children of a process that has used them are refused
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    words = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    text = datasets.Dataset.from_json(str(corpus), cache_dir=str(corpus.parent / f"cache-{os.getpid()}"))

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return words(batch["text"], return_special_tokens_mask=True)

    def work() -> None:
        options: dict[str, Any] = {"batched": True, "num_proc": processes if processes > 1 else None}
        options["load_from_cache_file"] = False
        text.map(tokenize, remove_columns=text.column_names, **options).map(blocks, **options)

    return work


PEERS: dict[str, Callable[[Path, Path], Callable[[], object]]] = {
    "encode_batch": lambda corpus, tokenizer: encode("encode_batch", corpus, tokenizer),
    "encode_batch_fast": lambda corpus, tokenizer: encode("encode_batch_fast", corpus, tokenizer),
    "datasets_1": lambda corpus, tokenizer: map_twice(1, corpus, tokenizer),
    "datasets_2": lambda corpus, tokenizer: map_twice(2, corpus, tokenizer),
}


def names() -> Iterator[str]:
    """The peers that the installed libraries have."""
    from tokenizers import Tokenizer

    return (name for name in PEERS if name != "encode_batch_fast" or hasattr(Tokenizer, name))


def main(name: str, corpus: str, tokenizer: str) -> None:
    work = PEERS[name](Path(corpus), Path(tokenizer))
    start = time.perf_counter()
    work()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
