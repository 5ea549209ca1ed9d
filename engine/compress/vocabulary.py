"""A vocabulary without the tokens that a user's texts don't have, and a model without their rows.

What is left cuts such texts into the same pieces. WordPiece takes the longest piece that fits, and Unigram the most
probable sequence of pieces: the pieces taken are still the longest, the sequence the most probable one, when others go.
BPE merges in the order of its list: a piece that stays keeps all merges that can make it, with the pieces they need.

Other texts are cut into smaller pieces, since single characters (bytes) stay, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.config import architecture_of
from engine.data.tokenizer.unknown import share
from engine.data.tokenizer.vocabulary import CONTINUES, Vocabulary
from engine.errors import UserError
from engine.model.roundtrip import Sample, own_logits, packed

#: documents that are encoded at a time
AT_ONCE = 1000
#: tokens by which a configuration knows the special ones
IDS = ("pad", "bos", "eos", "cls", "sep", "unk", "mask")
Both = tuple[Vocabulary, nn.Module]
#: texts whose logits are compared, and their tokens
COMPARED, LONGEST = 8, 64


@dataclass(frozen=True)
class Counts:
    """What a tokenizer makes of texts."""

    texts: int
    pieces: NDArray[np.int64]
    """by id, how often"""

    def unknown(self, vocabulary: Vocabulary) -> float:
        """The share of unknown tokens."""
        return share(int(self.pieces[vocabulary.unk_id]), int(self.pieces.sum()))

    def per_text(self) -> float:
        """Pieces of a text on average."""
        return float(self.pieces.sum()) / max(self.texts, 1)


def count(vocabulary: Vocabulary, texts: Iterable[str]) -> Counts:
    """How often each token stands in texts."""
    pieces, found, stream = np.zeros(vocabulary.vocab_size, dtype=np.int64), 0, iter(texts)
    while some := list(islice(stream, AT_ONCE)):
        found += len(some)
        for ids in vocabulary.encode_batch(some):
            pieces += np.bincount(ids, minlength=len(pieces))
    return Counts(found, pieces)


def kept_ids(vocabulary: Vocabulary, counts: Counts, least: int = 1, most: int | None = None) -> list[int]:
    """Ids of the tokens that stay, ascending: special ones, single characters, and what the texts have.

    Args:
        least: how often a token must stand there.
        most: tokens that there may be, of which the most frequent ones stay.

    Raises:
        UserError: a tokenizer of another kind, or fewer tokens than must stay.
    """
    kind = vocabulary.components["model"].get("type", "WordPiece")
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise UserError(f"model: its tokenizer is of type {kind!r}; only WordPiece, BPE and Unigram can be trimmed")
    needed = _always(vocabulary, kind)
    parents = _parents(vocabulary) if kind == "BPE" else {}
    if most is not None and most < len(needed):
        remedy = f"{len(needed)} special tokens and single characters stay in any case; give at least that"
        raise UserError(f"size: {most} is not allowed; {remedy}")
    for index in np.argsort(-counts.pieces, kind="stable").tolist():
        if counts.pieces[index] < max(least, 1):
            break
        more = _with_parents(index, parents) - needed
        if most is None or len(needed) + len(more) <= most:
            needed |= more
    return sorted(needed)


def _always(vocabulary: Vocabulary, kind: str) -> set[int]:
    """Tokens that stay whatever texts there are."""
    added = {*vocabulary.backend.get_added_tokens_decoder(), *map(vocabulary.id_of, vocabulary.names.values())}
    single = {
        index
        for index, token in enumerate(vocabulary.tokens)
        if len(token.removeprefix(CONTINUES) if kind == "WordPiece" else token) == 1
    }
    if kind == "Unigram":  # an unknown character costs so much more than the least probable piece
        scores = json.loads(vocabulary.backend.to_str())["model"]["vocab"]
        single.add(min(range(len(scores)), key=lambda index: scores[index][1]))
    return added | single


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Those of BPE, as either form of tokenizer.json has them."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _parents(vocabulary: Vocabulary) -> dict[int, set[int]]:
    """By token, those of which merges make it."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if token}
    found: dict[int, set[int]] = {}
    for first, second in _merges(json.loads(vocabulary.backend.to_str())["model"]):
        made = ids.get(first + second)
        if made is not None:
            found.setdefault(made, set()).update((ids[first], ids[second]))
    return found


def _with_parents(index: int, parents: dict[int, set[int]]) -> set[int]:
    found, open_ends = {index}, [index]
    while open_ends:
        new = parents.get(open_ends.pop(), set()) - found
        found |= new
        open_ends += new
    return found


