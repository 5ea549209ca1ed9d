"""`zerobert trim-vocabulary`: a model without the tokens that the user's texts don't have."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.text.corpus import CorpusConfig, list_sources, read_documents
from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from engine.compress.vocabulary import Counts
    from engine.data.tokenizer.vocabulary import Vocabulary

DESCRIPTION = """Take out of a model the tokens that your texts don't have, with their rows of the word embeddings.

  zerobert trim-vocabulary runs/sst2 --text reviews.txt --output small
  zerobert trim-vocabulary xlm-roberta-base --text corpus/ --least 3 --output xlm-roberta-fi
  zerobert trim-vocabulary runs/sst2 --text train.jsonl --text_field sentence --holdout dev.jsonl --output small

Texts whose pieces all stay are cut into the same pieces and get the same logits, which is checked. Special tokens and
single characters (bytes) stay, so other texts are cut into smaller pieces. Of WordPiece, BPE and SentencePiece."""

#: texts that are compared
COMPARED = 2000


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert trim-vocabulary", description=DESCRIPTION)
    add = parser.add_argument
    add("model", type=str, help="a run's folder, an exported one, or a Hugging Face folder of our architectures")
    add("--text", type=str, nargs="+", required=True, help="files or folders of text, as of zerobert prepare")
    add("--output", type=str, required=True, help="folder to write")
    add("--text_field", type=str, default="text", help="column of the text in JSON lines and parquet")
    add("--least", type=int, default=1, help="how often a token must stand in the texts")
    add("--size", type=int | None, default=None, help="tokens at most; the most frequent ones stay")
    add("--holdout", type=str, nargs="+", default=[], help="further texts, to tell what their tokens become")
    return parser


def main(arguments: list[str]) -> int:
    """Trim, write, and tell what became of the texts."""
    values = build_parser().parse_args(arguments)
    silence_libraries()
    for line in run(values):
        print(line, flush=True)
    return 0


def run(values: Namespace) -> list[str]:
    """Do what the options say; what was done, in words.

    Raises:
        UserError: what is wrong with them, the model or the texts.
    """
    check_output(values.output)
    if values.least < 1:
        raise UserError(f"least: {values.least} is not allowed; give a whole number above 0")
    from engine.compress import vocabulary as trim
    from engine.compress.folder import open_source
    from engine.data.tokenizer.wordpiece import load_tokenizer
    from engine.model.folder import saved_files

    source, output = open_source(values.model), Path(values.output)
    check_output(values.output, source.folder)
    before = load_tokenizer(source.folder)
    config = CorpusConfig(source=values.text, text_field=values.text_field)
    sources = list_sources(config)
    counts = trim.count(before, read_documents(config, sources))
    if not counts.texts:
        raise UserError(f"text: {', '.join(values.text)} holds no text; give some")
    kept = trim.kept_ids(before, counts, values.least, values.size)
    after, model = trim.trimmed(before, kept), source.load()
    smaller = trim.with_tokens(model, source.head, kept)
    told = [f"tokens: {source.config.vocab_size:,} -> {len(kept):,}"]
    sizes = [sum(each.numel() * each.element_size() for each in one.parameters()) for one in (model, smaller)]
    told.append(f"weights: {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB")
    gone = trim.most_frequent(before, counts, set(range(before.vocab_size)).difference(kept))
    if gone:
        told.append(f"note: the texts have tokens that go, such as {', '.join(gone)} (--least, --size)")
    told.append(_line("texts", before, counts, after, trim.count(after, read_documents(config, sources))))
    if values.holdout:
        other = CorpusConfig(source=values.holdout, text_field=values.text_field)
        held = list_sources(other)
        both = (trim.count(each, read_documents(other, held)) for each in (before, after))
        told.append(_line("holdout", before, next(both), after, next(both)))
    some = list(islice(read_documents(config, sources), COMPARED))
    alike, worst = trim.compare((before, model), (after, smaller), source.head, kept, some)
    told.append(f"same pieces: {alike} of {len(some)} texts; largest relative difference of a logit {worst:.1e}")
    compared = source.write(smaller, output, {"trimmed": {"tokens": len(kept)}}, saved_files(after))
    return [*told, f"wrote {output}", f"checked: {compared}"]


def _line(what: str, before: Vocabulary, old: Counts, after: Vocabulary, new: Counts) -> str:
    """Unknown tokens and pieces of texts, before and after."""
    unknown = f"[UNK] {old.unknown(before):.3%} -> {new.unknown(after):.3%}"
    return f"{what}: {old.texts:,}; {unknown}; pieces a text {old.per_text():.1f} -> {new.per_text():.1f}"
