"""What the engine asks of each class that DeepSpeed may wrap a client optimizer in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.optim.fused import FusedOptimizer
from engine.optim.shard import Shard
from engine.zero.wrappers.pieces import MismatchError, check_fragments, check_tensor

#: the release whose layouts tests/zero/test_partition.py compares with the model's parameters
TESTED_DEEPSPEED = "0.19.8"


class Wrapper(ABC):
    """Adapter to one class of wrapper; what is defined here holds for most of them.

    Attributes:
        engine: what `deepspeed.initialize` returned for a client optimizer.
        optimizer: DeepSpeed's, which wraps the client's.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    @property
    def client(self) -> torch.optim.Optimizer:
        """The optimizer that `deepspeed.initialize` was given."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    @property
    def is_swapped(self) -> bool:
        """Whether optimizer states are in files between steps."""
        return False

    @property
    def scaler(self) -> Any:
        """fp16's loss scaler, None in other precisions."""
        return self.optimizer.loss_scaler if self.engine.fp16_enabled() else None

    @property
    def loss_scale(self) -> float | None:
        """What fp16 multiplies the next loss by; None in other precisions."""
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else None

    @property
    def reductions(self) -> list[tuple[Any, str]]:
        """The methods, each as its owner and name, in which DeepSpeed reduces gradients."""
        return [(self.engine, "allreduce_gradients")]

    def repair(self) -> None:
        """Undo or mend, right after `deepspeed.initialize`, what DeepSpeed does wrong."""
        return

    def shards(self) -> list[Shard]:
        """The tensors that one optimizer step updates, each exactly once, in the order of the updates.

        Frozen parameters are in no shard; parameters without a gradient are, since ZeRO fills theirs with zeros. Every
        rank gets as many shards, in the same order. Valid until the engine moves its states (`offload_states`).

        Raises:
            UserError: the layout is unsupported or unknown.
        """
        names = {id(p): name for name, p in self.engine.module.named_parameters()}
        try:
            shards = self.read_shards(names)
            for shard in shards:
                check_tensor(shard.tensor)
                check_fragments(shard.fragments, shard.parameters, shard.numel)
        except MismatchError as mismatch:
            raise UserError(
                f"deepspeed: the tensors of {described(self.optimizer)} are laid out in an unknown way ({mismatch}); "
                f"install deepspeed {TESTED_DEEPSPEED}, whose layouts are tested"
            ) from mismatch
        return shards

    @abstractmethod
    def read_shards(self, names: dict[int, str]) -> list[Shard]:
        """`shards` from DeepSpeed's own records, not yet checked.

        Args:
            names: of the model's parameters, by `id`.

        Raises:
            MismatchError: the records contradict each other.
            UserError: the layout is unsupported.
        """

    def gradients(self, shards: Sequence[Shard]) -> Sequence[Tensor | None] | None:
        """The gradient of each shard after the last backward pass, as the ranks reduced it.

        None if they exist only during the step; they are then there when it calls `unscale_and_clip_grads`.
        """
        return None

    def round_weights(self, shards: Sequence[Shard]) -> None:
        """Round changed fp32 weights into the model's own parameters, as a step does; collective."""
        return

    def full_weights(self, *, keep: bool) -> dict[int, Tensor]:
        """The whole fp32 weights of every parameter, by its `id`, on the CPU; collective.

        Args:
            keep: whether this rank wants them; else they are empty.
        """
        weights = self.swapped_weights(keep=keep)
        for parameter in self.engine.module.parameters():
            if id(parameter) not in weights:
                with self.full_weight(parameter) as full:
                    weights[id(parameter)] = full.detach().float().cpu().clone() if keep else torch.empty(0)
        return weights

    def swapped_weights(self, *, keep: bool) -> dict[int, Tensor]:
        """Those of `full_weights` that are in files between steps."""
        return {}

    @contextmanager
    def full_weight(self, parameter: Tensor) -> Iterator[Tensor]:
        """A parameter's whole fp32 weights, or a frozen one as it is; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        with self.gathered(parameter) if master is None else nullcontext():
            yield parameter if master is None else master

    def gathered(self, parameter: Any, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """Inside, the model's own parameter is whole; collective.

        Args:
            modifier_rank: the rank whose changes to it all ranks get; None if there are none.
        """
        return nullcontext()

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return tuple(parameter.shape)

    def before_update(self) -> None:
        """Measure what `grad_norm` needs of the gradients that the update will consume."""
        return

    def grad_norm(self) -> Tensor | float | None:
        """The global gradient norm of the last update, unscaled, before clipping."""
        norm: Tensor | float | None = self.engine.get_global_grad_norm()
        return norm

    def norm_in_step(self) -> float:
        """The global gradient norm as the client's `step` begins, the same on every rank; waits for the device.

        DeepSpeed's -1 stands for one that is no number.
        """
        norm = self.optimizer._global_grad_norm
        return 0.0 if norm is None else float(norm)

    @property
    def overflowed(self) -> bool:
        """Whether DeepSpeed left the last update out, for a gradient that is not finite."""
        return bool(self.optimizer.overflow)

    def take_clipping(self, client: FusedOptimizer) -> None:
        """Let the client's step unscale and clip the gradients, by the factor that DeepSpeed would multiply them by.

        ZeRO 1 to 3, and stage 0 in half precision, call `unscale_and_clip_grads` before each step. Its arguments differ
        over the wrappers; the norm, times the loss scale, is the last one of each. By then DeepSpeed may have raised
        the loss scale: gradients are divided by the one that the loss was multiplied by.
        """
        optimizer = self.optimizer
        handed: list[Tensor | float] = [1.0]

        def hand_over(*arguments: Any, apply_scale: bool = True) -> Tensor | float:
            loss_scale = optimizer.loss_scale if client.loss_scale is None else client.loss_scale
            combined: Tensor | float = loss_scale
            if optimizer.clip_grad > 0.0:
                norm = own_precision(arguments[-1])
                combined = (((norm / loss_scale) + 1e-6) / optimizer.clip_grad).clamp(min=1.0) * loss_scale
            handed[0] = 1.0 / combined
            return combined

        optimizer.unscale_and_clip_grads = hand_over
        client.scale = lambda: handed[0]


def described(optimizer: Any) -> str:
    """The class of DeepSpeed's wrapper and the release, for a message."""
    return f"{type(optimizer).__name__} of DeepSpeed {metadata.version('deepspeed')}"


def own_precision(norm: Tensor | float) -> Tensor:
    """The norm as a tensor that isn't rounded yet: the factor is rounded once, as `mul_` would."""
    return norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
