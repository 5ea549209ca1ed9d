"""DeepSpeed: start the ranks, wrap a model in a ZeRO engine, step it. The only caller of deepspeed.initialize."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import dist
from engine.optim.average import Average, exchange
from engine.optim.build import RATE_MULTIPLIER
from engine.optim.fused import FusedOptimizer
from engine.optim.layout import ParameterNorms
from engine.optim.start_decay import StartDecay
from engine.zero import states
from engine.zero.nvme import with_swap_folder
from engine.zero.quiet import without_compiler
from engine.zero.wrappers.base import Wrapper
from engine.zero.wrappers.known import wrapper_of


class ZeroEngine:
    """A model sharded by DeepSpeed ZeRO, with the few verbs that the loop needs.

    Attributes:
        model: the DeepSpeed engine, callable as the model.
        wrapper: the adapter to its optimizer.
        accumulation: forward and backward passes of an optimizer step.
        base: names of frozen parameters that every start of the run has already.
        start_decay: decay towards the weights of the start; None for none.
    """

    start_decay: StartDecay | None = None
    _averages = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        base: Collection[str] = (),
        passes: int = 1,
    ) -> None:
        """
        Args:
            passes: forward and backward passes of a micro-batch, each of which is one to DeepSpeed.
        """
        import deepspeed

        share = min(1.0, dist.local_size(os.environ) / torch.distributed.get_world_size())
        config = with_swap_folder(config, model, share)
        if passes > 1:
            counts = ("gradient_accumulation_steps", "train_batch_size")
            config = config | {name: passes * config[name] for name in counts}
        self.config, self.base = config, base
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.stage: int = config["zero_optimization"]["stage"]
        with without_compiler(), contextlib.redirect_stdout(io.StringIO()):  # its memory reports can't be turned off
            self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._rate = 0.0
        self.wrapper = wrapper_of(self.model)
        self.wrapper.repair()
        self.fused = optimizer if isinstance(optimizer, FusedOptimizer) else None
        if self.fused is not None:
            attach(self.fused, self.wrapper)

    @property
    def is_swapped(self) -> bool:
        """Whether optimizer states are in files between steps."""
        return self.wrapper.is_swapped

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def world_size(self) -> int:
        return int(self.model.world_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run so far, also those that changed nothing; one less inside of a step."""
        return int(self.model.global_steps)

    def decay_to_start(self, pretrained: Mapping[str, int], decay: float) -> int:
        """Decay towards the present weights in each step (see `StartDecay`): how many elements of this rank."""
        self.start_decay = StartDecay(self.wrapper.shards(), pretrained, decay)
        self.wrapper.client.register_step_pre_hook(self.start_decay)
        return self.start_decay.elements

    def keep_average(self, decay: float) -> None:
        """Keep a moving average of the weights (see `Average`), which is what is evaluated and exported."""
        average = Average(decay, lambda: self.steps - self.skipped_steps)
        self.wrapper.client.register_step_post_hook(average)
        self._averages = True

    def backward(self, loss_share: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the global batch's loss.

        DeepSpeed divides by the accumulation steps here and by the ranks when it reduces; a share is already
        divided by the global batch, so both divisions are undone.
        """
        self.model.backward(loss_share * (self.accumulation * self.world_size))

    def step(self, learning_rate: float, *, last_micro_batch: bool, observe: bool = False) -> None:
        """Step after a micro-batch; after the last one of the global batch, update the weights.

        The learning rate is multiplied by the rate multiplier of each parameter group.

        With `observe` the update's norms are kept for `norms`, if the optimizer is one of ours.
        """
        if self.fused is not None:
            self.fused.observing = observe
            self.fused.loss_scale = self.loss_scale
        if last_micro_batch:
            self._rate = learning_rate
            for group in self.model.optimizer.param_groups:
                group["lr"] = learning_rate * group.get(RATE_MULTIPLIER, 1.0)
            self.wrapper.before_update()
        self.model.step()

    def grad_norm(self) -> float | None:
        """The global gradient norm of the last update, before clipping; waits for the device."""
        norm = self.wrapper.grad_norm()
        return None if norm is None else float(norm)

    def norms(self) -> dict[str, ParameterNorms]:
        """What the last observed update measured, by parameter; waits for the device."""
        observed = {} if self.fused is None else self.fused.observed
        read = {
            name: (float(norm.weight), self._rate * float(norm.update), float(norm.ratio))
            for name, norm in observed.items()
        }
        observed.clear()
        return {name: ParameterNorms(*values) for name, values in read.items()}

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because fp16 gradients overflowed."""
        return int(self.model.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """fp16's current loss scale; None in other precisions."""
        return self.wrapper.loss_scale

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in evaluation mode without gradients, with averages for weights where there are some; training mode
        and the weights, bit by bit, afterwards; collective."""
        self.model.eval()
        try:
            with torch.no_grad(), self._averaged(rounded=True):
                yield self.model
        finally:
            self.model.train()

    @contextlib.contextmanager
    def _averaged(self, *, rounded: bool) -> Iterator[None]:
        """Inside, the optimizer's weights are the averages, where there are some; collective if `rounded`.

        Args:
            rounded: whether the model's own weights are, too. After an exception they are left as they were inside: a
                rank that fails alone must not wait for the others, and what is then saved are the optimizer's.
        """
        shards = self.wrapper.shards() if self._averages else []
        found = exchange(shards, self.wrapper.client)
        try:
            if found and rounded:
                self.wrapper.round_weights(shards)
            yield
        finally:
            exchange(shards, self.wrapper.client)
        if found and rounded:
            self.wrapper.round_weights(shards)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's fp32 weights, or their averages, on the CPU of rank 0, empty on other ranks; collective.

        Taken from the optimizer's fp32 master weights where ZeRO keeps them, so half-precision rounding doesn't
        enter an export. Tied parameters appear under each of their names.
        """
        keep = torch.distributed.get_rank() == 0
        with self._averaged(rounded=False):
            weights = self.wrapper.full_weights(keep=keep)
        named = self.model.module.named_parameters(remove_duplicate=False)
        return {name: weights[id(parameter)] for name, parameter in named} if keep else {}

    def load_states(self, folder: Path) -> None:
        """Put back what `states.snapshot` took at any stage and number of ranks; collective.

        Raises:
            UserError: on every rank, if on any the files don't fit the model, are damaged or missing.
        """
        states.load(self.wrapper, folder)


def attach(optimizer: FusedOptimizer, wrapper: Wrapper) -> None:
    """Tell the optimizer what its tensors consist of, and fold unscaling and clipping into its step.

    Raises:
        UserError: the layout is unsupported or unknown.
    """
    optimizer.lay_out(wrapper.shards())
    wrapper.take_clipping(optimizer)
