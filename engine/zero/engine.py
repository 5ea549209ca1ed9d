"""DeepSpeed: start the ranks, wrap a model in a ZeRO engine, step it. The only caller of deepspeed.initialize."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import dist
from engine.optim.build import RATE_MULTIPLIER
from engine.optim.fused import FusedOptimizer
from engine.optim.layout import ParameterNorms
from engine.zero import states
from engine.zero.attach import attach
from engine.zero.nvme import with_swap_folder
from engine.zero.partition import shards
from engine.zero.quiet import without_compiler
from engine.zero.swap import mend_gradients


class ZeroEngine:
    """A model sharded by DeepSpeed ZeRO, with the few verbs that the loop needs.

    Attributes:
        model: the DeepSpeed engine, callable as the model.
        accumulation: micro-batches of an optimizer step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        import deepspeed

        share = min(1.0, dist.local_size(os.environ) / torch.distributed.get_world_size())
        config = with_swap_folder(config, model, share)
        self.config = config
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.stage: int = config["zero_optimization"]["stage"]
        with without_compiler(), contextlib.redirect_stdout(io.StringIO()):  # its memory reports can't be turned off
            self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.stage == 0 and self.world_size == 1:
            # Without a partition DeepSpeed sends gradients even where there is nobody to send them to.
            self.model.enable_backward_allreduce = False
        #: whether optimizer states are in files between steps
        self.is_swapped = bool(getattr(self.model.optimizer, "swap_optimizer", False))
        if self.stage == 3 and getattr(self.model.optimizer, "offload_optimizer", False):
            mend_gradients(self.model.optimizer)
        self._plain_norm: Tensor | None = None
        self._rate = 0.0
        self._forget_initial_step(optimizer)
        self.fused = optimizer if isinstance(optimizer, FusedOptimizer) else None
        if self.fused is not None:
            attach(self.fused, self.model)

    def _forget_initial_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the step that DeepSpeed takes while it initialises stage 0 in half precision (rate 0, but counted)."""
        if self.stage == 0 and self.model.optimizer is not optimizer:
            optimizer.state.clear()

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def world_size(self) -> int:
        return int(self.model.world_size)

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
            if self._reports_no_norm and not self._clips_itself:
                gradients = [p.grad for p in self.model.module.parameters() if p.grad is not None]
                self._plain_norm = torch.nn.utils.get_total_norm(gradients)
        self.model.step()

    @property
    def _reports_no_norm(self) -> bool:
        """DeepSpeed wraps no optimizer at stage 0 in fp32, and so reports no gradient norm."""
        return self.stage == 0 and not hasattr(self.model.optimizer, "loss_scale")

    def grad_norm(self) -> float | None:
        """The global gradient norm of the last update, before clipping; waits for the device."""
        if self._clips_itself:
            norm = self.model.optimizer.grad_norm
        else:
            norm = self._plain_norm if self._reports_no_norm else self.model.get_global_grad_norm()
        return None if norm is None else float(norm)

    def norms(self) -> dict[str, ParameterNorms]:
        """What the last observed update measured, by parameter; waits for the device."""
        found = {} if self.fused is None else self.fused.observed
        read = {
            name: (float(one.weight), self._rate * float(one.update), float(one.ratio)) for name, one in found.items()
        }
        found.clear()
        return {name: ParameterNorms(*values) for name, values in read.items()}

    @property
    def _clips_itself(self) -> bool:
        """The fused optimizers at stage 0 in fp32 know the norm that they clip by."""
        return (
            self.model.optimizer is self.fused and self.fused is not None and self.fused.defaults["max_grad_norm"] > 0
        )

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because fp16 gradients overflowed."""
        return int(self.model.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """fp16's current loss scale; None in other precisions."""
        return float(self.model.optimizer.loss_scale) if self.model.fp16_enabled() else None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in evaluation mode without gradients; training mode afterwards."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's fp32 weights on the CPU of rank 0, empty on other ranks; collective.

        Taken from the optimizer's fp32 master weights where ZeRO keeps them, so half-precision rounding doesn't
        enter an export. Tied parameters appear under each of their names.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        keep = torch.distributed.get_rank() == 0
        whole = {shard.parameters[0].name: shard.tensor for shard in shards(self.model)} if self.stage == 0 else {}
        copies: dict[int, Tensor] = states.swapped_weights(self.model, keep=keep)
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in copies:
                master = safe_get_full_fp32_param(parameter) if self.stage > 0 else whole.get(name)
                frozen = states.gathered(parameter) if master is None else contextlib.nullcontext()
                with frozen:
                    full = parameter if master is None else master
                    copies[id(parameter)] = full.detach().float().cpu().clone() if keep else torch.empty(0)
            if keep:
                weights[name] = copies[id(parameter)]
        return weights

    def save_states(self, folder: Path) -> None:
        """Write weights, optimizer state and counters into an empty folder; collective."""
        states.save(self.model, folder)

    def load_states(self, folder: Path) -> None:
        """Put back what `save_states` wrote at any stage and number of ranks; collective.

        Raises:
            UserError: on every rank, if on any the files don't fit the model, are damaged or missing.
        """
        states.load(self.model, folder)
