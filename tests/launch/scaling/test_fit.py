"""`zerobert scaling fit`, its fit.json, and the plan that reads it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.fit import Fit
from engine.scaling.optimum import Place, optimum
from engine.scaling.record import as_record, from_record
from engine.scaling.terms import LAWS
from launch.__main__ import dispatch
from launch.forecast.advice import advice_of
from tests.conftest import ROOT
from tests.launch.scaling.studies import write_points
from tests.scaling.known import TRUTH

LADDER = ROOT.parent / "shared" / "data" / "overtraining_ladder" / "points.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Path:
    """fit.json of a ladder of a known law."""
    arguments = ["--compute", "1e20", "1e26", "--law", "size_and_data", "--resamples", "40", "--predict", "1e9:2e10"]
    assert dispatch(["scaling", "fit", str(write_points(folder)), *arguments, "--output", str(folder / "fit")]) == 0
    return folder / "fit" / "fit.json"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_fit_tells_law_budget_and_predictions(fitted: Path) -> None:
    record = read(fitted)
    assert record["law"] == "size_and_data"
    assert record["intervals"]["alpha"][0] == pytest.approx(0.34, abs=0.05)
    assert len(record["ranking"]) == 5
    assert [each["name"] for each in record["held_out"]] == [f"run {index}" for index in range(16, 20)]
    inside, outside = record["optima"]
    assert 6 * inside["parameters"][0] * inside["tokens"][0] == pytest.approx(1e20)
    assert inside["warnings"] == []
    assert "outside" in outside["warnings"][0]
    (told,) = record["predicted"]
    truth = float(LAWS["size_and_data"].predict(TRUTH, Place(np.array([1e9]), np.array([2e10])))[0])
    value, low, high = told["loss"]
    assert low < truth < high < 1.1 * low
    assert value == pytest.approx(truth, rel=0.02)
    assert record["identity"] == {"objective": "mlm", "architecture": "bert"}


def test_a_fit_reads_back_as_it_was(fitted: Path) -> None:
    record = read(fitted)
    found = from_record(record)
    assert as_record(found) == {name: record[name] for name in as_record(found)}
    best = optimum(found, 1e20).parameters
    assert [best.value, best.low, best.high] == record["optima"][0]["parameters"]
    assert found.warnings() == [text for text in record["warnings"] if text in found.warnings()]


def test_a_plan_takes_size_and_tokens_from_laws(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--compute", "1e20", "--laws", str(fitted), "--gpus", "8", "--gpu", "h100"]
    assert dispatch([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    advice = plan["advice"]
    size, tokens = advice["parameters"][0], advice["tokens"][0]
    assert advice["shape_parameters"] == pytest.approx(size, rel=0.1)
    assert advice["steps"] == pytest.approx(tokens / 256 / 128)
    assert plan["request"]["model"]["hidden_size"] == advice["shape"]["hidden_size"]
    assert dispatch(command) == 0
    told = capsys.readouterr().out
    assert told.startswith("For 1e+20 FLOPs train N = ")
    assert f"--model.hidden_size {advice['shape']['hidden_size']}" in told
    assert "warning" not in told
    dispatch(["plan", "--compute", "1e25", "--laws", str(fitted), "--gpus", "8", "--gpu", "h100"])
    assert "warning: the best size" in capsys.readouterr().out


def test_laws_of_an_architecture_that_is_not_here_advise_the_usual_one(fitted: Path, tmp_path: Path) -> None:
    laws = tmp_path / "laws.json"
    for identity, warned in (({"architecture": "mamba"}, ["the points are of 'mamba'"]), ({}, [])):
        laws.write_text(json.dumps(read(fitted) | {"identity": identity}))
        advice = advice_of(Namespace(compute=1e20, laws=str(laws), model=None, config=None, tokens=None, steps=None))
        assert advice.size.architecture == "bert"
        assert [text[:25] for text in advice.warnings] == warned
    laws.write_text(json.dumps(read(fitted) | {"identity": [1]}))
    with pytest.raises(UserError, match="laws: identity: "):
        advice_of(Namespace(compute=1e20, laws=str(laws), model=None, config=None, tokens=None, steps=None))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--compute", "1e20"], "laws: not given, but compute is; give --compute FLOPS --laws FIT.JSON"),
        (["--laws", "FIT"], "compute: not given, but laws is"),
        (["--compute", "0", "--laws", "FIT"], "compute: 0.0 is not allowed; give a positive number"),
        (["--compute", "1e20", "--laws", "FIT", "--model", "bert-base"], "model: 'bert-base' and laws exclude each"),
        (["--compute", "1e20", "--laws", "FIT", "--tokens", "1e9"], "tokens: 1000000000.0 and laws exclude each other"),
        (["--compute", "1e-9", "--laws", "FIT"], "compute: 1e-09 is best spent on .* parameters, a size that no shape"),
        (["--compute", "1e20", "--laws", "NONE"], "laws: .* can't be read"),
        (["--compute", "1e20", "--laws", "LIST"], "laws: .* is not allowed; give the fit.json"),
        (["--compute", "1e20", "--laws", "OTHER"], r"laws: not a fit \(KeyError\('format'\)\)"),
    ],
)
def test_a_plan_by_wrong_laws_is_refused(fitted: Path, folder: Path, options: list[str], told: str) -> None:
    (folder / "list.json").write_text("[]")
    (folder / "other.json").write_text("{}")
    paths = {"FIT": fitted, "NONE": folder / "none.json", "LIST": folder / "list.json", "OTHER": folder / "other.json"}
    with pytest.raises(UserError, match=f"^{told}"):
        dispatch(["plan", *(str(paths.get(word, word)) for word in options)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "laws: format 2 isn't 1"),
        ({"law": "kaplan"}, "laws: not a fit"),
        ({"theta": [1.0]}, "laws: not a fit"),
        ({"samples": []}, "laws: not a fit"),
        ({"points": {}}, "laws: not a fit"),
        ({"level": 7.0}, "laws: not a fit"),
    ],
)
def test_a_damaged_record_is_refused(fitted: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        from_record(read(fitted) | change)


HEADER = "name,parameters,tokens,loss\n"
TWO = HEADER + "".join(f"{n}{d},{n}e6,{d}e9,{3 + 1 / n + 1 / d}\n" for n in (1, 2) for d in (1, 2, 3, 4))
EQUAL = HEADER + "".join(f"{d},1e6,{d}e9,{3 + 1 / d}\n" for d in range(1, 9))


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("", [], "points: .* has no rows below its header"),
        (HEADER + "a,1e6,1e9,nan\n", [], "points: loss in row 2 of .* is 'nan'; give a positive number"),
        (HEADER + "a,1e6,1e9,3\na,1e6,1e9,3\n", [], "points: .* has a twice"),
        (HEADER + "a,1.4,30,3\n", [], "points: parameters of .* looks like millions"),
        (HEADER + "a,1e6,1e9,300\n", [], "points: loss of .* which is not nats per token"),
        (TWO, ["--law", "size_and_data"], r"points: 2 distinct value\(s\) of parameters can't hold an exponent"),
        (EQUAL, ["--law", "equal_exponents"], r"points: 1 distinct value\(s\) of parameters can't hold an exponent"),
        (TWO, ["--law", "kaplan"], "law: 'kaplan' is not allowed; give auto, size_and_data"),
        (TWO, ["--columns", "loss=perplexity"], "columns: .* has no column 'perplexity' for loss"),
        (TWO, ["--columns", "loss"], "columns: 'loss' is not allowed; give NAME=VALUE"),
        (TWO, ["--columns", "loss=loss,loss=loss"], "columns: 'loss=loss' is not allowed; loss is given twice"),
        (TWO, ["--where", "name=none"], "where: no row of .* has name='none'"),
        (TWO, ["--compute", "-1"], "compute: -1.0 is not allowed; give positive numbers"),
        (TWO, ["--predict", "7e9"], "predict: '7e9' is not allowed; give PARAMETERS:TOKENS"),
        (TWO, ["--predict", "7e9:-1"], "predict: '7e9:-1' is not allowed; give PARAMETERS:TOKENS"),
        (TWO, ["--resamples", "5"], "resamples: 5 is not allowed; give 20 or more"),
        (TWO, ["--hold-out-largest", "-1"], "hold-out-largest: -1 is not allowed"),
        (TWO, ["--output", "."], "output: '.' is not allowed"),
        (TWO, ["--output", "FILE/fit"], "output: .* can't be written"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path: Path, text: str, options: list[str], told: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{told}"):
        dispatch(["scaling", "fit", str(path), *(word.replace("FILE", str(path)) for word in options)])


def test_points_of_two_objectives_are_refused(tmp_path: Path) -> None:
    path = write_points(tmp_path)
    path.write_text(path.read_text().replace("mlm", "mlm40", 1))
    with pytest.raises(UserError, match=r"points: objective has 2 values, mlm, mlm40, .*--where objective=mlm"):
        dispatch(["scaling", "fit", str(path)])


def test_tokens_in_proportion_to_the_size_tell_no_best_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    sizes = [1e6 * 2**power for power in range(8)]
    path.write_text(HEADER + "".join(f"{n},{n},{20 * n},{1 + 30 * n**-0.2}\n" for n in sizes))
    with pytest.raises(UserError, match="points: all runs have tokens in one proportion to their size"):
        dispatch(["scaling", "fit", str(path), "--law", "size_and_data", "--resamples", "20"])
    with pytest.raises(UserError, match=r"compute: compute.* doesn't tell size from data"):
        dispatch(["scaling", "fit", str(path), "--compute", "1e18", "--resamples", "20"])
    assert dispatch(["scaling", "fit", str(path), "--resamples", "20"]) == 0
    assert "No law that tells size from data can be fitted: points: all runs have tokens" in capsys.readouterr().out


def test_a_held_out_part_that_holds_no_law_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_points(tmp_path, sizes=3, budgets=4)
    options = ["--law", "equal_exponents", "--resamples", "20"]
    assert dispatch(["scaling", "fit", str(path), *options]) == 0
    assert "No size is held out: points: 2 distinct" in capsys.readouterr().out
    with pytest.raises(UserError, match="hold-out-largest: 3 is not allowed; there are 3 sizes"):
        dispatch(["scaling", "fit", str(path), "--hold-out-largest", "3"])


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_help_teaches_all_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch(["scaling", *words])
    text = capsys.readouterr().out
    assert all(f"zerobert scaling {verb} " in text for verb in ("plan", "run", "collect", "fit", "report"))
    with pytest.raises(UserError, match="verb: 'fti' is unknown; did you mean fit"):
        dispatch(["scaling", "fti"])


@pytest.mark.skipif(not LADDER.is_file(), reason="no shared data")
@pytest.mark.slow
def test_a_public_ladder_is_read_by_its_own_columns(tmp_path: Path) -> None:
    columns = ["--columns", "parameters=params,loss=loss_c4_val", "--where", "train_set=rpj"]
    options = ["--hold-out-largest", "2", "--resamples", "100", "--output", str(tmp_path)]
    assert dispatch(["scaling", "fit", str(LADDER), *columns, *options]) == 0
    record = read(tmp_path / "fit.json")
    assert record["law"] == "equal_exponents"
    errors = [each["predicted"][0] / each["reached"] - 1 for each in record["held_out"]]
    assert np.abs(errors).max() < 0.06
    found: Fit = from_record(record)
    assert len(found.points) == len(record["points"]["names"])
