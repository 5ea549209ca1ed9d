"""The arithmetic of `benchmarks.prepare`; nothing is timed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import prepare as benchmark
from benchmarks.prepare_peers import BLOCK, blocks, names, texts


def test_a_repetition_alters_some_words_and_keeps_their_letters() -> None:
    text = "All work and no play makes Jack a dull boy.\n" * 50
    found = benchmark.altered(text, "1:7")
    assert found == benchmark.altered(text, "1:7") != benchmark.altered(text, "2:7")
    changed = sum(old != new for old, new in zip(text.split(" "), found.split(" "), strict=True))
    assert 1 <= changed <= len(text.split(" ")) * benchmark.NEW_WORDS
    assert sorted(found) == sorted(text)


def test_a_corpus_has_the_size_asked_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One two three four five, six seven eight nine ten.\n\n" * 200)
    path = tmp_path / "corpus.jsonl"
    megabytes = benchmark.write_corpus([str(tmp_path / "text.txt")], 0.03, path)
    found = texts(path)
    assert 0.03 <= megabytes < 0.0301
    assert sum(map(len, found)) == round(megabytes * 1e6)
    assert len(set(found[:200])) == 1
    assert len(set(found[200:])) > 100


def test_a_batch_is_joined_and_cut_into_blocks() -> None:
    rows = [list(range(100)), list(range(100, 300))]
    found = blocks({"input_ids": rows, "attention_mask": [[1] * 100, [1] * 200]})
    assert found["input_ids"] == found["labels"] == [list(range(BLOCK)), list(range(BLOCK, 2 * BLOCK))]
    assert [len(row) for row in found["attention_mask"]] == [BLOCK, BLOCK]


def test_speeds_and_ratios_by_hand() -> None:
    runs = {
        benchmark.OURS: [benchmark.Run(seconds, 4.0, 3_000_000, "") for seconds in (2.0, 4.0, 2.0)],
        "peer": [benchmark.Run(seconds, 6.0, 1, "") for seconds in (3.0, 8.0, 5.0)],
    }
    table = benchmark.rivals(runs, 12.0)
    assert table[benchmark.OURS]["MB/s"] == 6.0
    assert table[benchmark.OURS]["MB/cpu_s"] == 3.0
    assert table[benchmark.OURS]["peak_MB"] == 3.0
    assert table["peer"]["ours is x"] == 2.0
    assert "ours is x" not in table[benchmark.OURS]


def test_a_program_is_watched_with_its_children() -> None:
    code = "x = bytearray(80_000_000); import time; time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}]); print('done')"
    done = benchmark.run([sys.executable, "-c", parent])
    assert done.printed == "done\n"
    assert done.peak_bytes > 80_000_000
    assert done.seconds > 0.5
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        benchmark.run([sys.executable, "-c", "1 / 0"])


@pytest.mark.parametrize(
    "wrong",
    [["--sizes", "10", "0"], ["--peer-size", "-1"], ["--text", "/nowhere"], ["--repeats", "0"], ["--sizes", "x"]],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        benchmark.parse(wrong)
    assert found.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_peers_are_those_of_the_installed_libraries() -> None:
    assert {"encode_batch", "datasets_1", "datasets_2"} <= set(names())


@pytest.mark.slow
def test_the_whole_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", "--json", "--quick"])
    benchmark.main()
    rows = json.loads(capsys.readouterr().out)
    assert set(rows[0]["rivals"]) == {benchmark.OURS, *names()}
    assert [point["x"] for point in rows[1]["points"]] == pytest.approx([1.0, 2.0], rel=0.2)
    assert all(values["tokens/s"] > 0 for name, values in rows[2]["rivals"].items() if "processes" in name)
