"""All abilities of a model at once, and requests that can't be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.probes.finetuned import finetuned_scores
from engine.scaling.probes.measure import measure
from engine.scaling.probes.request import LabelledProbe, Request, Scores, scored
from engine.scaling.probes.templates import TEMPLATES
from engine.tasks.report import Predictions, report
from engine.tasks.sequence import scores as classifier_scores
from engine.tasks.task import Evaluation
from tests.conftest import ROOT
from tests.predict.models import write_rows
from tests.scaling.probes.test_cloze import export


def request_for(store: Path, folder: Path) -> Request:
    """Few questions of each kind."""
    (folder / "own.jsonl").write_text('{"sentence_good": "They go.", "sentence_bad": "They goes."}\n')
    rows = write_rows(folder / "rows.jsonl", ["yes", "no", "yes it is", "no it isn't"], label=["a", "b", "a", "b"])
    probe = LabelledProbe("yes", str(rows), str(rows))
    return Request(store, True, (folder / "own.jsonl",), (probe,), items=10, context=24, length=24)


def test_a_model_is_asked_everything(store: Path, tmp_path: Path) -> None:
    model, request = export(store, tmp_path / "model"), request_for(store, tmp_path)
    scores = measure(model, request)
    names = ["cloze_frequent", "cloze_rare", *TEMPLATES, "blimp_own", "yes"]
    assert [ability.name for ability in scores.abilities] == names
    for ability in scores.abilities:
        assert {ability.discontinuous, *ability.continuous} <= scores.columns.keys()
        assert scores.columns[f"items_{ability.name}"] == ability.items > 0
    assert all(np.isfinite(value) for value in scores.columns.values())
    assert json.loads(json.dumps(asdict(scores)))["abilities"][0]["discontinuous"] == "acc_cloze_frequent"
    assert measure(model, request) == scores
    assert measure(model, request, tokens=30).columns == pytest.approx(dict(scores.columns), abs=1e-5)
    alone = measure(model, replace(request, store=None, templates=False, pairs=()))
    assert [ability.name for ability in alone.abilities] == ["yes"]


def test_requests_that_can_t_be_asked_are_refused(store: Path, tmp_path: Path) -> None:
    request = request_for(store, tmp_path)
    (probe,) = request.labelled
    for asked, what in (
        (replace(request, items=1), "^items: 1 is not allowed"),
        (replace(request, context=7), "^context: 7 is not allowed"),
        (replace(request, length=7), "^length: 7 is not allowed"),
        (replace(request, seed=-1), "^seed: -1 is not allowed"),
        (replace(request, labelled=(probe, probe)), "^labelled: 'yes' is not allowed; two probes have that name"),
        (replace(request, labelled=(replace(probe, name="a,b"),)), "^labelled: 'a,b' is not allowed; give a name of"),
        (replace(request, labelled=(replace(probe, examples=0),)), "^yes: examples: 0 is not allowed"),
        (Request(templates=False), "^templates: False is not allowed; nothing is asked"),
    ):
        with pytest.raises(UserError, match=what):
            asked.validate()
    with pytest.raises(UserError, match=r"^name: 'x' is not allowed; two abilities"):
        _ = scored("x", 1, None, 0.5) | scored("x", 1, None, 0.5)


def test_requests_need_no_torch() -> None:
    code = (
        "import sys, engine.scaling.probes.request; print({'torch', 'transformers', 'deepspeed'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_of_fine_tuning_is_an_ability(tmp_path: Path) -> None:
    probabilities = np.array([[0.8, 0.2], [0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    truth = np.array([0, 1, 1, 1])
    evaluation = Evaluation(
        classifier_scores(truth, np.log(probabilities)),
        records={"predictions": Predictions(("no", "yes"), 0, truth, probabilities)},
    )
    report(evaluation, tmp_path / "report")
    scores = finetuned_scores(tmp_path, "rte_tuned")
    logp = np.log(probabilities[np.arange(4), truth]).mean()
    expected = {"acc_rte_tuned": 0.75, "logp_rte_tuned": pytest.approx(logp), "items_rte_tuned": 4.0}
    assert scores.columns == expected
    assert scores.abilities[0].chance == 0.25
    assert isinstance(scores, Scores)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"examples": 3, "pearson": 0.5}', '{"examples": 3, "accuracy": 1}']
)
def test_other_reports_are_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "report").mkdir()
    if content is not None:
        (tmp_path / "report" / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json: .*give the folder of a finished run"):
        finetuned_scores(tmp_path, "x")
    with pytest.raises(UserError, match=r"^name: 'x y' is not allowed"):
        finetuned_scores(tmp_path, "x y")
