"""Where the time of recorded steps went: by part of the step, by kind of operator, by operator; and its report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.kernels.gemm import GemmPeak

#: parts of a step; gradient reduction includes DeepSpeed's copies for it, which happen on a single rank too
PARTS = ("data", "forward", "backward", "gradient reduction", "optimizer", "other")
#: kinds of operators; element-wise includes reductions, norms and softmax, fused or not, and random numbers; other
#: operators move no data (views, allocations); host is time between operators: Python, autograd and DeepSpeed
KINDS = (
    "matrix products", "attention", "element-wise", "embedding", "copies and casts", "communication", "optimizer",
    "other operators", "host",
)  # fmt: skip
HOST = KINDS[-1]
#: kinds whose operators count as theirs together with all operators that they call
COMPOSED = frozenset({"attention", "embedding", "communication", "optimizer"})
#: the first pattern that an operator's name in lower case matches gives its kind
PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("optimizer", r"^optimizer\.step|^zerobert::(adamw|lamb|global_norm)|^aten::_fused_(adam|sgd)"),
        ("communication", r"^(c10d|gloo|nccl|mpi)[:_]|record_param_comms|^communication: "),
        ("attention", r"^_(rotary)?attention"),
        ("element-wise", r"^_normalisedsum|^_addednorm|^_linear|^_geglu"),
        (HOST, r"^(?!\w+::)|^autograd::|^torch::"),
        ("attention", r"attention"),
        ("embedding", r"::_?embedding"),
        ("matrix products", r"linear|matmul|::(_?(addmm|mm|bmm|baddbmm|addmv|mv|dot|addbmm|addr|ger|einsum)(_|$))"),
        (
            "copies and casts",
            r"::(\w*copy_?|_?to|clone|contiguous|cat|stack|flatten_dense_tensors|scalar_tensor|index|index_select|index_put_?|gather|scatter|fill_?|zero_?"
            r"|zeros|zeros_like|ones|ones_like|full|full_like|new_zeros|new_full|pad|repeat\w*|item|_local_scalar_dense"
            r"|arange|select_backward|slice_backward|_pin_memory|pin_memory)$",
        ),
        (
            "other operators",
            r"::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|expand|expand_as|as_strided|select|slice"
            r"|narrow|squeeze|unsqueeze|split\w*|chunk|unbind|flatten|unflatten\w*|resolve_\w+|_has_\w+|empty\w*|new_empty\w*|detach\w*|alias"
            r"|lift_fresh|resize_\w*|set_|result_type|is_nonzero|view_as|numpy_t|set_data|stride|size)$",
        ),
        ("element-wise", r"^(aten|zerobert|prims)::"),
    )
)
TOP = 10


def kind_of(name: str) -> str:
    """The kind of an operator, a range, or a node of autograd, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in PATTERNS if pattern.search(lower)), "other operators")


@dataclass
class Operators:
    """Self time of operators in seconds, without that of the operators that they call; sums over the recorded steps."""

    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    """by name and kind, without the host's"""
    calls: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, name: str, kind: str, seconds: float) -> None:
        """Count one call."""
        self.kinds[kind] += seconds
        if kind_of(name) != HOST:
            self.seconds[name, kind] = self.seconds.get((name, kind), 0.0) + seconds
            self.calls[name, kind] = self.calls.get((name, kind), 0) + 1

    def top(self, steps: int, count: int = TOP) -> list[dict[str, Any]]:
        """The `count` operators with the longest self time: name, kind, and calls and seconds per step."""
        longest = sorted(self.seconds, key=lambda key: -self.seconds[key])[:count]
        return [
            {"name": key[0], "kind": key[1], "calls": self.calls[key] / steps, "seconds": self.seconds[key] / steps}
            for key in longest
        ]


def operators(roots: Iterable[Any], *, on_device: bool) -> Operators:
    """Add up the events of torch's profiler.

    Args:
        roots: events (`FunctionEvent`) that no other contains; all events below them count.
        on_device: count the time of the kernels that an operator started, not the host's.
    """
    table = Operators()
    pending: list[tuple[Any, str | None]] = [(root, None) for root in roots]
    while pending:
        event, owner = pending.pop()
        kind = owner or kind_of(event.name)
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        table.add(event.name, kind, microseconds / 1e6)
        below = kind if kind in COMPOSED else None
        pending += [(child, below) for child in event.cpu_children]
    return table


