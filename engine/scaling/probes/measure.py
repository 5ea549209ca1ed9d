"""The abilities of one exported model."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.scaling.probes.blimp import read_pairs
from engine.scaling.probes.cloze import cloze
from engine.scaling.probes.likelihood import pairs_scores
from engine.scaling.probes.linear import linear_probe
from engine.scaling.probes.masked import MaskedModel
from engine.scaling.probes.request import Request, Scores
from engine.scaling.probes.templates import TEMPLATES, pairs_of


def measure(folder: Path, request: Request, device: torch.device | None = None, tokens: int | None = None) -> Scores:
    """Ask a model all questions of a request, in fp32; equal arguments give equal scores.

    Args:
        folder: an export of pre-training, or another Hugging Face folder of our architectures with the head that
            predicts masked words, which all but labelled probes need.
        device: where it computes; None: the CPU.
        tokens: of a batch, at most, which changes scores by no more than fp32's rounding; None: as the device likes.

    Raises:
        UserError: a request that can't be asked, or of this model.
    """
    request.validate()
    where = device or torch.device("cpu")
    pairs = read_pairs(request.pairs, request.items, request.seed)
    scores = Scores()
    if request.store is not None or request.templates or pairs:
        model = MaskedModel(folder, where, tokens)
        if request.store is not None:
            scores |= cloze(model, request)
        if request.templates:
            pairs = {name: pairs_of(name, request.items, request.seed) for name in TEMPLATES} | pairs
        for name, own in pairs.items():
            scores |= pairs_scores(model, name, own)
    for probe in request.labelled:
        scores |= linear_probe(folder, probe, request, where, tokens)
    return scores
