"""Whether a GPU's kernels compute what plain torch does on that very GPU: asked once a process, before they are used.

The CUDA sources are proven by emulation and compilation alone; what those can't show (machine code, loading, streams)
is checked here in a fraction of a second, on small inputs of every kind that training sends. Speed is not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels import reference
from engine.kernels.reference import dropout_factors
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Dropout, Sequences, Trust

ROWS, CLASSES = 3, 30522
TOKENS, WIDTH = 333, 776
LENGTHS = (1, 1003, 40_000)
GAP = 3
#: of layer normalisation; the packs of a row are those of a warp's row (BERT-base's in 16 bits, less one) and a block's
NORM_ROWS, NORM_PACKS, NORM_EPS = 9, (95, 255), 1e-12
#: largest difference that is allowed, relative to the largest value of the result: fp32 sums in another order
TOLERANCE = 2e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: tokens of the sequences that attend, of which some ask
ATTENDED, ASKING = (5, 130, 1, 64), (0, 4, 5, 40, 134, 136)
HEADS, HEAD_WIDTH = 2, 64
#: largest difference of attention in roundings of its type: probabilities, what they sum and the result are rounded
ATTENTION_ROUNDINGS = 4
DROPPED = 0.25

Found = Iterator[tuple[str, Tensor, Tensor, float]]


def disagreement(kernels: Any, device: torch.device, family: str, compare: bool = True) -> str | None:
    """What kernels of one family do wrong on a device, in a line; None if nothing.

    Args:
        kernels: functions of `engine.kernels.reference`.
        family: a name in `FAMILIES`.
        compare: false asks only whether they can be built and launched.

    Raises:
        torch.OutOfMemoryError: memory ran out, which says nothing of the kernels.
    """
    try:
        for what, result, expected, tolerance in FAMILIES[family](kernels, device):
            if compare:
                scale = expected.double().abs().max().clamp(min=1e-30)
                apart = float((result.double() - expected.double()).abs().max() / scale)
                if not apart <= tolerance:
                    return f"{what} differs from plain torch by {apart:.1e}"
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a driver, a compiler or a launch may raise: plain torch does the work then
        return telling_line(error)
    return None


def telling_line(error: Exception) -> str:
    """The line of a message that says why: a compiler's first error, or else the first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "error:" in line), lines[0])


def _cross_entropy(kernels: Any, device: torch.device) -> Found:
    """Losses, hits and gradients of rows that start unaligned, one of them ignored, in every precision."""
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([7, -100, CLASSES - 1], device=device)
    options: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.1, "gradient": True}
    for dtype in DTYPES:
        drawn = torch.randn(ROWS * (CLASSES + 1) + 1, generator=generator).to(device, dtype)
        views = [copy[1:].view(ROWS, CLASSES + 1)[:, :CLASSES] for copy in (drawn.clone(), drawn.clone())]
        scale = torch.full((), 64.0, device=device)
        loss, hit, _ = kernels.softmax_cross_entropy_(views[0], None, target, scale, **options)
        true_loss, true_hit, _ = reference.softmax_cross_entropy_(views[1], None, target, scale, **options)
        yield f"the loss in {dtype}", loss, true_loss, TOLERANCE
        yield f"the prediction in {dtype}", hit, true_hit, 0.0
        yield f"the gradient in {dtype}", views[0], views[1], TOLERANCE + 2 * torch.finfo(dtype).eps


def _buffers(device: torch.device) -> tuple[list[Tensor], Tensor, Segments]:
    """Weights, gradients and moments of a run under way, a bf16 copy, and segments with gaps of NaN between them."""
    generator = torch.Generator().manual_seed(0)
    size = sum(LENGTHS) + GAP * len(LENGTHS)
    offsets = [sum(LENGTHS[:index]) + GAP * index for index in range(len(LENGTHS))]
    table = Segments.build(offsets, LENGTHS, [0.1, 0.0, 0.1])
    flats = [torch.randn(size, generator=generator) * scale for scale in (0.05, 1.0, 0.1)]
    flats.append(torch.rand(size, generator=generator) * 0.01)
    return [flat.to(device) for flat in flats], torch.zeros(size, dtype=torch.bfloat16, device=device), table.to(device)


def _adamw(kernels: Any, device: torch.device) -> Found:
    """Weights, moments and copies after AdamW."""
    yield from _steps(kernels, device, "adamw")


def _lamb(kernels: Any, device: torch.device) -> Found:
    """Weights, moments and copies after LAMB in one call and in two."""
    yield from _steps(kernels, device, "lamb", "lamb in halves")


