"""The contrastive loss and its gradient: those of a padded implementation of its own, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertModel

from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.model.sentence import sentence_files
from engine.tasks.embeddings import contrast as contrasts
from engine.tasks.embeddings.contrast import Found, Places, contrast
from tests.tasks.embeddings.worlds import GLOBAL_BATCH, global_step, inputs, make_task, write
from tests.train.runs import execute

BOUND = 1e-5
#: a tiny BERT's first tokens are one vector but for a thousandth, so that their cosines are mostly rounding
BOUNDS = {"first token": 1e-4}
WAYS: dict[str, dict[str, Any]] = {
    "triples": {},
    "pairs": {"negatives": None},
    "both ways": {"symmetric": True, "temperature": 0.1},
    "first token": {"pooling": "cls"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("pairs"))


def padded_loss(folder: Path, model: BertModel, rows: list[dict[str, Any]], options: dict[str, Any]) -> Tensor:
    """The mean loss by transformers' class on padded texts, one text after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")

    def vectors(texts: list[str]) -> Tensor:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=14, return_tensors="pt")
        states, mask = model(**encoded).last_hidden_state, encoded["attention_mask"][:, :, None]
        first = options.get("pooling") == "cls"
        return functional.normalize(states[:, 0] if first else (states * mask).sum(1) / mask.sum(1))

    texts, positives = ([row[name] for row in rows] for name in ("text", "positive"))
    negatives = [] if "negatives" in options else [one for row in rows for one in row["negatives"]]
    both = [(texts, positives, positives + negatives)]
    both += [(positives, texts, texts)] if options.get("symmetric") else []
    losses = []
    for asking, right, candidates in both:
        cosines = vectors(asking) @ vectors(candidates).T / options.get("temperature", 0.05)
        for row, (one, other) in enumerate(zip(asking, right, strict=True)):
            kept = [i for i, each in enumerate(candidates) if i == row or each not in (one, other)]
            losses.append(cosines[row, kept].logsumexp(0) - cosines[row, row])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradient_are_those_of_padded_texts(folder: Path, way: str) -> None:
    options = WAYS[way]
    task = make_task(folder, **options)
    gradients, curves = global_step(task, task.build_model(), BatchLayout(GLOBAL_BATCH, GLOBAL_BATCH))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    chosen = task.train_source().describe(0, torch.arange(GLOBAL_BATCH).numpy())
    model = BertModel.from_pretrained(folder / "bert").eval()
    expected = padded_loss(folder, model, [rows[index] for index in chosen], options)
    expected.backward()
    assert curves["loss"] == pytest.approx(expected.item(), rel=BOUND)
    assert expected > 0.5
    peers = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert apart(gradients, peers) < BOUNDS.get(way, BOUND)
    assert not any(name.startswith("pooler") for name in gradients)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest of its parameter.

    A key's bias has none but rounding, since attention doesn't depend on it.
    """
    assert found.keys() == expected.keys()
    pairs = [(found[name], each) for name, each in expected.items() if not name.endswith("key.bias")]
    return max(float((own - each).abs().max() / each.abs().max()) for own, each in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_changes_neither_loss_nor_gradient(folder: Path, way: str) -> None:
    task = make_task(folder, **WAYS[way])
    whole, curves = global_step(task, task.build_model(), BatchLayout(GLOBAL_BATCH, GLOBAL_BATCH))
    parts, in_parts = global_step(task, task.build_model(), BatchLayout(GLOBAL_BATCH, 2))
    assert apart(parts, whole) < BOUNDS.get(way, BOUND)
    assert in_parts == pytest.approx(curves, rel=BOUND)


@pytest.mark.parametrize("way", ["triples", "both ways"])
def test_two_ranks_with_accumulation_have_the_gradient_of_one_process(folder: Path, way: str) -> None:
    task = make_task(folder, **WAYS[way])
    alone, curves = global_step(task, task.build_model(), BatchLayout(GLOBAL_BATCH, GLOBAL_BATCH))
    told = [str(folder), "2", json.dumps(WAYS[way])]
    done = execute("tests/tasks/embeddings/worlds.py", *told, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    worst = apart(load_file(folder / "gradients.safetensors"), alone)
    print(f"{way}: 2 ranks x accumulation 4, largest relative difference of a gradient {worst:.1e}")
    assert worst < BOUND
    assert json.loads((folder / "curves.json").read_text()) == pytest.approx(curves, rel=BOUND)


def test_vectors_are_computed_again_under_the_same_dropout(folder: Path) -> None:
    task = make_task(folder, dropout=0.3)
    model = task.build_model().train()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, given, output: seen.append(output.detach()))
    torch.manual_seed(5)
    global_step(task, model, BatchLayout(GLOBAL_BATCH, 4))
    after = torch.rand(3)
    first, second = seen[:4], seen[4:]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.manual_seed(5)
    for batch, expected in zip(
        training_batches(task.train_source(), BatchLayout(GLOBAL_BATCH, 4), Cursor(), workers=0), first, strict=False
    ):
        assert torch.equal(task._vectors(model, batch), expected), "the dropout of a step that doesn't look ahead"
    assert torch.equal(torch.rand(3), after), "a look ahead draws no number of later steps"


def test_a_text_and_its_copy_have_two_dropouts(folder: Path) -> None:
    task = make_task(folder, dropout=0.1, positives="dropout", negatives=None)
    batch = next(training_batches(task.train_source(), BatchLayout(4, 4), Cursor(), workers=0))
    vectors = task._vectors(task.build_model().train(), batch)
    assert batch.inputs["text"].view(4, 2).diff().abs().max() == 0
    assert (vectors[::2] - vectors[1::2]).abs().amax(1).min() > 1e-3


def random_places(texts: int, generator: torch.Generator) -> Places:
    counts = torch.randint(2, 5, (texts,), generator=generator)
    member = torch.cat([torch.arange(int(count)) for count in counts])
    text = torch.randint(0, 4 * texts, (len(member),), generator=generator)
    order = torch.randperm(len(member), generator=generator)
    return Places(torch.arange(len(member))[order], member[order], text[order])


@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_and_order_change_only_rounding(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    places = random_places(30, generator)
    vectors = torch.randn(len(places.text), 8, generator=generator)
    whole = contrast(vectors, places, 0.1, symmetric=symmetric)
    monkeypatch.setattr(contrasts, "COSINES", 4 * len(places.candidates))
    blocks = contrast(vectors, places, 0.1, symmetric=symmetric)
    other = torch.randperm(len(vectors), generator=generator)
    mixed = contrast(
        vectors[other],
        Places(places.sequence[other], places.member[other], places.text[other]),
        0.1,
        symmetric=symmetric,
    )
    back = other.argsort()
    moved = Found(mixed.gradient[back], mixed.loss[back], mixed.hits[back])
    for found, expected in ((blocks, whole), (moved, whole)):
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-7)
        assert torch.equal(found.hits, expected.hits)


def test_copies_of_an_example_are_each_others_positives_no_negatives() -> None:
    """As a global batch that spans two epochs may have them."""
    sequence, member = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 1])
    places = Places(sequence, member, torch.tensor([7, 8, 7, 8]))
    found = contrast(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), places, 0.05, symmetric=True)
    assert found.loss.abs().max() == 0.0
    assert found.gradient.abs().max() == 0.0
    assert found.hits.tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_that_of_sentence_transformers(folder: Path, tmp_path: Path, symmetric: bool) -> None:
    library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    losses = pytest.importorskip("sentence_transformers.losses", exc_type=ImportError)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts: set[str] = set()
    apart_from_others = []
    for row in rows:  # the library knows no duplicates
        if not texts & {row["text"], row["positive"]} and row["text"] != row["positive"]:
            apart_from_others.append(row)
            texts |= {row["text"], row["positive"]}
    path = write(tmp_path / "pairs.jsonl", apart_from_others[:GLOBAL_BATCH])
    task = make_task(folder, train=path, negatives=None, symmetric=symmetric)
    gradients, curves = global_step(task, task.build_model(), BatchLayout(GLOBAL_BATCH, 4))
    for name, content in sentence_files(task.model_config).items():
        (folder / "bert" / name).parent.mkdir(exist_ok=True)
        (folder / "bert" / name).write_bytes(content)
    model = library.SentenceTransformer(str(folder / "bert"), device="cpu").eval()
    (folder / "bert" / "modules.json").unlink()
    kind = losses.MultipleNegativesSymmetricRankingLoss if symmetric else losses.MultipleNegativesRankingLoss
    features = [
        model.tokenize([row[name] for row in apart_from_others[:GLOBAL_BATCH]]) for name in ("text", "positive")
    ]
    loss = kind(model, scale=20.0)(features, None)
    loss.backward()
    assert curves["loss"] == pytest.approx(float(loss), rel=BOUND)
    theirs = {name: p.grad for name, p in model[0].auto_model.named_parameters() if p.grad is not None}
    assert apart(gradients, theirs) < BOUND
