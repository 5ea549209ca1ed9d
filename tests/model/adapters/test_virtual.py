"""Prompt and prefix tuning: logits and gradients are those of peft and transformers on padded batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import Tensor, nn

from engine.config import AdapterConfig, architecture_of
from engine.errors import UserError
from engine.kernels import cpu, dispatch, reference
from engine.kernels.terms import Sequences
from engine.model import layers
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.folder import compare_weights, rebuilt, saved
from engine.model.adapters.judge import VirtualJudge
from engine.model.adapters.methods import TASK_TYPES, virtual_config
from engine.model.adapters.virtual import PromptedEmbeddings
from engine.model.bert import BertModel
from engine.model.layers import BertSelfAttention
from engine.model.packing import Packing, pack
from engine.model.pretrained import LoadReport, Reshaped
from engine.model.roundtrip import compare_logits, own_logits, random_samples
from engine.model.roundtrip import packed as batch_of
from engine.model.roundtrip import their_logits as logits_of_samples
from tests.model import test_task_heads
from tests.model.test_task_heads import CONFIGS, LENGTHS, both, padded
from tests.tasks.tiny import TINY, tiny_bert

VECTORS = 7
#: embeddings take no vectors in front of a text
HEADS = tuple(head for head in test_task_heads.HEADS if head != "embeddings")
ON_TOKENS = ("token_classification", "question_answering")
#: ModernBERT's attention takes no prefix
PAIRS = [
    (method, name) for method in ("prompt", "prefix") for name in CONFIGS if (method, name) != ("prefix", "modernbert")
]
NOTHING_LOADED = LoadReport((), (), ())


def adaptation(method: str, vectors: int = VECTORS, seed: int = 3) -> Adaptation:
    return Adaptation(AdapterConfig(method, virtual_tokens=vectors), None, seed, 10, "base")  # type: ignore[arg-type]


def adapted(name: str, head: str, method: str) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours with the same and vectors that are no model's activations."""
    theirs, ours = both(name, head)
    adaptation(method).apply(ours, NOTHING_LOADED)
    generator = torch.Generator().manual_seed(4)
    for parameter in vectors_of(ours).values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return theirs, ours.eval()


def vectors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if ".prompt." in name or ".prefix." in name}


def with_vectors(theirs: Any, ours: Any, head: str, method: str) -> Any:
    """peft's model over transformers' with our vectors, all of it trainable."""
    config = virtual_config(AdapterConfig(method, virtual_tokens=VECTORS), theirs.config)  # type: ignore[arg-type]
    config.task_type = TASK_TYPES.get(head)
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    opened = kind(copy.deepcopy(theirs), config).eval()
    opened.prompt_encoder.default.embedding.weight.data = saved(vectors_of(ours))["prompt_embeddings"].detach().clone()
    return opened.requires_grad_(True)


