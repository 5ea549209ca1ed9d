from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig

from engine.kernels import dispatch
from engine.model import bert
from engine.model.bert import BertForMaskedLM, BertForPreTraining, BertModel
from engine.model.build import initialise
from engine.model.packing import pack

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
PACKED = ("input_ids", "token_type_ids", "position_ids", "lengths")


@pytest.fixture
def model(config: BertConfig) -> BertForPreTraining:
    model = BertForPreTraining(config).eval()
    initialise(model, seed=5)
    randomise_vectors(model)
    return model


@pytest.fixture
def peer(config: BertConfig, model: BertForPreTraining) -> transformers.BertForPreTraining:
    peer = transformers.BertForPreTraining(config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


@pytest.fixture
def batch(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keyword arguments of the model: 6 of the 33 tokens masked."""
    targets = {
        "mlm_positions": torch.tensor([2, 9, 12, 14, 21, 30]),
        "mlm_labels": torch.tensor([5, 96, 0, 41, 8, 17]),
        "nsp_labels": torch.tensor([0, 1, 1, 0, 1]),
    }
    return {**pack(**padded), **targets}


@torch.no_grad()
def randomise_vectors(model: nn.Module) -> None:
    """Biases and LayerNorms away from 0 and 1, where a wrong one would not show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)


def peer_inputs(padded: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The padded batch with transformers' label grid."""
    flat = padded["attention_mask"].flatten().nonzero().squeeze(1)[batch["mlm_positions"]]
    labels = torch.full_like(padded["input_ids"], -100)
    labels.view(-1)[flat] = batch["mlm_labels"]
    return {**padded, "labels": labels, "next_sentence_label": batch["nsp_labels"]}


def test_state_dict_has_the_names_and_shapes_of_transformers(config: BertConfig) -> None:
    ours = {name: tensor.shape for name, tensor in BertForPreTraining(config).state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in transformers.BertForPreTraining(config).state_dict().items()}
    assert ours == theirs


def test_decoder_shares_its_parameters(model: BertForPreTraining) -> None:
    head = model.cls.predictions
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias


def test_hidden_states_and_pooled_vectors_equal_transformers(
    model: BertForPreTraining, peer: transformers.BertForPreTraining, padded: dict[str, Tensor]
) -> None:
    hidden, pooled = model.bert(**pack(**padded))
    expected = peer.bert(**padded)
    torch.testing.assert_close(hidden, expected.last_hidden_state[padded["attention_mask"].bool()], **TOLERANCE)
    torch.testing.assert_close(pooled, expected.pooler_output, **TOLERANCE)


def test_full_batches_equal_transformers(model: BertForPreTraining, peer: transformers.BertForPreTraining) -> None:
    ids = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    hidden, _ = model.bert(**pack(ids, torch.ones_like(ids)))
    torch.testing.assert_close(hidden, peer.bert(ids).last_hidden_state.flatten(0, 1), **TOLERANCE)


def test_logits_of_masked_rows_and_nsp_equal_transformers(
    model: BertForPreTraining,
    peer: transformers.BertForPreTraining,
    padded: dict[str, Tensor],
    batch: dict[str, Tensor],
) -> None:
    hidden, pooled = model.bert(**pack(**padded))
    head = model.cls.predictions
    rows = head.transform(hidden[batch["mlm_positions"]])
    logits = nn.functional.linear(rows, head.decoder.weight, head.decoder.bias)
    expected = peer(**padded)
    kept = padded["attention_mask"].bool()
    torch.testing.assert_close(logits, expected.prediction_logits[kept][batch["mlm_positions"]], **TOLERANCE)
    torch.testing.assert_close(model.cls.seq_relationship(pooled), expected.seq_relationship_logits, **TOLERANCE)
    assert torch.equal(model(**batch)["predictions"], logits.argmax(-1))


def test_loss_and_every_gradient_equal_transformers(
    model: BertForPreTraining,
    peer: transformers.BertForPreTraining,
    padded: dict[str, Tensor],
    batch: dict[str, Tensor],
) -> None:
    output = model(**batch)
    loss = output["mlm_loss_sum"] / 6 + output["nsp_loss_sum"] / 5
    loss.backward()
    expected = peer(**peer_inputs(padded, batch)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    theirs = dict(peer.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_training_gives_the_losses_and_gradients_of_evaluation(config: BertConfig, batch: dict[str, Tensor]) -> None:
    """The fused loss of training against torch's of evaluation, without dropout."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForPreTraining(config)
    results = []
    for mode in (False, True):
        model.train(mode).zero_grad()
        output = model(**batch)
        (output["mlm_loss_sum"] / 6).backward()
        results.append((output, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, plain_grads), (fused, fused_grads) = results
    assert plain.keys() - fused.keys() == {"predictions"}
    for name in fused:
        torch.testing.assert_close(fused[name], plain[name], **TOLERANCE)
    for ours, theirs in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_rows_that_only_round_a_shape_change_nothing(
    config: BertConfig, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForPreTraining(config)
    results = []
    for spare in (0, 7):
        monkeypatch.setattr(bert, "spare_rows", lambda *_, spare=spare: spare)
        model.zero_grad()
        output = model(**batch)
        (output["mlm_loss_sum"] / 6 + output["nsp_loss_sum"] / 5).backward()
        results.append((output, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, plain_grads), (padded, padded_grads) = results
    for name in plain:
        torch.testing.assert_close(padded[name], plain[name], **TOLERANCE)
    for ours, theirs in zip(padded_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_counts_agree_with_the_predictions(model: BertForPreTraining, batch: dict[str, Tensor]) -> None:
    predictions = model(**batch)["predictions"]
    batch["mlm_labels"][:2] = predictions[:2]
    batch["mlm_labels"][2:] = (predictions[2:] + 1) % 97
    nsp = model.cls.seq_relationship(model.bert(**{name: batch[name] for name in PACKED})[1]).argmax(-1)
    batch["nsp_labels"] = torch.cat([nsp[:3], 1 - nsp[3:]])
    output = model(**batch)
    assert (int(output["mlm_correct"]), int(output["nsp_correct"])) == (2, 3)
    assert not output["mlm_correct"].requires_grad


def test_a_sequence_does_not_see_its_neighbours(model: BertForPreTraining, padded: dict[str, Tensor]) -> None:
    together, pooled = model.bert(**pack(**padded))
    alone, pooled_alone = model.bert(**pack(**{name: tensor[2:3, :7] for name, tensor in padded.items()}))
    torch.testing.assert_close(together[14:21], alone, **TOLERANCE)
    torch.testing.assert_close(pooled[2:3], pooled_alone, **TOLERANCE)


def test_a_wider_grid_changes_nothing(model: BertForPreTraining, padded: dict[str, Tensor]) -> None:
    packed = pack(**padded)
    torch.testing.assert_close(model.bert(**packed, max_length=16)[0], model.bert(**packed)[0], **TOLERANCE)


def test_activation_checkpointing_gives_the_same_gradients_under_dropout(
    config: BertConfig, batch: dict[str, Tensor]
) -> None:
    gradients = []
    for recompute in (False, True):
        model = BertForPreTraining(config, activation_checkpointing=recompute).train()
        initialise(model, seed=5)
        torch.manual_seed(0)
        output = model(**batch)
        (output["mlm_loss_sum"] + output["nsp_loss_sum"]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_activation_checkpointing_keeps_only_layer_inputs(config: BertConfig, padded: dict[str, Tensor]) -> None:
    saved = []
    for recompute in (False, True):
        sizes: list[int] = []
        model = BertModel(config, activation_checkpointing=recompute).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            model(**pack(**padded))
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2


def test_dropout_acts_in_training_only(model: BertForPreTraining, padded: dict[str, Tensor]) -> None:
    packed = pack(**padded)
    assert torch.equal(model.bert(**packed)[0], model.bert(**packed)[0])
    model.train()
    assert not torch.equal(model.bert(**packed)[0], model.bert(**packed)[0])


def test_dropout_lies_where_transformers_has_it(
    model: BertForPreTraining, peer: transformers.BertForPreTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference kernels draw torch's masks in transformers' order; the fused ones hash a drawn seed instead."""
    ids = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(dispatch, "_selected", "reference")
    torch.manual_seed(8)
    hidden, _ = model.train().bert(**pack(ids, torch.ones_like(ids)))
    torch.manual_seed(8)
    expected = peer.train().bert(ids).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_probability_is_obeyed(config: BertConfig, padded: dict[str, Tensor], field: str) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    packed = pack(**padded)
    still = BertModel(config).train()
    assert torch.equal(still(**packed)[0], still(**packed)[0])
    setattr(config, field, 0.5)
    moving = BertModel(config).train()
    assert not torch.equal(moving(**packed)[0], moving(**packed)[0])


def test_losses_are_fp32_in_bf16_models(model: BertForPreTraining, batch: dict[str, Tensor]) -> None:
    exact = model(**batch)
    rounded = model.to(torch.bfloat16)(**batch)
    for name in ("mlm_loss_sum", "nsp_loss_sum"):
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=0.05)


def test_a_batch_without_masked_tokens_adds_nothing(model: BertForPreTraining, batch: dict[str, Tensor]) -> None:
    batch["mlm_positions"] = batch["mlm_labels"] = torch.empty(0, dtype=torch.int64)
    output = model(**batch)
    output["mlm_loss_sum"].backward()
    assert float(output["mlm_loss_sum"]) == 0.0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients)


def test_mlm_alone_equals_transformers_in_loss_gradients_and_names(
    config: BertConfig, padded: dict[str, Tensor], batch: dict[str, Tensor]
) -> None:
    model = BertForMaskedLM(config).eval()
    peer = transformers.BertForMaskedLM(config).eval()
    model.load_state_dict(peer.state_dict())
    asked = {name: tensor for name, tensor in batch.items() if name != "nsp_labels"}
    output = model(**asked)
    theirs = peer(
        **{name: value for name, value in peer_inputs(padded, batch).items() if name != "next_sentence_label"}
    )
    torch.testing.assert_close(output["mlm_loss_sum"] / 6, theirs.loss, **TOLERANCE)
    (output["mlm_loss_sum"] / 6).backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )
    logits = theirs.logits[padded["attention_mask"].bool()][batch["mlm_positions"]]
    assert torch.equal(output["predictions"], logits.argmax(-1))
    assert int(output["mlm_correct"]) == int((logits.argmax(-1) == batch["mlm_labels"]).sum())


def test_mlm_alone_trains_with_the_loss_of_evaluation(config: BertConfig, batch: dict[str, Tensor]) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForMaskedLM(config)
    asked = {name: tensor for name, tensor in batch.items() if name != "nsp_labels"}
    for half in (False, True):  # bf16 has spare rows
        model = model.to(torch.bfloat16) if half else model
        losses = [model.train(mode)(**asked)["mlm_loss_sum"] for mode in (False, True)]
        torch.testing.assert_close(losses[0], losses[1], **({"rtol": 0.02, "atol": 0.02} if half else TOLERANCE))
