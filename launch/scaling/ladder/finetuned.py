"""Scores of runs of fine-tuning as abilities of the points that they started from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import require
from engine.errors import UserError
from engine.scaling.probes.finetuned import finetuned_scores
from engine.scaling.probes.request import Scores
from launch.configure.recipe import read_recipe

if TYPE_CHECKING:
    from launch.scaling.ladder.collect import Measured


def scores_of(given: Sequence[str], measured: Sequence[Measured]) -> list[Scores]:
    """What each point's model reached in tasks.

    Args:
        given: NAME=FOLDER of each task; the run that began with a point's weights is <folder>/<name of the point>.

    Raises:
        UserError: no NAME=FOLDER, a run that isn't finished, began elsewhere, or was scored on other examples.
    """
    scores = [Scores()] * len(measured)
    for word in given:
        name, equals, folder = word.partition("=")
        require(bool(equals and folder), "finetuned", word, "give NAME=FOLDER, with a run for each point in it")
        scores = [
            own | _score(name, Path(folder) / each.name, each) for own, each in zip(scores, measured, strict=True)
        ]
    for each, own in zip(measured, scores, strict=True):
        for ability, first in zip(own.abilities, scores[0].abilities, strict=True):
            if ability != first:
                raise UserError(
                    f"finetuned: {ability.name} of {each.name} was scored on {ability.items} examples, of "
                    f"{measured[0].name} on {first.items}, or on others; score all on the same"
                )
    return scores


def _score(name: str, run: Path, each: Measured) -> Scores:
    scores = finetuned_scores(run, name)
    start = read_recipe(str(run / "config.yaml")).get("model", {}).get("init_from")
    if each.checkpoint is None and (start is None or not Path(start).resolve().is_relative_to(each.run.resolve())):
        raise UserError(f"finetuned: {run} began with {start!r}; begin it with {each.run / 'export'}")
    return scores
