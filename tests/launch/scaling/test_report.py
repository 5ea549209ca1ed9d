"""`zerobert scaling report`: the page, its verdicts, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.errors import UserError
from launch.__main__ import dispatch
from launch.scaling.abilities import record_beside, recorded_abilities
from launch.scaling.blocks import Notes, Picture, Section, Table, as_html, as_markdown
from tests.launch.scaling.studies import write_points

FEW = ["--law", "size_and_data", "--resamples", "20"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a ladder's folder."""
    folder = tmp_path_factory.mktemp("ladder")
    write_points(folder, abilities=True)
    command = ["scaling", "report", str(folder), *FEW, "--compute", "1e20", "--output", str(folder / "report")]
    assert dispatch(command) == 0
    return folder / "report"


@pytest.mark.slow
def test_the_page_stands_alone_and_has_every_part(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href").replace('href="#', 'at="#'))
    parts = ["In short", "Law", "Advice", "Predictions of the largest runs", "Which law predicts"]
    parts += ["Abilities along compute", "Abilities along loss", "Ladder", "Where this comes from"]
    assert re.findall("<h2>(.*?)</h2>", page) == parts
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3 + 1 + 2 * 2  # law, predictions, and two metrics of `exact` along two axes
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture
        assert "#000000" not in picture
    assert "For 1e+20 FLOPs train N = " in page


@pytest.mark.slow
def test_the_text_says_what_the_page_says(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "exact: " in text
    assert "- warning: flat is not tested: ability: acc_flat is 0 in all points" in text
    assert "2 tests, corrected together" in text
    assert json.loads((report / "fit.json").read_text())["law"] == "size_and_data"
    assert "2026-11-29" in text


@pytest.mark.slow
def test_seeds_are_compared_with_residuals_and_checkpoints_with_tokens(tmp_path: Path) -> None:
    path = write_points(tmp_path)
    twins = [line.replace("run ", "twin ") for line in path.read_text().splitlines()[1:3]]
    lines = [re.sub(r",([23]\.\d+),", lambda loss: f",{float(loss[1]) * 1.01:.4f},", line, count=1) for line in twins]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    options = ["--hold-out-largest", "0", "--ability", "exact=acc_exact", "--items", "500", "--checkpoints", str(path)]
    assert dispatch(["scaling", "report", str(path), *FEW, *options, "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Abilities along tokens" in text
    assert re.search(r"## Seeds\n\nRuns of one size and budget.* 2 degrees of freedom", text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--ability", "x=acc_x"],
            "ability: x has no column 'acc_x' in the points; they have acc_exact, prob_exact, acc_flat",
        ),
        (["--ability", "x=acc_exact:prob_x"], "ability: x has no column 'prob_x'"),
        (["--ability", "x"], "ability: 'x' is not allowed; give NAME=ACCURACY_COLUMN"),
        (["--ability", "x=acc_exact:"], "ability: 'x=acc_exact:' is not allowed"),
        (["--ability", "x=acc_exact", "--items", "²"], "items: '²' is not allowed; give a number of questions"),
        (["--ability", "x=acc_exact", "x=acc_flat"], "ability: 'x=acc_flat' is not allowed; x is given twice"),
        (["--ability", "x=acc_exact", "--items", "y=5"], "items: 'y' is no ability"),
        (["--ability", "x=acc_exact", "--items", "many"], "items: 'many' is not allowed; give a number"),
        (["--items", "5"], "items: '5' is not allowed; name abilities by --ability"),
        (["--checkpoints", "IN"], "checkpoints: .* is not allowed; they are for abilities"),
        (["--ability", "x=acc_exact", "--checkpoints", "none.csv"], "points: none.csv cannot be read"),
        (["--output", "IN/report"], "output: .* can't be written"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path: Path, options: list[str], told: str) -> None:
    path = write_points(tmp_path)
    given = [word.replace("IN", str(path)) for word in options]
    output = [] if "--output" in options else ["--output", str(tmp_path / "report")]
    with pytest.raises(UserError, match=f"^{told}"):
        dispatch(["scaling", "report", str(path), *given, *output])
    assert not (tmp_path / "report").exists()


def test_a_folder_without_points_and_a_damaged_record_are_refused(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "report")]
    with pytest.raises(UserError, match=r"points: .* has no points\.csv; run zerobert scaling collect"):
        dispatch(["scaling", "report", str(tmp_path), *output])
    write_points(tmp_path)
    (tmp_path / "points.json").write_text('{"abilities": [{"name": "x"}]}')
    with pytest.raises(UserError, match=r"points: .*points\.json is damaged \(KeyError\('discontinuous'\)\)"):
        dispatch(["scaling", "report", str(tmp_path), *output])


def test_a_record_of_others_is_left_alone_and_a_damaged_one_refused(tmp_path: Path) -> None:
    points = tmp_path / "theirs.csv"
    assert record_beside(points) == {}
    for text in ("[1]", '{"rows": 3}'):
        points.with_suffix(".json").write_text(text)
        assert record_beside(points) == {}
        assert recorded_abilities(points) == []
    points.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=r"points: .*theirs\.json is damaged"):
        record_beside(points)


def test_blocks_are_escaped_and_kept_in_order() -> None:
    blocks = ["a < b", Table(["x"], [["<1>"]], folded=True), Picture("<svg></svg>", "c & d"), Notes(["e > f"])]
    page, text = (render("T & U", [Section("S", blocks)]) for render in (as_html, as_markdown))
    places = [page.index(each) for each in ("T &amp; U", "a &lt; b", "&lt;1&gt;", "c &amp; d", "e &gt; f")]
    assert places == sorted(places)
    assert "<summary>1 rows</summary>" in page
    assert [line for line in text.splitlines() if line] == [
        "# T & U", "## S", "a < b", "| x   |", "|-----|", "| <1> |", "- warning: e > f",
    ]  # fmt: skip
