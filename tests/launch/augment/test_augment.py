"""`zerobert augment`: rows with copies, the same from any number of processes and after a kill; tags aligned."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.data.augment.wordnet import FOLDER
from engine.data.augment.words import Words
from engine.data.labelled.tagged.files import read_tagged
from engine.errors import UserError
from engine.predict.journal import Journal
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from launch.__main__ import dispatch
from launch.augment.examples import words_in
from launch.augment.options import AugmentConfig
from launch.augment.stream import augment_file
from tests.predict.models import read_jsonl, some_texts, write_model

INSTALLED = pytest.mark.skipif(not FOLDER.is_dir(), reason="WordNet isn't installed (Debian's wordnet-base)")
ROWS = [
    {"id": 1, "sentence": "The quick brown fox jumps over the lazy dog.", "label": "a"},
    {"id": 2, "sentence": "Nobody writes code in London while it rains", "label": "b"},
    {"id": 3, "sentence": "Ada writes naïve code about brown foxes", "label": "a"},
    {"id": 4, "sentence": "ok", "label": "a"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path: Path, **more: Any) -> AugmentConfig:
    given = {"method": "characters", "copies": 3, **more}
    rows = given.pop("rows", ROWS)
    return AugmentConfig(write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), **given)


def test_each_row_is_followed_by_different_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    assert dispatch(["augment", f"--input={config.input}", f"--output={config.output}", "--method=characters",
                     "--copies=3"]) == 0  # fmt: skip
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [(row["id"], row["augmented"]) for row in found] == [(i, c) for i in (1, 2, 3) for c in range(4)] + [(4, 0)]
    assert len({row["sentence"] for row in found}) == len(found)
    assert all(row["label"] == ROWS[row["id"] - 1]["label"] for row in found)
    told = capsys.readouterr().out
    assert told.startswith("9 new rows of 4 rows in ")
    assert "; 3 could not be made: all tries were refused or nothing new: " in told
    assert dispatch(["augment", f"--input={config.input}", f"--output={config.output}", "--method=characters",
                     "--copies=3"]) == 0  # fmt: skip
    assert "nothing to do" in capsys.readouterr().out


def test_processes_chunks_and_a_kill_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, rows=[{"sentence": text, "label": 0} for text in some_texts(40) if text.strip()])
    augment_file(config)
    whole = (tmp_path / "out.jsonl").read_bytes()
    cut = replace(config, output=str(tmp_path / "cut.jsonl"), chunk_rows=7)
    written = Journal.write
    calls = []

    def failing(self: Journal, content: bytes, rows: int, digest: str, truncated: int) -> None:
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        written(self, content, rows, digest, truncated)

    monkeypatch.setattr(Journal, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        augment_file(cut)
    monkeypatch.undo()
    summary = augment_file(cut)
    assert summary is not None
    assert summary.earlier == 14
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path: Path) -> None:
    config = settings(tmp_path, rows=[{"sentence": text, "label": 0} for text in some_texts(40) if text.strip()])
    augment_file(config)
    augment_file(replace(config, output=str(tmp_path / "two.jsonl"), processes=2, chunk_rows=5))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_another_seed_makes_other_rows_and_an_output_is_not_mixed(tmp_path: Path) -> None:
    config = settings(tmp_path, only_new=True)
    augment_file(config)
    first = read_jsonl(tmp_path / "out.jsonl")
    assert all(row["augmented"] for row in first)
    with pytest.raises(UserError, match="was made with seed 1, and 2 is given"):
        augment_file(replace(config, seed=2))
    augment_file(replace(config, seed=2), overwrite=True)
    assert read_jsonl(tmp_path / "out.jsonl") != first


def test_balance_makes_all_classes_as_frequent(tmp_path: Path) -> None:
    labels = ["a"] * 9 + ["b"] * 4 + ["c"] * 2
    rows = [{"text": f"quick brown foxes {number} jumping", "label": label} for number, label in enumerate(labels)]
    config = settings(tmp_path, rows=rows, copies=AugmentConfig.copies, balance=True)
    augment_file(config)
    found = read_jsonl(tmp_path / "out.jsonl")
    assert Counter(row["label"] for row in found) == {"a": 9, "b": 9, "c": 9}
    copies = Counter(row["text"].split()[3] for row in found if row["augmented"] and row["label"] == "b")
    assert sorted(copies.values()) == [1, 1, 1, 2]


def test_pairs_and_tables_keep_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('id,premise,claim,label\n7,"quick, brown",jumping foxes,yes\n')
    config = AugmentConfig(
        str(tmp_path / "in.csv"), str(tmp_path / "out.tsv"), method="characters", copies=1, text="premise",
        text_pair="claim",
    )  # fmt: skip
    augment_file(config)
    with (tmp_path / "out.tsv").open() as file:
        row, new = csv.DictReader(file, delimiter="\t")
    assert (row["premise"], row["claim"], row["augmented"]) == ("quick, brown", "jumping foxes", "0")
    assert new["premise"] != row["premise"]
    assert new["claim"] != row["claim"]
    assert (new["id"], new["label"], new["augmented"]) == ("7", "yes", "1")


def test_spans_of_raw_texts_move_with_their_words(tmp_path: Path) -> None:
    rows = [{"text": "While Ada Lovelace writes, London sleeps.", "spans": [[6, 18, "PER"], [27, 33, "LOC"]]}]
    config = settings(tmp_path, rows=rows, method="characters", task="token_classification", share=0.9)
    augment_file(config)
    for row in read_jsonl(tmp_path / "out.jsonl"):
        (first, last, kind), (start, stop, other) = row["spans"]
        assert (kind, other) == ("PER", "LOC")
        assert row["text"][first:last].count(" ") == 1
        assert row["text"][start:stop].startswith("L")
    assert len(read_tagged(str(tmp_path / "out.jsonl"), "sentence", "label")) == 4


def tagged(path: str) -> list[Words]:
    return list(words_in(read_tagged(path, "sentence", "label")))


def mentions(words: Words) -> list[tuple[tuple[str, ...], str]]:
    return [(words.words[first:stop], kind) for first, stop, kind in words.entities]


@pytest.mark.slow
@INSTALLED
def test_entities_of_a_real_file_stay_what_they_are(tmp_path: Path, shared_data: Path) -> None:
    given = str(shared_data / "wnut17" / "dev.jsonl.gz")
    config = AugmentConfig(given, str(tmp_path / "out.jsonl"), task="token_classification", copies=1)
    augment_file(replace(config, operations="replace,insert,swap,delete"))
    entities = [mentions(words) for words in tagged(config.output)]
    marks = [row["augmented"] for row in read_jsonl(tmp_path / "out.jsonl")]
    copies = [index for index, mark in enumerate(marks) if mark]
    assert len(copies) > 900
    assert all(entities[index] == entities[index - 1] for index in copies)
    augment_file(replace(config, operations="mention"), overwrite=True)
    assert set().union(*map(mentions, tagged(config.output))) <= set().union(*map(mentions, tagged(given)))


def test_words_of_a_model_are_those_of_their_place(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "MaskedLM", ("a", "b"))
    config = settings(tmp_path, method="mlm", model=str(model), copies=2, device="cpu")
    augment_file(config)
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert len(whole.splitlines()) > 10
    augment_file(replace(config, chunk_rows=1), overwrite=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_neighbours_need_no_wordnet(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "MaskedLM", ("a", "b"))
    config = settings(tmp_path, method="eda_neighbours", model=str(model), operations="swap,delete", copies=1)
    augment_file(config)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 7


def test_a_classifier_keeps_the_rows_of_their_class(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "SequenceClassification", ("a", "b"))
    rows = [{"sentence": text, "label": "ab"[index % 2]} for index, text in enumerate(some_texts(30)) if text.strip()]
    config = settings(tmp_path, rows=rows, keep_by=str(model), confidence=0.6, only_new=True)
    summary = augment_file(config)
    kept = read_jsonl(tmp_path / "out.jsonl")
    everything = augment_file(replace(config, keep_by=None, confidence=0.9, output=str(tmp_path / "all.jsonl")))
    assert summary is not None
    assert everything is not None
    assert 0 < len(kept) == summary.new < everything.new
    given = PredictConfig(str(model), "rows", "-", text="sentence", probabilities=True)
    for row, found in zip(kept, predict_rows(given, kept), strict=True):
        assert found["predicted_probabilities"][row["label"]] >= 0.6
    with pytest.raises(UserError, match=r"line 1: keep_by .* knows no class 'c', only a, b; give another"):
        augment_file(settings(tmp_path, rows=[{**ROWS[0], "label": "c"}], keep_by=str(model)), overwrite=True)


def test_pseudo_labels_are_the_sure_ones(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "SequenceClassification", ("a", "b"))
    texts = [text for text in some_texts(40) if text.split()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = AugmentConfig(
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        method="pseudo_labels",
        model=str(model),
        confidence=0.7,
    )
    summary = augment_file(config)
    assert summary is not None
    found = read_jsonl(tmp_path / "out.jsonl")
    given = PredictConfig(str(model), "rows", "-", text="text")
    expected = [row for row in predict_rows(given, texts) if row["predicted_confidence"] >= 0.7]
    assert 0 < len(expected) < len(texts)
    assert [(row["text"], row["label"]) for row in found] == [(r["text"], r["predicted_label"]) for r in expected]
    assert f"{len(found)} labels of {len(texts)} rows in " in summary.line("out")
    assert f"; {len(texts) - len(found)} rows are not sure enough: out" in summary.line("out")


MISTAKES = {
    "unknown method": (["--method=back"], "method: 'back' is not allowed"),
    "unknown task": (["--task=pretrain"], "task: 'pretrain' is not allowed"),
    "share above 1": (["--share=1.5"], "share: 1.5 is not allowed; give a share in (0, 1]"),
    "no share": (["--share=0"], "share: 0.0 is not allowed; give a share in (0, 1]"),
    "no copies": (["--copies=0"], "copies: 0 is not allowed; give at least 1"),
    "copies and balance": (["--copies=2", "--balance=true"], "copies: 2 is not allowed; balance decides"),
    "balance of numbers": (["--task=regression", "--balance=true"], "balance: True is not allowed; only sequence"),
    "unknown operation": (["--method=eda", "--operations=swap,turn"], "operations: 'swap,turn' is not allowed; method"),
    "device that isn't used": (["--device=cpu"], "device: 'cpu' is not allowed; method characters has no use for it"),
    "swaps of a model": (["--method=mlm", "--model=IN", "--operations=swap"], "method mlm has replace, insert"),
    "no masked words": (["--method=mlm", "--model=IN/classifier"], "names 'BertForSequenceClassification', which pred"),
    "labels that are there": (["--method=pseudo_labels", "--model=IN/classifier"], "has a column 'label', where"),
    "copies of pseudo labels": (
        ["--method=pseudo_labels", "--model=IN/classifier", "--copies=2"], "copies: 2 is not allowed; method pseudo"
    ),
    "pseudo numbers": (
        ["--method=pseudo_labels", "--model=IN/classifier", "--task=regression"], "method: 'pseudo_labels' is not"
    ),
    "confidence of nobody": (["--confidence=0.5"], "confidence: 0.5 is not allowed; method characters has no use"),
    "confidence above 1": (["--keep_by=IN/classifier", "--confidence=2"], "confidence: 2.0 is not allowed; give"),
    "tagger as a judge": (["--keep_by=IN/tagger"], "keep_by: 'IN/tagger' is no classifier of one class a text"),
    "judge of tags": (["--task=token_classification", "--keep_by=IN/tagger"], "keep_by: 'IN/tagger' is not allowed"),
    "one translator": (["--method=translate", "--forward=IN"], "back: None is not allowed; method translate reads two"),
    "translated tags": (
        ["--method=translate", "--forward=IN", "--back=IN", "--task=token_classification"],
        "method: 'translate' is not allowed; a translation has other words",
    ),
    "no translator": (["--method=translate", "--forward=IN", "--back=IN"], "forward: 'IN' has no config.json; give"),
    "classifier that translates": (
        ["--method=translate", "--forward=IN/classifier", "--back=IN"], "forward: transformers can't open 'IN/class"
    ),
    "share of a translation": (
        ["--method=translate", "--forward=IN", "--back=IN", "--share=0.2"], "share: 0.2 is not allowed; method trans"
    ),
    "no beams": (["--method=translate", "--forward=IN", "--back=IN", "--beams=0"], "beams: 0 is not allowed; give at"),
    "mentions of texts": (["--method=eda", "--operations=mention"], "operations: 'mention' is not allowed"),
    "no operations": (["--method=eda", "--operations=,"], "operations: ',' is not allowed"),
    "operations of characters": (["--operations=swap"], "operations: 'swap' is not allowed; method characters has no"),
    "no model": (["--method=eda_neighbours"], "model: None is not allowed; method eda_neighbours reads one; give it"),
    "model that isn't read": (["--model=IN"], "is not allowed; method characters has no use for it; leave it out"),
    "no column": (["--text=body"], "IN/in.jsonl, line 1: no column 'body'; it has id, sentence, label; set text to"),
    "no second column": (["--text_pair=body"], "no column 'body'; it has id, sentence, label; set text_pair to"),
    "one column twice": (["--text=sentence", "--text_pair=sentence"], "text_pair: 'sentence' is text already"),
    "the usual column twice": (["--text_pair=sentence"], "text_pair: 'sentence' is not allowed; it is text already"),
    "judge that is no model": (["--keep_by=IN/none"], "keep_by: "),
    "label that nobody reads": (["--label=class"], "label: 'class' is not allowed; method characters has no use for"),
    "seed of pseudo labels": (
        ["--method=pseudo_labels", "--model=IN/classifier", "--seed=2"], "seed: 2 is not allowed; method pseudo_labels"
    ),
    "no label": (["--label=class", "--balance=true"], "no column 'class'; it has id, sentence, label; set label to"),
    "no text": (["--text=id"], "IN/in.jsonl, line 1: column 'id' holds 1, which is not text; name a column of text"),
    "context": (["--task=question_answering", "--text=context"], "text: 'context' is not allowed; answers are places"),
    "pairs of tags": (["--task=token_classification", "--text_pair=x"], "text_pair: 'x' is not allowed; tags are of"),
    "table of tags": (["--task=token_classification", "--output=IN/x.csv"], "tagged words are lists; write .jsonl"),
    "unknown output": (["--output=IN/x.txt"], "output: 'IN/x.txt' has the unknown format '.txt'"),
    "output over the input": (["--output=IN/in.jsonl"], "output: 'IN/in.jsonl' is not allowed; it is the input"),
    "output of somebody": (["--output=IN/mine.jsonl"], "mine.jsonl' exists and mine.jsonl.progress.json doesn't"),
    "no input": (["--input=IN/none.jsonl"], "input: 'IN/none.jsonl' is no such file; check the path"),
    "pipe": (["--input=-"], "input: '-' is not allowed; a pipe can't be read twice; give a file"),
    "empty input": (["--input=IN/empty.jsonl"], "IN/empty.jsonl: no rows in it; give at least one"),
    "augmented twice": (["--input=IN/twice.jsonl"], "has a column 'augmented', so it is augmented; give the original"),
    "negative seed": (["--seed=-1"], "seed: -1 is not allowed; give a whole number in [0, 2^32)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "in.jsonl", ROWS)
    write(folder / "twice.jsonl", [{**ROWS[0], "augmented": 0}])
    write_model(folder / "classifier", "SequenceClassification", ("a", "b"))
    write_model(folder / "tagger", "TokenClassification", ("O", "B-a"))
    (folder / "empty.jsonl").write_text("\n")
    (folder / "mine.jsonl").write_text("mine\n")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, inputs: Path, tmp_path: Path) -> None:
    given, message = MISTAKES[name]
    arguments = [argument.replace("IN", str(inputs)) for argument in given]
    usual = {"--input": f"{inputs}/in.jsonl", "--output": f"{tmp_path}/out.jsonl", "--method": "characters"}
    arguments += [f"{option}={value}" for option, value in usual.items() if not any(option in a for a in arguments)]
    with pytest.raises(UserError) as caught:
        dispatch(["augment", *arguments])
    assert message.replace("IN", str(inputs)) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_text_is_named_and_earlier_ones_stay(tmp_path: Path) -> None:
    config = settings(tmp_path, rows=[*ROWS, {"id": 5, "sentence": " ", "label": "a"}], chunk_rows=2)
    with pytest.raises(UserError, match=r"in.jsonl, line 5: empty text in column 'sentence'"):
        augment_file(config)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 13


def test_without_wordnet_a_line_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.augment.wordnet.WordNet.__init__.__defaults__", (tmp_path / "nowhere",))
    with pytest.raises(UserError, match="apt-get install wordnet-base"):
        augment_file(settings(tmp_path, method="eda"))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_input_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    config = settings(tmp_path)
    augment_file(config)
    write(tmp_path / "in.jsonl", [{**ROWS[0], "id": 9}, *ROWS[1:]])
    with pytest.raises(UserError, match="has the new rows of 4 rows, which are not the first of"):
        augment_file(config)
