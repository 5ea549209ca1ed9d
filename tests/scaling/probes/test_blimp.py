"""Files of BLiMP's format, as users have them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.scaling.probes.blimp import read_pairs
from engine.scaling.probes.templates import Pair


def line(good: object, bad: object, **more: object) -> str:
    return json.dumps({"sentence_good": good, "sentence_bad": bad, **more}) + "\n"


def test_pairs_are_grouped_by_what_they_are_about(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    agreement = {"linguistics_term": "subject-verb agreement", "UID": "regular_plural_1", "pairID": 3}
    (folder / "a.jsonl").write_text(line("They go.", "They goes.", **agreement) + "\n" + line("I am.", "I is."))
    (folder / "more" / "b.jsonl").write_text(line("He goes.", "He go.", **agreement) + line("A.", "B.", UID="npi_1"))
    (folder / "notes.txt").write_text("not read")
    with gzip.open(tmp_path / "own pairs.jsonl.gz", "wt") as file:
        file.write(line("Yes \\ud83d.", "No."))
    assert read_pairs([folder, tmp_path / "own pairs.jsonl.gz"], 10, 0) == {
        "blimp_subject_verb_agreement": [Pair("They go.", "They goes."), Pair("He goes.", "He go.")],
        "blimp_a": [Pair("I am.", "I is.")],
        "blimp_npi_1": [Pair("A.", "B.")],
        "blimp_own_pairs": [Pair("Yes \\ud83d.", "No.")],
    }


def test_at_most_so_many_are_drawn_and_stay_in_order(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(line(f"Good {index}.", f"Bad {index}.") for index in range(50)))
    (some,) = read_pairs([path], 8, 1).values()
    numbers = [int(pair.good[5:-1]) for pair in some]
    assert len(numbers) == 8
    assert numbers == sorted(numbers) != list(range(8))
    assert read_pairs([path], 8, 1) == {"blimp_many": some}
    assert read_pairs([path], 8, 2) != {"blimp_many": some}


def test_pairs_of_equal_sentences_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(line("Same.", "Same.") + line("He goes.", "He go."))
    assert read_pairs([path], 10, 0) == {"blimp_own": [Pair("He goes.", "He go.")]}
    assert f"{path}: 1 pair(s) of two equal sentences are left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is empty; give JSON lines"),
        ("{", r"line 1: not JSON"),
        ("[1]\n", "is no object"),
        (json.dumps({"sentence_good": "a", "bad": "b"}), "line 1: no 'sentence_bad'; it has sentence_good, bad; give"),
        (line("a", "b") + line("a", None), "line 2: empty text in column 'sentence_bad'"),
        (line("a", 3), "line 1: column 'sentence_bad' holds 3, which is not text"),
        (line(" ", "b"), "empty text in column 'sentence_good'"),
        (line("same", "same"), "the sentences of each pair are the same; give pairs that differ"),
        (line("a", "b")[:-2] + ', "sentence_bad": "c"}', "2 columns are called 'sentence_bad'"),
    ],
)
def test_bad_files_are_refused_in_a_line(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=what) as error:
        read_pairs([path], 10, 0)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_paths_without_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    for path, what in (
        (tmp_path / "missing", "no such file or folder"),
        (tmp_path / "table.csv", "not a .jsonl file"),
        (tmp_path / "broken.jsonl.gz", "damaged"),
    ):
        with pytest.raises(UserError, match=what):
            read_pairs([path], 10, 0)
    (tmp_path / "broken.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"no \.jsonl file in it"):
        read_pairs([tmp_path], 10, 0)
