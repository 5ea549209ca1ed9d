"""AdamW and LAMB whose step is one pass over memory: unscale, clip, moments, decay, update, low-precision copy.

Whole parameters of a group are updated in one call, in place: on CPUs through a table of addresses, elsewhere as one
flat tensor, for which the first step moves them next to each other in memory. ZeRO's flat tensors, once
`engine.zero.engine` has told which fragments of which parameters they consist of, are updated fragment by fragment,
each with the trust ratio of the whole parameter that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels import ops, reference
from engine.kernels.dispatch import tensor_lists
from engine.kernels.segments import Buffer, Segments
from engine.kernels.terms import Adam, Trust
from engine.optim.build import RATE_MULTIPLIER
from engine.optim.layout import FlatLayout, Norms
from engine.optim.shard import Shard


@dataclass(frozen=True)
class _Bucket:
    """Tensors of a parameter group that one call updates: they agree in dtypes, device and step."""

    group: dict[str, Any]
    step: int
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    copies: list[Tensor]
    """bf16 or fp16 copies of the weights that the step refreshes; empty for none"""

    @property
    def adam(self) -> Adam:
        group, (beta1, beta2) = self.group, self.group["betas"]
        return Adam(float(group["lr"]), beta1, beta2, group["eps"], self.step, group["bias_correction"])


class FusedOptimizer(torch.optim.Optimizer):
    """The base of AdamW and LAMB. State per parameter: step, exp_avg, exp_avg_sq, as in torch's AdamW.

    A bf16 or fp16 parameter also gets `master`, its fp32 weights; the parameter is then the copy of them that the
    same pass refreshes. Moments are always fp32.

    Attributes:
        nonfinite: [] int32 tensor after a step, 1 if a gradient was infinite or NaN. Such elements are not updated;
            with clipping on (where the norm is then not finite either) no element is.
        grad_norm: [] fp32 tensor after a step with clipping on: norm of the unscaled gradients before clipping.
        scale: factor of the gradients in the next steps, applied once per tensor: DeepSpeed's unscaling and clipping,
            which would otherwise be a pass of their own.
        loss_scale: factor of the loss of the next step; None where only DeepSpeed knows it.
        applied: [] fp32 tensor after a step: what the gradients were multiplied by.
        low_precision: id of an fp32 parameter -> the bf16 weight that the model has in its place. The gradient is read
            from that weight, and the step refreshes it.
        observing: while true, steps keep the norms of every parameter and of its update in `observed`.
        observed: norms by the parameter's name. Under ZeRO every rank has those of its process group's parameters.
    """

    nonfinite: Tensor
    grad_norm: Tensor
    applied: Tensor

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        beta1, beta2 = defaults["betas"]
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f"betas: {defaults['betas']} are not two numbers in [0, 1)")
        for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
            if not defaults[name] >= 0.0:
                raise ValueError(f"{name}: {defaults[name]} is not a number of at least 0")
        super().__init__(params, defaults)
        self._segments: dict[Any, Segments] = {}
        self._layouts: dict[int, FlatLayout] = {}
        self._names: dict[int, str] = {}
        self.low_precision: dict[int, Tensor] = {}
        self.scale: Callable[[], Tensor | float] = lambda: 1.0
        self.loss_scale: float | None = None
        self.observing = False
        self.observed: dict[str, Norms] = {}

    def lay_out(self, shards: Sequence[Shard]) -> None:
        """Set which fragments each tensor consists of; tensors that are not mentioned are whole parameters."""
        self._layouts = {id(shard.tensor): FlatLayout(shard) for shard in shards if not shard.is_whole}
        self._names = {id(shard.tensor): shard.parameters[0].name for shard in shards if shard.is_whole}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | float | None = None
    ) -> float | None:
        """One step over every parameter with a gradient.

        Args:
            closure: computes the loss again, and its gradients.
            grad_scale: factor of the gradients, 1 / loss scale; None takes `scale`.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
        if buckets:
            device = buckets[0].params[0].device
            factor = self.scale() if grad_scale is None else grad_scale
            self.applied = scale = self._clip(buckets, _scalar(factor, device))
            flags = [self._update(bucket, scale.to(bucket.params[0].device)) for bucket in buckets]
            self.nonfinite = torch.stack([flag.to(device) for flag in flags]).amax()
        return loss

    def _clip(self, buckets: list[_Bucket], scale: Tensor) -> Tensor:
        """The scale times the clipping factor; NaN, which prevents every update, if the norm is not finite."""
        limit = self.defaults["max_grad_norm"]
        if not limit:
            return scale
        assert not self._layouts, "the norm of a rank's pieces is not that of the parameters"
        norms = [self._norm_of(bucket.grads, self._table(bucket)).to(scale.device) for bucket in buckets]
        self.grad_norm = torch.stack(norms).norm() * scale
        factor = (limit / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return torch.where(self.grad_norm.isfinite(), scale * factor, math.nan)

    def _buckets(self, group: dict[str, Any]) -> list[_Bucket]:
        found: dict[Any, _Bucket] = {}
        numbers: dict[int, int] = {}
        counters: dict[int, Tensor] = {}
        for p in group["params"]:
            grad, low = self.gradient_of(p), self.low_precision.get(id(p))
            if grad is None:
                continue
            state = self._state_of(p)
            old = state["step"]
            if id(old) not in numbers:
                numbers[id(old)] = int(old) + 1
            number = numbers[id(old)]
            if number not in counters:  # parameters that step together share one counter, since reading one is slow
                counters[number] = old + 1.0
            state["step"] = counters[number]  # never in place: DeepSpeed may have aliased it over parameters
            alone = id(p) if id(p) in self._layouts else None
            key = (number, p.dtype, grad.dtype, p.device, alone)
            if key not in found:
                found[key] = _Bucket(group, number, [], [], [], [])
            bucket = found[key]
            bucket.params.append(p)
            bucket.grads.append(grad.contiguous())
            bucket.states.append(state)
            if low is not None or p.dtype != torch.float32:
                bucket.copies.append(p if low is None else low)
        return list(found.values())

    def gradient_of(self, p: Tensor) -> Tensor | None:
        """The gradient that the next step uses for a parameter; None if it has none and isn't stepped."""
        low = self.low_precision.get(id(p))
        if low is None:
            return p.grad
        # DeepSpeed also steps weights without a gradient, as if it were zero.
        return torch.zeros_like(low) if low.grad is None else low.grad

    def applied_gradient(self, p: Tensor) -> Tensor | None:
        """The gradient that the last step used for a parameter, fp32, unscaled and clipped."""
        grad = self.gradient_of(p)
        return None if grad is None else grad.float() * self.applied.to(grad.device)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """[] fp32, the L2 norm of all gradients, neither unscaled nor clipped; for whole parameters only."""
        assert not self._layouts, "the norm of a rank's pieces is not that of the parameters"
        grads = [self.gradient_of(p) for group in self.param_groups for p in group["params"]]
        given = [grad.contiguous() for grad in grads if grad is not None]
        return self._norm_of(given, self._whole(tuple(grad.numel() for grad in given), 0.0, given[0].device))

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=torch.float32)
        if p.dtype != torch.float32 and "master" not in state:
            state["master"] = p.detach().float()
        return state

    def _table(self, bucket: _Bucket) -> Segments:
        """The segments of whole parameters, one after the other."""
        sizes = tuple(p.numel() for p in bucket.params)
        return self._whole(sizes, bucket.group["weight_decay"], bucket.params[0].device)

    def _whole(self, sizes: tuple[int, ...], decay: float, device: torch.device) -> Segments:
        key = (sizes, decay, device)
        if key not in self._segments:
            offsets = [sum(sizes[:index]) for index in range(len(sizes))]
            self._segments[key] = Segments.build(offsets, sizes, [decay] * len(sizes), device=device)
        return self._segments[key]

    def _norm_of(self, grads: list[Tensor], table: Segments) -> Tensor:
        kernels = tensor_lists(grads[0].device)
        norm: Tensor = kernels.global_norm(grads, table) if kernels else ops.global_norm(adjoined(grads), table)
        return norm

    def _update(self, bucket: _Bucket, scale: Tensor) -> Tensor:
        """Update a bucket's tensors; returns the flag of non-finite gradients, [] int32."""
        layout = self._layouts.get(id(bucket.params[0]))
        if layout is not None:
            (p,), (state,) = bucket.params, bucket.states
            buffers = [t.view(-1) for t in (p.detach(), *bucket.grads, state["exp_avg"], state["exp_avg_sq"])]
            table = layout.segments(bucket.group["weight_decay"])
            return self._step_pieces(ops, [*buffers, None], table, layout, bucket, scale)
        return self._update_whole(bucket, scale)

    def _update_whole(self, bucket: _Bucket, scale: Tensor) -> Tensor:
        states = bucket.states
        own = bucket.params[0].dtype == torch.float32
        weights = bucket.params if own else [state["master"] for state in states]
        lists = [weights, bucket.grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
        buffers: list[Buffer | None] = [*lists, bucket.copies or None]
        kernels = tensor_lists(scale.device)
        if kernels is None:
            kernels = ops
            buffers = [None if members is None else adjoined(list(members)) for members in buffers]
        flag = self._step_pieces(kernels, buffers, self._table(bucket), None, bucket, scale)
        torch.autograd.graph.increment_version([*bucket.params, *bucket.copies])
        return flag

    def _step_pieces(
        self,
        kernels: Any,
        buffers: list[Buffer | None],
        table: Segments,
        layout: FlatLayout | None,
        bucket: _Bucket,
        scale: Tensor,
    ) -> Tensor:
        """One step over the segments of `table`: whole parameters or, with a `layout`, fragments of them."""
        arguments = (table, bucket.adam, scale)
        trust = self._trust(bucket.group)
        if not self.observing and trust is None:
            flag: Tensor = kernels.adamw_step_(*buffers, *arguments)
            return flag
        if not self.observing and layout is None:
            flag, _ = kernels.lamb_step_(*buffers, *arguments, trust)
            return flag
        *flats, copy = buffers
        flag, squares = kernels.lamb_moments_(*flats, *arguments)
        squares = squares if layout is None else layout.whole_squares(squares)
        ratio = torch.ones(len(squares), device=squares.device)
        if trust is not None:
            ratio = reference.trust_ratios(squares, torch.ones_like(ratio, dtype=torch.bool), trust)
        if self.observing:
            names = [self._names.get(id(p), "") for p in bucket.params] if layout is None else layout.names
            rows = _rows(squares, ratio, bucket.group.get(RATE_MULTIPLIER, 1.0))
            self.observed |= {name: Norms(*row) for name, row in zip(names, rows, strict=True)}
        ratio = ratio if layout is None else ratio[layout.owner]
        kernels.lamb_apply_(*flats, copy, *arguments, ratio, flag)
        return flag

    def _trust(self, group: dict[str, Any]) -> Trust | None:
        """How the group's updates are scaled by trust ratios (LAMB); None if they are not."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts the state to the dtype of each parameter; here it stays fp32."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name in ("exp_avg", "exp_avg_sq", "master"):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """[] fp32 on a device; a number of the host is filled in there, since a copy would make the host wait."""
    if isinstance(value, Tensor) and value.device == device:
        return value.to(torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def adjoined(tensors: list[Tensor]) -> Tensor:
    """The memory of contiguous tensors of one type as one flat tensor.

    Those that don't follow each other in memory are moved there, as by `tensor.data = ...`; the next call with them
    then copies nothing.
    """
    filled = [tensor.detach() for tensor in tensors if tensor.numel() > 0] or [tensors[0].detach()]
    first, elements = filled[0], sum(tensor.numel() for tensor in filled)
    address, follow = first.data_ptr(), True
    for tensor in filled:
        follow = follow and tensor.data_ptr() == address
        address += tensor.numel() * tensor.element_size()
    memory = first.untyped_storage()
    if follow and address <= memory.data_ptr() + memory.nbytes():
        return first.as_strided((elements,), (1,))
    flat = torch.cat([tensor.reshape(-1) for tensor in filled])
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part.view_as(tensor)
    return flat


def _rows(squares: Tensor, ratio: Tensor, multiplier: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each parameter: norm of the weights, norm of the update in units of the schedule's rate, trust ratio."""
    weights, updates = squares.sqrt().unbind(-1)
    return list(zip(weights.unbind(), (updates * ratio * multiplier).unbind(), ratio.unbind(), strict=True))


class FusedAdamW(FusedOptimizer):
    """AdamW (Loshchilov & Hutter 2019), with the options of `torch.optim.AdamW`.

    Args:
        params: parameters or groups of them.
        max_grad_norm: clip the norm of all gradients together to this; 0 for no clipping.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        max_grad_norm: float = 0.0,
    ) -> None:
        options = {"bias_correction": bias_correction, "max_grad_norm": max_grad_norm}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options})

    def _trust(self, group: dict[str, Any]) -> Trust | None:
        return None


class FusedLamb(FusedOptimizer):
    """LAMB (You et al. 2020), with the options of NVIDIA's FusedLAMB.

    Args:
        params: parameters or groups of them; each parameter has its own trust ratio.
        max_grad_norm: clip the norm of all gradients together to this; 0 for no clipping.
        use_nvlamb: scale parameters without weight decay by their trust ratio too.
        max_trust_ratio: largest trust ratio; None for no bound.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
        max_trust_ratio: float | None = None,
    ) -> None:
        options = {"bias_correction": bias_correction, "max_grad_norm": max_grad_norm}
        trust = {"use_nvlamb": use_nvlamb, "max_trust_ratio": max_trust_ratio}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **options, **trust})

    def _trust(self, group: dict[str, Any]) -> Trust | None:
        trusted = group["weight_decay"] != 0.0 or group["use_nvlamb"]
        return Trust(group["max_trust_ratio"], group["use_nvlamb"]) if trusted else None
