"""The score of a finished fine-tuning run as an ability of the model that it started from."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import UserError
from engine.scaling.probes.request import Scores, check_name, scored

REMEDY = "give the folder of a finished run of sequence_classification or multiple_choice"


def finetuned_scores(run: Path, name: str) -> Scores:
    """acc_: the accuracy of the run's report. logp_: the mean logarithm of the right answer's probability, nats.

    Raises:
        UserError: no report there, or one without accuracy and loss, or a name that no column can have.
    """
    check_name(name, "name")
    path = run / "report" / "report.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        baseline = told.get("majority_baseline", {}).get("accuracy", told.get("guessing_baseline"))
        items = told["examples"] if "examples" in told else told["questions"]
        return scored(name, items, baseline, told["accuracy"], logp=-told["scores"]["loss"])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: it tells no accuracy and loss; {REMEDY}") from error