def _norm(kernels: Any, device: torch.device) -> Found:
    """The norm of gradients."""
    flats, _, table = _buffers(device)
    yield "the gradient norm", kernels.global_norm(flats[1], table), reference.global_norm(flats[1], table), TOLERANCE


def _steps(kernels: Any, device: torch.device, *names: str) -> Found:
    adam, scale = Adam(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-6, step=3), torch.full((), 0.5, device=device)
    for name in names:
        results = []
        for one in (kernels, reference):
            flats, copy, table = _buffers(device)
            if name == "adamw":
                one.adamw_step_(*flats, copy, table, adam, scale)
            elif name == "lamb":
                one.lamb_step_(*flats, copy, table, adam, scale, Trust())
            else:
                nonfinite, squares = one.lamb_moments_(*flats, table, adam, scale)
                ratio = reference.trust_ratios(squares, table.scaled(Trust()), Trust())
                one.lamb_apply_(*flats, copy, table, adam, scale, ratio, nonfinite)
            results.append([*flats, copy])
        low = torch.finfo(torch.bfloat16).eps
        for what, own, true in zip(("weights", "gradients", "moments", "moments", "copy"), *results, strict=True):
            yield f"{name}: {what}", own, true, TOLERANCE + (low if what == "copy" else 0.0)


