"""FGM and FreeLB: losses and gradients of every task are those of the papers' steps with transformers' model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.config import AdapterConfig, RegulariseConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.tasks.finetune import FineTuning
from engine.tasks.regularised.noise import Noised, next_noise, words_of
from engine.tasks.task import StepOutput
from tests.model.test_task_heads import CONFIGS, both
from tests.tasks.regularised.plain import (
    TASKS_OF_LOGITS,
    global_batch,
    make,
    same_gradients,
    their_logits,
    their_loss,
    theirs_of,
    wide,
)

NORM, RATE, STEPS = 2.0, 0.7, 3
FGM = RegulariseConfig(adversarial="fgm", adversarial_norm=NORM)
FREELB = RegulariseConfig(adversarial="freelb", adversarial_norm=NORM, adversarial_rate=RATE, adversarial_steps=STEPS)
BOUND = 1e-5


def train_passes(task: FineTuning, model: nn.Module, batches: Iterator[MicroBatch]) -> list[StepOutput]:
    """Forward and backward passes as the loop makes them."""
    outputs = []
    for batch in task.ahead(model, batches):
        outputs.append(task.step(model, batch))
        outputs[-1].loss.backward()
    return outputs


def their_passes(task: FineTuning, theirs: nn.Module, batch: MicroBatch, seed: int) -> list[float]:
    """The loss under the noise of each pass, with gradients of all of them left in the parameters."""
    chosen, lengths = task.config.regularise, batch.inputs["lengths"].tolist()
    size, found = (sum(lengths), task.model_config.hidden_size), []
    torch.manual_seed(seed)
    drawn = torch.zeros(size).uniform_(-1, 1) if chosen.adversarial == "freelb" else torch.zeros(size)
    noise = [NORM * part / part.numel() ** 0.5 for part in drawn.split(lengths)]
    count = 2 if chosen.adversarial == "fgm" else STEPS
    for _ in range(count):
        leaves = [part.detach().requires_grad_() for part in noise]
        loss = their_loss(task, their_logits(theirs, batch, lambda words, i, of=leaves: words + of[i]), batch)  # type: ignore[misc]
        (loss if chosen.adversarial == "fgm" else loss / count).backward()
        found.append(float(loss))
        noise = [_moved(chosen, leaf) for leaf in leaves]
    return found


def _moved(chosen: RegulariseConfig, leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    unit = leaf.grad / leaf.grad.norm()
    if chosen.adversarial == "fgm":
        return NORM * unit
    ahead = leaf.detach() + RATE * unit
    return ahead if ahead.norm() <= NORM else ahead * NORM / ahead.norm()


@pytest.mark.parametrize("regularise", [FGM, FREELB], ids=["fgm", "freelb"])
@pytest.mark.parametrize("name", TASKS_OF_LOGITS)
def test_losses_and_gradients_are_those_of_the_paper_with_transformers(
    tmp_path: Path, name: str, regularise: RegulariseConfig
) -> None:
    task = make(tmp_path, name, regularise)
    model, batch = wide(task), global_batch(task)
    theirs = theirs_of(task, model)
    torch.manual_seed(3)
    outputs = train_passes(task, model, iter([batch]))
    expected = their_passes(task, theirs, batch, 3)
    whole = sum(expected) if regularise is FGM else sum(expected) / STEPS
    assert len(outputs) == task.passes == len(expected)
    assert sum(float(one.loss) for one in outputs) == pytest.approx(whole, rel=BOUND)
    assert float(outputs[-1].metrics["adversarial_loss"]) == pytest.approx(expected[-1], rel=BOUND)
    assert expected[-1] > expected[0] * 1.001, "the noise raises the loss"
    same_gradients(model, theirs, BOUND)


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_shares_do_not_depend_on_the_micro_batch(tmp_path: Path, micro_batch: int) -> None:
    task = make(tmp_path, "sequence_classification", FGM)
    model = wide(task)
    found: list[tuple[list[float], list[Tensor]]] = []
    for size in (8, micro_batch):
        model.zero_grad()
        parts = islice(training_batches(task.train_source(), BatchLayout(8, size), Cursor(), workers=0), 8 // size)
        outputs = train_passes(task, model, parts)
        names = ("accuracy", "adversarial_loss")
        sums = [sum(float(one.metrics.get(name, 0.0)) for one in outputs) for name in names]
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append(([sum(float(one.loss) for one in outputs), *sums], gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=BOUND)
    largest = max(float(gradient.abs().max()) for gradient in found[0][1])
    for first, second in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=BOUND * largest)


def test_all_passes_have_the_same_dropout(tmp_path: Path) -> None:
    task = make(tmp_path, "sequence_classification", RegulariseConfig(adversarial="fgm", adversarial_norm=1e-30))
    clean, noised = train_passes(task, task.build_model().train(), iter([global_batch(task)]))
    assert clean.loss.item() == noised.loss.item()
    other, _ = train_passes(task, task.build_model().train(), iter([global_batch(task)]))
    assert other.loss.item() != clean.loss.item()


@pytest.mark.parametrize("trained", [{"adapter": AdapterConfig(method="lora", rank=2)}, {"frozen": "embeddings"}])
def test_what_is_frozen_has_noise_in_front_and_no_gradient(tmp_path: Path, trained: dict[str, object]) -> None:
    parts = dict(trained)
    frozen = parts.pop("frozen", None)
    task = make(tmp_path, "sequence_classification", FGM, **parts)
    task.config.train.freeze = frozen  # type: ignore[assignment]
    model, batch = task.build_model().eval(), global_batch(task)
    outputs = train_passes(task, model, iter([batch]))
    theirs = theirs_of(make(tmp_path, "sequence_classification", FGM), base(model))
    expected = their_passes(task, theirs, batch, 0)
    assert [float(one.loss) for one in outputs] == pytest.approx(expected, rel=BOUND)
    words = words_of(task, model)
    assert words.weight.grad is None
    assert not words.weight.requires_grad


def base(model: nn.Module) -> nn.Module:
    """A holder of the model's weights under the base's names; LoRA adds nothing yet."""
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora" not in name}
    holder = nn.Module()
    holder.state_dict = lambda: state  # type: ignore[method-assign, assignment]
    return holder


def test_a_model_in_bf16_has_noise_in_fp32(tmp_path: Path) -> None:
    task = make(tmp_path, "sequence_classification", FREELB)
    model, found = wide(task), []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        outputs = train_passes(task, model.to(precision), iter([global_batch(task)]))
        found.append([float(one.loss) for one in outputs])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    assert found[1][0] < found[1][-1]
    first = next(task.ahead(model, iter([global_batch(task)])))
    assert isinstance(first, Noised)
    assert first.noise is not None
    assert first.noise.dtype == torch.float32


def test_a_micro_batch_that_nobody_looked_at_before_is_in_its_first_pass(tmp_path: Path) -> None:
    """As where it is tried whether one fits in memory."""
    plain, task = (make(tmp_path, "regression", chosen) for chosen in (RegulariseConfig(), FGM))
    model = wide(task)
    alone, own = (one.step(model, global_batch(one)) for one in (task, plain))
    assert (alone.loss.item(), alone.metrics) == (own.loss.item(), own.metrics)


def test_the_operations_of_all_passes_are_counted(tmp_path: Path) -> None:
    name = "sequence_classification"
    plain, fgm, freelb = (make(tmp_path, name, chosen) for chosen in (RegulariseConfig(), FGM, FREELB))
    batch = global_batch(plain)
    assert fgm.flops(batch) == 2 * plain.flops(batch)
    assert freelb.flops(batch) == STEPS * plain.flops(batch)
    adapter = AdapterConfig(method="lora", rank=2)
    plain, fgm = (make(tmp_path, name, chosen, adapter=adapter) for chosen in (RegulariseConfig(), FGM))
    assert 2 * plain.flops(batch) < fgm.flops(batch) < 3 * plain.flops(batch)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_has_its_words_found(architecture: str, tmp_path: Path) -> None:
    theirs, ours = both(architecture, "sequence_classification")
    task = make(tmp_path, "regression", RegulariseConfig())
    task.model_config = ours.config
    assert words_of(task, ours).weight is ours.get_parameter(
        next(name for name, own in theirs.named_parameters() if own is theirs.get_input_embeddings().weight)
    )


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_a_direction_moves_nothing(gradient: float) -> None:
    lengths, noise = torch.tensor([2, 1]), torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.1, 0.2]])
    gradients = torch.tensor([[gradient, gradient], [0.0, 0.0], [3.0, 4.0]])
    moved = next_noise(FREELB, noise, gradients, lengths)
    torch.testing.assert_close(moved[:2], noise[:2])
    torch.testing.assert_close(moved[2], noise[2] + RATE * torch.tensor([0.6, 0.8]))
    fgm: Sequence[float] = next_noise(FGM, noise, gradients, lengths).flatten().tolist()
    assert fgm == pytest.approx([0.0] * 4 + [NORM * 0.6, NORM * 0.8])
