"""Stage 0: no optimizer of DeepSpeed's in fp32, and one with an fp32 master of each parameter in half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.kernels.dispatch import reads_half
from engine.optim.fused import FusedOptimizer
from engine.optim.shard import Fragment, Shard
from engine.zero.wrappers.base import Wrapper
from engine.zero.wrappers.pieces import MismatchError, attribute, info_of, pairs, stepped


class WholeWrapper(Wrapper):
    """Stage 0: the tensors that the optimizer steps are of whole parameters."""

    def repair(self) -> None:
        """DeepSpeed sends gradients even where there is nobody to send them to."""
        if self.engine.world_size == 1:
            self.engine.enable_backward_allreduce = False


class NoWrapper(WholeWrapper):
    """fp32, where DeepSpeed steps the client optimizer itself, on the model's own parameters, and knows no norm."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._norm: Tensor | None = None

    @property
    def client(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        return [
            _whole(p, p, index, names)
            for index, group in enumerate(self.optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad and p.numel() > 0
        ]

    @contextmanager
    def full_weight(self, parameter: Tensor) -> Iterator[Tensor]:
        yield parameter

    def gradients(self, shards: Sequence[Shard]) -> Sequence[Tensor | None]:
        return [shard.tensor.grad for shard in shards]

    def take_clipping(self, client: FusedOptimizer) -> None:
        """DeepSpeed would call torch's clip_grad_norm_: the optimizer's own clipping is fused."""
        client.defaults["max_grad_norm"] = self.engine.gradient_clipping()
        self.engine._config.gradient_clipping = 0.0

    @property
    def _client_knows_norm(self) -> bool:
        """Fused optimizers measure the norm that they clip by."""
        return isinstance(self.optimizer, FusedOptimizer) and self.optimizer.defaults["max_grad_norm"] > 0

    def before_update(self) -> None:
        if not self._client_knows_norm:
            self._norm = self._total_norm()

    def grad_norm(self) -> Tensor | float | None:
        norm: Tensor | float | None = self.optimizer.grad_norm if self._client_knows_norm else self._norm
        return norm

    def norm_in_step(self) -> float:
        return float(self._total_norm())

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @property
    def overflowed(self) -> bool:
        return False


class HalfPrecisionWrapper(WholeWrapper):
    """`FP16_UnfusedOptimizer`, for bf16 and fp16."""

    @property
    def scaler(self) -> Any:
        return self.optimizer.loss_scale_config if self.engine.fp16_enabled() else None

    def repair(self) -> None:
        """DeepSpeed takes a step while it initialises: at rate 0, but counted."""
        super().repair()
        self.client.state.clear()

    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        shards = []
        for index, (group, params) in enumerate(
            pairs(stepped(self.optimizer), attribute(self.optimizer, "fp16_groups"))
        ):
            shards += [_whole(master, p, index, names) for master, p in pairs(group, params)]
        return shards

    def round_weights(self, shards: Sequence[Shard]) -> None:
        for master, weight in self._masters_and_weights():
            weight.data.copy_(master.data)

    @contextmanager
    def full_weight(self, parameter: Tensor) -> Iterator[Tensor]:
        yield next((master for master, weight in self._masters_and_weights() if weight is parameter), parameter)

    def _masters_and_weights(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True)
        return [pair for masters, weights in groups for pair in zip(masters, weights, strict=True)]

    def take_clipping(self, client: FusedOptimizer) -> None:
        super().take_clipping(client)
        if self._steps_directly():
            self._step_directly(client)

    def _steps_directly(self) -> bool:
        """In bf16, with kernels for it and a release of DeepSpeed whose wrapper has what the step needs."""
        if not hasattr(self.optimizer, "_skip_invalid_grad_norm"):
            return False
        weights = [weight for _, weight in self._masters_and_weights()]
        reads = bool(weights) and reads_half(weights[0].device)
        return reads and all(weight.dtype == torch.bfloat16 for weight in weights)

    def _step_directly(self, client: FusedOptimizer) -> None:
        """The step reads bf16 gradients and writes bf16 weights, for which DeepSpeed makes five passes of its own.

        Those are a look for overflow, the norm, fp32 gradients, their scaling, and the copy of the weights. The norm is
        summed otherwise than DeepSpeed's, so the factor of clipping may differ in its last bits.
        """
        optimizer = self.optimizer
        client.low_precision = {id(master): weight for master, weight in self._masters_and_weights()}

        def step(closure: None = None) -> bool:
            norm = client.gradient_norm()
            value = float(norm)  # the step's one wait for the device
            optimizer.overflow = not math.isfinite(value)
            if optimizer.overflow:
                skipped: bool = optimizer._skip_invalid_grad_norm()
                return skipped
            optimizer._global_grad_norm = value
            optimizer._update_scale(False)
            optimizer.unscale_and_clip_grads(norm.double())
            client.step()
            return False

        optimizer.step = step


def _whole(tensor: Tensor, parameter: Tensor, group: int, names: dict[int, str]) -> Shard:
    if tensor.shape != parameter.shape:
        raise MismatchError(f"a master of {list(tensor.shape)} for a parameter of {list(parameter.shape)}")
    info = info_of(parameter, parameter.shape, names)
    return Shard(tensor, group, (info,), (Fragment(0, 0, info.numel, 0),), None)
