"""Labelled probes: a logistic regression on a model's frozen vectors of texts.

Shapes: N texts, H width of a vector, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.labelled.classes import class_ids, class_names, drawn, select
from engine.data.labelled.encoded import truncating
from engine.data.labelled.files import Examples, read_examples
from engine.errors import require
from engine.model.pretrained import check_segments, load_config
from engine.model.sentence import SentenceConfig
from engine.predict.batches import TOKENS, batches, packed
from engine.predict.model import ModelFolder
from engine.predict.predictor import Encoded
from engine.predict.sequence import sequences
from engine.scaling.probes.request import LabelledProbe, Request, Scores, check_positions, scored

#: what the regression's gradient falls below; all starts then end at the same weights
TOLERANCE, ITERATIONS = 1e-7, 5000


def linear_probe(
    folder: Path, probe: LabelledProbe, request: Request, device: torch.device, tokens: int | None
) -> Scores:
    """How well classes are told from vectors, of which each dimension has mean 0 and deviation 1.

    acc_: the share of right classes. prob_, logp_: means of the right class's probability and of its logarithm, nats.
    brier_: the mean of the squared errors of all classes' probabilities, summed.

    Raises:
        UserError: no such model or files, classes that only the test has, fewer training examples than classes, or
            texts longer than the model reads.
    """
    train, test = (read_examples(path, probe.text, probe.text_pair, probe.label) for path in (probe.train, probe.test))
    names = class_names(train)
    most = len(names)
    require(probe.examples >= most, f"{probe.name}: examples", probe.examples, f"{most} classes need one each")
    train = select(train, drawn(train.labels, min(probe.examples, len(train)), request.seed))
    own, other = (vectors(folder, texts, probe, request.length, device, tokens) for texts in (train, test))
    truth, learned = class_ids(test, names), class_ids(train, names)
    log_probabilities = _log_probabilities(own, learned, other)
    right = log_probabilities[np.arange(len(truth)), truth]
    wrong = np.exp(log_probabilities) - np.eye(most)[truth]
    return scored(
        probe.name,
        len(truth),
        float((truth == np.bincount(learned).argmax()).mean()),
        float((log_probabilities.argmax(axis=1) == truth).mean()),
        prob=float(np.exp(right).mean()),
        logp=float(right.mean()),
        brier=float((wrong**2).sum(axis=1).mean()),
    )


def vectors(
    folder: Path, examples: Examples, probe: LabelledProbe, length: int, device: torch.device, tokens: int | None
) -> NDArray[np.float64]:
    """What an encoder makes of texts or pairs, cut at `length` tokens, whatever its head: [N, H].

    Raises:
        UserError: no encoder there, one with fewer positions, or of one segment where there are pairs.
    """
    config = load_config(folder)
    SentenceConfig(pooling=probe.pooling).put_into(config)
    opened = ModelFolder(folder, config, "embeddings", {})
    check_positions("length", length, config, folder)
    inputs: Sequence[str] | Sequence[tuple[str, str]] = examples.texts
    if examples.pairs is not None:
        check_segments(config, str(folder), f"{probe.name}: text_pair")
        inputs = list(zip(examples.texts, examples.pairs, strict=True))
    ids, first_lengths, _ = sequences(truncating(opened.vocabulary, length), inputs, length)
    encoded, model = Encoded(ids, first_lengths), opened.load(device, "fp32")
    found = np.empty((len(ids), config.hidden_size))
    with torch.no_grad():
        for chosen in batches(np.array([len(one) for one in ids]), tokens or TOKENS[device.type]):
            found[chosen] = model(**packed(encoded, chosen, device)).double().cpu().numpy()
    return found


def _log_probabilities(
    train: NDArray[np.float64], classes: NDArray[np.int64], test: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of the classes of test vectors, [N, C]; all classes are among those of training vectors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS))
    found: NDArray[np.float64] = probe.fit(train, classes).predict_log_proba(test)
    return found