def their_logits(opened: Any, head: str, method: str, ids: Tensor, mask: Tensor) -> Tensor:
    """Of a padded batch as peft describes it, [B, classes] or [T, classes] of the tokens that are no padding."""
    longer = nn.functional.pad(mask, (VECTORS, 0), value=1)
    choices = head == "multiple_choice"
    given: dict[str, Any] = {"attention_mask": longer[None] if choices else longer}
    if method == "prefix":
        given |= {"input_ids": ids[None] if choices else ids, "past_key_values": opened.get_prompt(len(ids))}
        output = opened.base_model(**given)
    elif choices:
        words = opened.base_model.get_input_embeddings()(ids)
        given["inputs_embeds"] = torch.cat((opened.get_prompt(len(ids)), words), 1)[None]
        output = opened.base_model(**given)
    else:
        output = opened(input_ids=ids, attention_mask=mask)
    if head not in ON_TOKENS:
        logits: Tensor = output.logits
        return logits.reshape(-1, 1) if choices else logits
    behind = VECTORS if method == "prompt" else 0
    answers = head == "question_answering"
    of_all = torch.stack((output.start_logits, output.end_logits), -1) if answers else output.logits
    return of_all[:, behind:][mask.bool()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_logits_and_gradients_are_theirs(method: str, name: str, head: str) -> None:
    theirs, ours = adapted(name, head, method)
    opened = with_vectors(theirs, ours, head, method)
    ours.requires_grad_(True)
    ids, mask = padded(ours.config)
    logits, expected = ours(**pack(ids, mask), max_length=max(LENGTHS)), their_logits(opened, head, method, ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = saved({key: each.grad for key, each in vectors_of(ours).items()})["prompt_embeddings"]  # type: ignore[misc]
    peer = opened.prompt_encoder.default.embedding.weight.grad
    assert float(peer.abs().max()) > 1e-3
    assert float((gradient - peer).abs().max() / peer.abs().max()) < 1e-5
    head_name = "qa_outputs.weight" if hasattr(ours, "qa_outputs") else list(dict(ours.named_parameters()))[-2]
    grads = {key.replace("modules_to_save.default.", ""): each.grad for key, each in opened.named_parameters()}
    apart = (ours.get_parameter(head_name).grad - grads[f"base_model.{head_name}"]).abs().max()
    assert float(apart / grads[f"base_model.{head_name}"].abs().max()) < 1e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_a_packed_batch_gives_what_its_sequences_give_alone(method: str, name: str, head: str) -> None:
    _, ours = adapted(name, head, method)
    ids, mask = padded(ours.config)
    with torch.no_grad():
        together = ours(**pack(ids, mask))
        alone = [
            ours(**pack(ids[row : row + 1, :length], mask[row : row + 1, :length]))
            for row, length in enumerate(LENGTHS)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ON_TOKENS)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_tokens_that_are_read_have_their_logits(method: str, name: str, head: str) -> None:
    _, ours = adapted(name, head, method)
    batch, read = pack(*padded(ours.config)), torch.tensor([0, 3, 5, 90, 187])
    torch.testing.assert_close(ours(**batch, read=read), ours(**batch)[read], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_segments_are_the_texts_own(method: str) -> None:
    theirs, ours = adapted("bert", "sequence_classification", method)
    ids, mask = padded(ours.config)
    segments = torch.zeros_like(ids)
    segments[:, 3:] = mask[:, 3:]
    opened = with_vectors(theirs, ours, "sequence_classification", method)
    given = {"input_ids": ids, "token_type_ids": segments}
    with torch.no_grad():
        if method == "prompt":
            expected = opened(**given, attention_mask=mask).logits
        else:
            longer = nn.functional.pad(mask, (VECTORS, 0), value=1)
            expected = opened.base_model(**given, attention_mask=longer, past_key_values=opened.get_prompt(3)).logits
        logits = ours(**pack(ids, mask, segments))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, ours(**pack(ids, mask)), atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_the_judge_of_an_export_computes_the_same_of_segments(method: str, name: str, head: str) -> None:
    theirs, ours = adapted(name, head, method)
    samples = random_samples(ours.config, VECTORS)
    batch = batch_of(samples)
    read = torch.arange(len(batch["input_ids"]))
    judge = VirtualJudge(with_vectors(theirs, ours, head, method), method, head)
    with torch.no_grad():
        own = own_logits(ours, head, batch, read)
        other = logits_of_samples(judge, head, samples, read, tuple(own))
    assert max(compare_logits(own, other, "the judge").values()) < 1e-5


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification"])
@pytest.mark.parametrize(("method", "name"), [("prompt", "modernbert"), ("prompt", "bert"), ("prefix", "roberta")])
def test_recomputed_layers_give_the_same_gradients(method: str, name: str, head: str) -> None:
    _, ours = adapted(name, head, method)
    other = architecture_of(ours.config).build(head, ours.config, True)
    adaptation(method).apply(other, NOTHING_LOADED)
    other.load_state_dict(ours.state_dict())
    batch = pack(*padded(ours.config))
    for model in (ours, other):
        model.train()
        model(**batch).square().sum().backward()
    for (key, mine), (_, again) in zip(vectors_of(ours).items(), vectors_of(other).items(), strict=True):
        assert mine.grad is not None, key
        torch.testing.assert_close(mine.grad, again.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_only_the_vectors_and_the_head_are_trained_from_values_of_the_seed(method: str, name: str) -> None:
    _, first = both(name, "sequence_classification")
    _, second = both(name, "sequence_classification")
    _, third = both(name, "sequence_classification")
    state = torch.random.get_rng_state()
    adaptation(method).apply(first, NOTHING_LOADED)
    adaptation(method).apply(second, NOTHING_LOADED)
    adaptation(method, seed=5).apply(third, NOTHING_LOADED)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = {key for key, parameter in first.named_parameters() if parameter.requires_grad}
    prefix = architecture_of(first.config).prefix
    assert {key for key in trained if key.startswith(prefix)} == set(vectors_of(first))
    for key, values in vectors_of(first).items():
        assert torch.equal(values, vectors_of(second)[key])
        assert not torch.equal(values, vectors_of(third)[key])


def test_a_model_rebuilt_for_an_export_leaves_the_dropout_of_its_run(tmp_path: Path) -> None:
    base, config = tiny_bert(tmp_path), copy.deepcopy(TINY)
    state = torch.random.get_rng_state()
    rebuilt(config, "sequence_classification", base, adaptation("prefix", vectors=3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_begins_as_words() -> None:
    _, ours = both("bert", "sequence_classification")
    words = ours.bert.embeddings.word_embeddings.weight.detach().clone()
    adaptation("prompt").apply(ours, NOTHING_LOADED)
    prompted = ours.bert.embeddings.word_embeddings
    assert isinstance(prompted, PromptedEmbeddings)
    assert all(bool((row == words).all(1).any()) for row in prompted.prompt.weight)


def test_a_prefix_begins_as_what_the_model_makes_of_words() -> None:
    """So a text behind these words, whose tokens see nothing but them and itself, has in layer 0 the same context."""
    _, ours = both("bert", "sequence_classification")
    plain = copy.deepcopy(ours.bert)
    adaptation("prefix").apply(ours, NOTHING_LOADED)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        words = torch.randint(97, (VECTORS,))
    text = torch.arange(20, 31)
    whole = pack(torch.cat((words, text))[None], torch.ones(1, VECTORS + len(text)))
    own = pack(text[None], torch.ones(1, len(text)))
    seen: list[Tensor] = []
    for layer in (plain.encoder.layer[0], ours.bert.encoder.layer[0]):
        layer.register_forward_hook(lambda _, given, states: seen.append(states))
    plain(**whole)
    ours.eval()(**own)
    torch.testing.assert_close(seen[1], seen[0][VECTORS:], rtol=1e-5, atol=1e-5)


@pytest.fixture
def _fused() -> Iterator[None]:
    if not cpu.available():
        pytest.skip("the CPU kernels can't be built here")
    dispatch.select("auto")
    yield
    dispatch.select("auto")


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize("head", ["sequence_classification", "token_classification"])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_bf16_is_as_near_to_fp32_as_plain_torch(method: str, name: str, head: str) -> None:
    """In training, with the kernels that the device has."""
    _, exact = adapted(name, head, method)
    batch = pack(*padded(exact.config))
    results = {}
    for kernels, kind in (("auto", torch.float32), ("auto", torch.bfloat16), ("reference", torch.bfloat16)):
        dispatch.select(kernels)  # type: ignore[arg-type]
        model = copy.deepcopy(exact).to(kind).train()
        logits = model(**batch)
        logits.square().mean().backward()
        gradients = [parameter.grad.float().flatten() for parameter in vectors_of(model).values()]  # type: ignore[union-attr]
        results[kernels, kind] = (logits.detach().float().flatten(), torch.cat(gradients))
    for truth, ours, plain in zip(*results.values(), strict=True):
        assert float((ours - truth).norm()) < 1.5 * float((plain - truth).norm()) + 1e-3 * float(truth.norm())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_packed_attention_asks_prefixes_as_the_grid_does(name: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose operator has a plain version here; the last layer asks for what is read alone."""
    _, ours = adapted(name, head, "prefix")
    batch = pack(*padded(ours.config))
    asked: list[Sequences] = []
    fused = layers.fused_attention

    def recorded(*given: Any, **options: Any) -> Tensor:
        asked.append(given[4])
        return fused(*given, **options)

    monkeypatch.setattr(layers, "fused_attention", recorded)
    results = []
    for kernels in (reference, None):
        monkeypatch.setattr(dispatch, "attention", lambda *_, kernels=kernels: kernels)
        ours.zero_grad()
        logits = ours(**batch)
        logits.square().sum().backward()
        results.append([logits.detach(), *(each.grad.clone() for each in vectors_of(ours).values())])
    for packed, grid in zip(*results, strict=True):
        assert float((packed - grid).abs().max()) < 1e-5 * max(1.0, float(grid.abs().max()))
    tokens, longest = sum(LENGTHS) + len(LENGTHS) * VECTORS, max(LENGTHS) + VECTORS
    last = len(LENGTHS) if head in ("sequence_classification", "multiple_choice") else sum(LENGTHS)
    expected = [(tokens, queries, longest) for queries in (sum(LENGTHS), sum(LENGTHS), last)]
    assert [(each.tokens, each.queries, each.longest) for each in asked] == expected


@pytest.mark.usefixtures("_fused")
@pytest.mark.parametrize(("kind", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
def test_the_cpu_kernel_asks_prefixes_as_the_grid_does(
    kind: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    config.hidden_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 2 * cpu.LANES, 0.0, 0.0
    model = architecture_of(config).build("token_classification", config, False).eval()
    adaptation("prefix").apply(model, NOTHING_LOADED)
    model, batch, chosen = model.to(kind), pack(*padded(config)), []
    choose = dispatch.attention
    results = []
    for plain in (False, True):
        answer = (lambda *_: None) if plain else (lambda *given: chosen.append(choose(*given)) or chosen[-1])
        monkeypatch.setattr(dispatch, "attention", answer)
        model.zero_grad()
        logits = model(**batch)
        logits.square().sum().backward()
        results.append([logits.detach(), *(each.grad.float() for each in vectors_of(model).values())])  # type: ignore[union-attr]
    assert chosen == [cpu] * config.num_hidden_layers
    for packed, grid in zip(*results, strict=True):
        assert float((packed - grid).abs().max()) < bound * max(1.0, float(grid.abs().max()))


def test_frozen_weights_come_back_rounded_from_half_precision_and_trained_ones_do_not() -> None:
    _, ours = both("bert", "sequence_classification")
    adaptation("prompt").apply(ours, NOTHING_LOADED)
    weights = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    rounded = {
        name: each if ours.get_parameter(name).requires_grad else each.bfloat16() for name, each in weights.items()
    }
    compare_weights(ours, weights)
    compare_weights(ours, rounded)
    for name in ("bert.embeddings.word_embeddings.prompt.weight", "bert.pooler.dense.weight"):
        other = {**rounded, name: rounded[name] * 1.01}
        with pytest.raises(UserError, match=rf"{name}, as read back, is not what was trained"):
            compare_weights(ours, other)


@pytest.mark.parametrize("lengths", [(2, 3, 1), (4, 4)])
def test_keys_behind_a_prefix(lengths: tuple[int, ...]) -> None:
    tokens = sum(lengths)
    packing = Packing.from_lengths(torch.tensor(lengths), tokens, max(lengths), 2)
    states = torch.arange(1.0, tokens + 1).double()[:, None].expand(-1, 3).contiguous().requires_grad_()
    prefix = -torch.arange(1.0, 3).double()[:, None].expand(-1, 3).contiguous().requires_grad_()
    packed = packing.behind(states, prefix)
    rows = [torch.cat((prefix, part)) for part in states.split(lengths)]
    assert torch.equal(packed, torch.cat(rows))
    asking = packing.asking(torch.tensor([1, 2]))
    assert asking.lengths.tolist() == [length + 2 for length in lengths]
    assert asking.query_lengths.tolist() == ([1, 1, 0] if lengths[0] == 2 else [2, 0])
    assert torch.autograd.gradcheck(packing.behind, (states, prefix))


def test_a_prompt_beside_new_word_embeddings_is_refused() -> None:
    _, ours = both("bert", "sequence_classification")
    name = "bert.embeddings.word_embeddings.weight"
    grown = LoadReport((), (), (), "bert.", (Reshaped(name, (90, 32), (97, 32), 90),))
    with pytest.raises(UserError, match=r"adapter.method: 'prompt' is not allowed; base lacks tokens of the tokenizer"):
        adaptation("prompt").apply(ours, grown)


def test_no_other_model_has_a_prefix() -> None:
    """What a run without adapters computes has no trace of it."""
    _, ours = both("bert", "sequence_classification")
    assert all(module.prefix is None for module in ours.modules() if isinstance(module, BertSelfAttention))
    assert all(module.prefix_length == 0 for module in ours.modules() if isinstance(module, BertModel))