@dataclass(frozen=True)
class RankRecord:
    """What one rank recorded, over all recorded steps."""

    parts: Mapping[str, float]
    """seconds of each part; they add up to the time of the steps"""
    operators: Operators
    flops: float
    """FLOPs that the model needed for this rank's tokens, without recomputation"""
    tokens: int
    peak: GemmPeak | None
    """this rank's fastest matrix product; None if there was no memory for any"""
    trace: str
    """path of the trace"""


@dataclass(frozen=True)
class Summary:
    """The recorded steps of all ranks; seconds are means over ranks and steps."""

    first_step: int
    steps: int
    ranks: int
    step_seconds: float
    parts: Mapping[str, float]
    kinds: Mapping[str, float]
    top: Sequence[Mapping[str, Any]]
    """name, calls and seconds per step of rank 0's operators, the longest first"""
    tokens_per_second: float
    """over all ranks"""
    flops_per_step: float
    """FLOPs that the model needs for a step's tokens, over all ranks, without recomputation"""
    flops_per_second: float
    gemm_peak: float | None
    """FLOP/s, the sum over all ranks, measured at the same time; None if one had no memory for it"""
    gemm_peak_measured: str
    """the matrix product that rank 0 measured its peak with"""
    mfu: float | None
    """model FLOPs utilisation: share of the measured GEMM peak, in [0, 1]"""
    device: str
    traces: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The lines of the printed report, without the paths of the files."""
        shares = {name: seconds / self.step_seconds for name, seconds in self.parts.items()}
        kinds = {name: seconds / self.step_seconds for name, seconds in self.kinds.items()}
        top = {_shown(row): row["seconds"] / self.step_seconds for row in self.top}
        last = self.first_step + self.steps - 1
        where = "self CPU time" if self.device == "cpu" else "self device time"
        return [
            f"profile: steps {self.first_step} to {last}, {self.step_seconds:.4g} s each, mean of {self.ranks} rank(s)",
            f"  parts: {_listed(shares)}",
            f"  kinds of operators, {where}: {_listed(dict(sorted(kinds.items(), key=lambda kind: -kind[1])))}",
            f"  longest operators: {_listed(top)}",
            f"  {self.tokens_per_second:,.0f} tokens/s, {_rate(self.flops_per_second)} for the model: {self._share()}",
        ]

    def _share(self) -> str:
        if self.mfu is None or self.gemm_peak is None:
            return "MFU unknown, for no memory was left to measure matrix products"
        at_once = "" if self.ranks == 1 else f" of {self.ranks} ranks at once"
        return (
            f"{100 * self.mfu:.1f} % of the measured GEMM peak (MFU), {_rate(self.gemm_peak)}{at_once}: "
            f"{self.gemm_peak_measured}"
        )


def summarise(records: Sequence[RankRecord], first_step: int, steps: int, device: str) -> Summary:
    """Combine the records of all ranks, in the order of the ranks."""
    count = len(records) * steps
    parts = {name: sum(record.parts[name] for record in records) / count for name in PARTS}
    kinds = {name: sum(record.operators.kinds[name] for record in records) / count for name in KINDS}
    seconds = sum(parts.values())
    flops = sum(record.flops for record in records) / steps
    peaks = [record.peak for record in records if record.peak is not None]
    peak = sum(peak_of_rank.flops for peak_of_rank in peaks) if len(peaks) == len(records) else None
    return Summary(
        first_step=first_step,
        steps=steps,
        ranks=len(records),
        step_seconds=seconds,
        parts=parts,
        kinds=kinds,
        top=records[0].operators.top(steps),
        tokens_per_second=sum(record.tokens for record in records) / steps / seconds,
        flops_per_step=flops,
        flops_per_second=flops / seconds,
        gemm_peak=peak,
        gemm_peak_measured=str(peaks[0]) if peaks else "",
        mfu=None if peak is None else flops / seconds / peak,
        device=device,
        traces=[record.trace for record in records],
    )


def _shown(row: Mapping[str, Any]) -> str:
    """An operator's name, and the kind that it is part of."""
    name, kind = str(row["name"]), row["kind"]
    return name if kind == kind_of(name) else f"{name} ({kind})"


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def _rate(flops: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if flops >= u), (1e6, "M"))
    return f"{flops / unit:.4g} {name}FLOP/s"