def _gelu(kernels: Any, device: torch.device) -> Found:
    """Bias and GELU, GeGLU, and sums over rows, with their gradients; the bias starts unaligned."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES[1:]:
        shapes = ((TOKENS, WIDTH), (TOKENS, WIDTH), (1, WIDTH + 1))
        x, grad, long = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        bias, gate = long[0, 1:], torch.cat((x, grad), -1)
        rounded, summed = torch.finfo(dtype).eps, 1e-4
        leaves = [tensor.float().requires_grad_() for tensor in (x, bias, gate)]
        with torch.enable_grad():
            activated, gated = F.gelu(leaves[0] + leaves[1]), F.gelu(leaves[2][:, :WIDTH]) * leaves[2][:, WIDTH:]
            slopes = torch.autograd.grad((activated, gated), leaves, (grad.float(), grad.float()))
        grad_x, grad_bias = kernels.gelu_backward(grad, x, bias)
        yield f"GELU in {dtype}", kernels.gelu(x, bias), activated, rounded
        yield f"GELU's gradient in {dtype}", grad_x, slopes[0], rounded
        yield f"the bias's gradient in {dtype}", grad_bias, slopes[1], summed + rounded
        yield f"GeGLU in {dtype}", kernels.geglu(gate), gated, rounded
        yield f"GeGLU's gradient in {dtype}", kernels.geglu_backward(grad, gate), slopes[2], rounded
        yield f"the sum over rows in {dtype}", kernels.column_sum(grad, torch.float32), grad.float().sum(0), summed


def _layer_norm(kernels: Any, device: torch.device) -> Found:
    """Results and gradients with dropout before and after, in rows that a warp takes and in rows that a block takes."""
    generator = torch.Generator().manual_seed(0)
    dropouts = (Dropout(0.1, 5), Dropout(0.2, 6))
    for dtype, packs in itertools.product(DTYPES, NORM_PACKS):
        shape, low = (NORM_ROWS, packs * 16 // dtype.itemsize), 2 * torch.finfo(dtype).eps
        x, residual, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        weight, bias = (torch.randn(shape[1], generator=generator).to(device, dtype) for _ in range(2))
        out, z, statistics = kernels.layer_norm(x, residual, weight, bias, NORM_EPS, *dropouts)
        gradients = kernels.layer_norm_backward(grad, z, weight, statistics, *dropouts)
        before, after = (
            dropout_factors(dropout, torch.arange(NORM_ROWS, device=device), shape[1]) for dropout in dropouts
        )
        yield f"the sum in {dtype}", z, x.float() * before + residual.float(), TOLERANCE + low
        true_out, true_sum, *true_parameters = _norm_of_sum(z, weight, bias, grad, after)
        expected = (true_out, true_sum * before, true_sum, *true_parameters)
        names = ("layer normalisation", "its gradient of x", "of the residual", "of the weight", "of the bias")
        for what, own, true in zip(names, (out, *gradients), expected, strict=True):
            yield f"{what} in {dtype}", own, true, TOLERANCE + low


@torch.inference_mode(False)
@torch.enable_grad()
def _norm_of_sum(z: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
    """Layer normalisation times factors, and its gradients of z, weight and bias, by torch in fp32."""
    leaves = [tensor.float().clone().requires_grad_() for tensor in (z, weight, bias)]
    normalised = F.layer_norm(leaves[0], weight.shape, leaves[1], leaves[2], NORM_EPS)
    out = normalised * factors.clone()
    return out.detach(), *torch.autograd.grad(out, leaves, grad.float().clone())


def _attention(kernels: Any, device: torch.device) -> Found:
    """Context and gradients of packed sequences against the padded grid in fp64, where all and where some tokens ask.

    With dropout, values and gradients of the context that are unit vectors show the probabilities that forward and
    backward pass kept, which must be the same, and of these the share. The run's random numbers stay where they are.
    """
    sequences = Sequences.of(torch.tensor(ATTENDED, device=device), sum(ATTENDED), max(ATTENDED))
    read = torch.tensor(ASKING, device=device)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        for dtype in (torch.float16, torch.bfloat16):
            bound = ATTENTION_ROUNDINGS * torch.finfo(dtype).eps
            for who, asking in (("all", None), ("some", read)):
                for what, result, expected in _attended(kernels, device, dtype, sequences, asking):
                    yield f"{what} of attention where {who} ask in {dtype}", result, expected, bound
            forward, backward = _dropped(kernels, device, dtype)
            yield f"dropout of attention backward in {dtype}", backward, forward, bound
            share = (forward == 0).double().mean()
            yield f"the share that attention drops in {dtype}", share, torch.full_like(share, DROPPED), 0.1


def _attended(
    kernels: Any, device: torch.device, dtype: torch.dtype, sequences: Sequences, read: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    asked = sequences if read is None else sequences.asking(read)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, sequences.tokens, HEADS * HEAD_WIDTH, generator=generator).to(device, dtype)
    query, grad = (drawn[:2] if read is None else drawn[:2, read]).unbind()
    arguments = (asked.query_bounds32, asked.bounds32, asked.longest, asked.longest, HEADS, 0.0, -1, -1)
    kept = kernels.varlen_attention(query, drawn[2], drawn[3], *arguments)
    gradients = kernels.varlen_attention_backward(grad, query, drawn[2], drawn[3], *kept, *arguments)
    exact = [tensor.double().requires_grad_() for tensor in (query, drawn[2], drawn[3])]
    context = _on_grid(exact, sequences, read)
    true = (context.detach(), *torch.autograd.grad(context, exact, grad.double()))
    whats = ("the context", *(f"the gradient of the {name}" for name in ("query", "key", "value")))
    yield from zip(whats, (kept[0], *gradients), true, strict=True)


def _on_grid(tensors: Sequence[Tensor], sequences: Sequences, read: Tensor | None) -> Tensor:
    """[Q, H] attention of each query to its sequence, by torch on the grid of all queries and tokens with a mask."""
    place = torch.arange(sequences.tokens, device=sequences.bounds.device)
    owner = torch.searchsorted(sequences.bounds, place, right=True)
    own = (owner if read is None else owner[read])[:, None] == owner
    query, key, value = (tensor.unflatten(1, (HEADS, HEAD_WIDTH)).transpose(0, 1)[None] for tensor in tensors)
    with sdpa_kernel(SDPBackend.MATH):
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=own)
    return context[0].transpose(0, 1).flatten(1)


def _dropped(kernels: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The probabilities [A, W, W] of one sequence of W tokens as dropout left them, forward and backward."""
    sequences = Sequences.of(torch.tensor([HEAD_WIDTH], device=device), HEAD_WIDTH, HEAD_WIDTH)
    units = torch.eye(HEAD_WIDTH, device=device, dtype=dtype).repeat(1, HEADS)
    zeros = torch.zeros_like(units)
    arguments = (sequences.bounds32, sequences.bounds32, HEAD_WIDTH, HEAD_WIDTH, HEADS, DROPPED, -1, -1)
    kept = kernels.varlen_attention(zeros, zeros, units, *arguments)
    of_value = kernels.varlen_attention_backward(units, zeros, zeros, units, *kept, *arguments)[2]
    forward, backward = (tensor.unflatten(1, (HEADS, HEAD_WIDTH)).transpose(0, 1) for tensor in (kept[0], of_value))
    return forward, backward.mT


#: what is judged, and used or not, as a whole
FAMILIES: dict[str, Callable[[Any, torch.device], Found]] = {
    "loss": _cross_entropy,
    "norm": _norm,
    "adamw": _adamw,
    "lamb": _lamb,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "attention": _attention,
}
