"""General distillation in pre-training: loss and gradient are those of plain torch on transformers' models."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM, BertForPreTraining

from engine.config import DistilConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.model.folder import PROJECTIONS
from engine.tasks.pretrain import Pretraining
from tests.tasks.distilled.plain import LARGER, their_hidden, their_relations
from tests.tasks.regularised.plain import same_gradients
from tests.tasks.test_pretrain import config

WEIGHTS = {"hard": 0.5, "soft": 2.0, "hidden": 0.3, "relations": 0.7}
TEMPERATURE = 3.0


def make(store: Path, folder: Path, objective: str, **model: Any) -> Pretraining:
    """A run whose teacher is another architecture's size under MLM's head."""
    run = config(store, **model)
    run.data = replace(run.data, objective=objective)  # type: ignore[arg-type]
    plain = Pretraining(run)
    torch.manual_seed(1)
    teacher = BertForMaskedLM(type(plain.model_config).from_dict({**plain.model_config.to_dict(), **LARGER}))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    teacher.save_pretrained(folder)
    plain.vocabulary.save(folder)
    run.distil = DistilConfig(teachers=str(folder), temperature=TEMPERATURE, relation_heads=4, **WEIGHTS)
    run.validate()
    return Pretraining(run)


def passes(theirs: Any, batch: Any) -> tuple[torch.Tensor, list[list[torch.Tensor]], list[list[torch.Tensor]], Any]:
    """MLM's logits of masked tokens, states behind each layer, queries, keys and values, and NSP's logits if any."""
    lengths = batch.inputs["lengths"].tolist()
    logits, hidden, projected, pairs = [], [], [], []
    both = (batch.inputs[name].split(lengths) for name in ("input_ids", "token_type_ids"))
    for ids, segments in zip(*both, strict=True):
        output = theirs(ids[None], token_type_ids=segments[None], output_hidden_states=True)
        logits.append(output.logits[0] if "logits" in output else output.prediction_logits[0])
        pairs.append(output.get("seq_relationship_logits"))
        states = [each[0] for each in output.hidden_states]
        hidden.append(states[1:])
        own = [layer.attention.self for layer in theirs.bert.encoder.layer]
        entered = zip(own, states, strict=False)
        parts = [[one.query(each), one.key(each), one.value(each)] for one, each in entered]
        projected.append([torch.stack(each) for each in parts])
    return torch.cat(logits)[batch.inputs["mlm_positions"]], hidden, projected, pairs


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_loss_and_gradient_are_those_of_plain_torch(store: Path, tmp_path: Path, objective: str) -> None:
    task = make(store, tmp_path / "teacher", objective)
    batch = next(training_batches(task.train_source(), BatchLayout(4, 4), Cursor(), workers=0))
    model = task.build_model().train()
    for module in model.modules():
        if hasattr(module, "dropout_probability"):
            module.dropout_probability = 0.0
    output = task.step(model, batch)
    output.loss.backward()

    kind = BertForMaskedLM if objective == "mlm" else BertForPreTraining
    theirs = kind(task.model_config).eval()
    theirs.load_state_dict({name: each for name, each in model.state_dict().items() if PROJECTIONS not in name})
    logits, hidden, projected, pairs = passes(theirs, batch)
    with torch.no_grad():
        lesson = passes(BertForMaskedLM.from_pretrained(tmp_path / "teacher").eval(), batch)
    project = model.get_submodule(f"{PROJECTIONS}.0")
    own = functional.cross_entropy(logits, batch.inputs["mlm_labels"])
    if objective == "mlm_nsp":
        own = own + functional.cross_entropy(torch.cat(pairs), batch.inputs["nsp_labels"])
    softened = [each.div(TEMPERATURE).log_softmax(1) for each in (logits, lesson[0])]
    expected = {
        "hard": own,
        "soft": functional.kl_div(*softened, reduction="batchmean", log_target=True) * TEMPERATURE**2,
        "hidden": their_hidden(hidden, lesson[1], project),
        "relations": their_relations(projected, lesson[2], 4, LARGER["num_hidden_layers"] - 1),
    }
    delattr(model, PROJECTIONS)
    whole = torch.stack([WEIGHTS[name] * value for name, value in expected.items()]).sum()
    whole.backward()
    assert float(output.loss) == pytest.approx(float(whole), rel=1e-5)
    told = {"soft_loss": "soft", "hidden_loss": "hidden", "relation_loss": "relations"}
    for name, of in told.items():
        assert float(output.metrics[name]) == pytest.approx(float(expected[of]), rel=1e-4), name
    same_gradients(model, theirs)


def test_shares_add_up_and_operations_are_counted(store: Path, tmp_path: Path) -> None:
    task = make(store, tmp_path / "teacher", "mlm")
    model = task.build_model().eval()
    batches = [training_batches(task.train_source(), BatchLayout(4, size), Cursor(), 0) for size in (4, 2)]
    parts = [list(islice(given, count)) for given, count in zip(batches, (1, 2), strict=True)]
    sums = [sum(float(task.step(model, one).loss) for one in part) for part in parts]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    alone = Pretraining(replace(task.config, distil=DistilConfig()))
    assert task.flops(parts[0][0]) > 1.3 * alone.flops(parts[0][0])


def test_modernbert_learns_nothing_from_itself(store: Path, tmp_path: Path) -> None:
    """Its queries, keys and values come from one matrix, and its layers hand on a residual stream."""
    run = config(store, architecture="modernbert")
    run.data = replace(run.data, objective="mlm")
    plain = Pretraining(run)
    kind = plain.architecture.export_class("ModernBertForMaskedLM")
    torch.manual_seed(1)
    kind(plain.model_config).save_pretrained(tmp_path / "teacher")
    plain.vocabulary.save(tmp_path / "teacher")
    options = DistilConfig(teachers=str(tmp_path / "teacher"), hard=0.0, hidden=1.0, relations=1.0)
    batch = next(training_batches(plain.train_source(), BatchLayout(4, 4), Cursor(), workers=0))
    found = []
    for start in (None, str(tmp_path / "teacher")):
        task = Pretraining(replace(run, distil=options, model=replace(run.model, init_from=start)))
        output = task.step(task.build_model().train(), batch)
        found.append({name: float(output.metrics[name]) for name in ("soft_loss", "hidden_loss", "relation_loss")})
    assert all(value > 1e-4 for value in found[0].values())
    assert all(value < 1e-6 for value in found[1].values()), found