def trimmed(vocabulary: Vocabulary, kept: Sequence[int]) -> Vocabulary:
    """The tokenizer with these tokens alone, numbered anew in the same order."""
    from tokenizers import Tokenizer

    new = {old: index for index, old in enumerate(kept)}
    state = json.loads(vocabulary.backend.to_str())
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    else:
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = new.get(model["unk_id"])
    if "merges" in model:
        known = model["vocab"]
        merges = [each for each in _merges(model) if each[0] + each[1] in known and set(each) <= known.keys()]
        model["merges"] = [list(each) for each in merges]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    state["post_processor"] = _renumbered(state["post_processor"], new)
    return Vocabulary(Tokenizer.from_str(json.dumps(state)), vocabulary.max_length, vocabulary.names)


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    """What puts special tokens around texts, with their new ids."""
    if processor is None:
        return None
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [_renumbered(each, new) for each in found["processors"]]
    if isinstance(found.get("special_tokens"), dict):
        tokens = found["special_tokens"].items()
        found["special_tokens"] = {
            name: {**each, "ids": [new[index] for index in each["ids"]]} for name, each in tokens
        }
    for role in ("sep", "cls"):
        if isinstance(found.get(role), list):
            found[role] = [found[role][0], new[found[role][1]]]
    return found


@torch.no_grad()
def with_tokens(model: nn.Module, head: str, kept: Sequence[int]) -> nn.Module:
    """A model of ours with the rows of these tokens of another, in its word embeddings and MLM's decoder.

    Raises:
        UserError: its positions are counted from the padding token's id, which would be another.
    """
    config: Any = deepcopy(model.config)
    architecture, new = architecture_of(config), {old: index for index, old in enumerate(kept)}
    before = config.pad_token_id
    config.vocab_size = len(kept)
    for name in IDS:
        index = getattr(config, f"{name}_token_id", None)
        if index is not None:
            setattr(config, f"{name}_token_id", new.get(index))
    if architecture.first_position(before) != architecture.first_position(config.pad_token_id):
        remedy = "its positions are counted from there; give a tokenizer whose first ids are special tokens"
        raise UserError(f"model: pad_token_id {before} would become {config.pad_token_id}, and {remedy}")
    smaller = architecture.build(head, config, False).eval()
    rows = torch.tensor(list(kept))
    old = dict(model.named_parameters())
    for name, parameter in smaller.named_parameters():
        parameter.copy_(old[name][rows] if name.endswith(architecture.growing) else old[name])
        parameter.requires_grad_(old[name].requires_grad)
    return smaller


def compare(
    whole: tuple[Vocabulary, nn.Module],
    small: tuple[Vocabulary, nn.Module],
    head: str,
    kept: Sequence[int],
    texts: Sequence[str],
) -> tuple[int, float]:
    """Texts whose pieces all stay must be cut alike, and their logits be the same.

    Returns:
        How many of the texts these are, and the largest difference of a logit of the first of them, over the largest.

    Raises:
        UserError: they are cut otherwise.
    """
    new, alike = {old: index for index, old in enumerate(kept)}, 0
    config: Any = whole[1].config
    longest = min(LONGEST, architecture_of(config).positions(config))
    samples: list[tuple[list[int], list[int]]] = []
    for text, before, after in zip(texts, whole[0].encode_batch(texts), small[0].encode_batch(texts), strict=True):
        if not before or any(index not in new for index in before):
            continue
        alike += 1
        if [new[index] for index in before] != after:
            raise UserError(
                f"model: without other tokens its tokenizer cuts {text[:60]!r} otherwise; it can't be trimmed"
            )
        if len(samples) < COMPARED:
            samples.append((before[:longest], after[:longest]))
    if not samples:
        return 0, 0.0
    both = [packed([Sample(tuple(pair[side]), (0,) * len(pair[side])) for pair in samples]) for side in (0, 1)]
    read = torch.arange(len(both[0]["input_ids"]))
    with torch.no_grad():
        logits = [own_logits(model, head, batch, read) for (_, model), batch in zip((whole, small), both, strict=True)]
    worst = 0.0
    for name, other in logits[1].items():
        mine = logits[0][name]
        mine = mine[..., list(kept)] if mine.shape[-1] != other.shape[-1] else mine
        worst = max(worst, float((mine - other).abs().max() / other.abs().max().clamp(min=1e-6)))
    return alike, worst


def most_frequent(vocabulary: Vocabulary, counts: Counts, lost: Iterable[int], number: int = 5) -> list[str]:
    """The most frequent of the tokens that go although the texts have them."""
    found = Counter({index: int(counts.pieces[index]) for index in lost if counts.pieces[index]})
    return [vocabulary.tokens[index] for index, _ in found.most_common(number)]
