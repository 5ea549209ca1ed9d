"""Which parameters of a model that a run starts from are trained: adapters beside them, parts of them, or all."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

from engine.errors import UserError, require

Method = Literal["none", "lora", "dora", "adalora", "ia3", "prefix", "prompt", "houlsby", "bitfit"]

_LORA = ("rank", "alpha", "dropout", "targets", "rslora")
#: by method, the options that it reads
READ: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": _LORA,
    "dora": _LORA,
    "adalora": ("rank", "initial_rank", "alpha", "dropout", "targets", "orthogonality", "warmup", "final", "interval"),
    "ia3": ("targets",),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
    "houlsby": ("bottleneck", "dropout", "targets"),
    "bitfit": (),
}
#: methods whose weights are a folder beside the base; the others change parameters of the base itself
IN_FOLDER = tuple(method for method in READ if method not in ("none", "bitfit"))
#: methods whose adapters can be computed into the base's weights
MERGEABLE = ("lora", "dora", "adalora", "ia3")
#: methods with trained vectors in front of each sequence, which take positions of the model
VIRTUAL = ("prefix", "prompt")
#: linear layers of an encoder layer under names that hold for every architecture, and groups of them
SINGLE = ("query", "key", "value", "attention-output", "feed-forward-input", "feed-forward-output")
GROUPS = {
    "attention-input": ("query", "key", "value"),
    "attention": ("query", "key", "value", "attention-output"),
    "feed-forward": ("feed-forward-input", "feed-forward-output"),
    "all-linear": SINGLE,
}
#: layers that are adapted where nothing else is asked for
DEFAULT_TARGETS = {
    "lora": "all-linear",
    "dora": "all-linear",
    "adalora": "all-linear",
    # Liu et al. 2022, section 3.3: keys, values and the inner activations of the feed-forward network
    "ia3": "key,value,feed-forward-output",
    # Houlsby et al. 2019, section 2.1: behind the projection of each sub-layer
    "houlsby": "attention-output,feed-forward-output",
}
_RULE = re.compile(r"embeddings|encoder|pooler|layers(?::(\d+)(?:-(\d+))?)?")


@dataclass
class AdapterConfig:
    """Parameter-efficient fine-tuning: small trained parts beside or within frozen weights; the head is always
    trained."""

    method: Method = "none"
    """none (all weights, or what train.freeze leaves), lora (Hu et al. 2022), dora (Liu et al. 2024), adalora (Zhang et
    al. 2023), ia3 (Liu et al. 2022), prefix (Li and Liang 2021), prompt (Lester et al. 2021), houlsby (bottlenecks,
    Houlsby et al. 2019) or bitfit (biases, Ben Zaken et al. 2022)"""
    targets: str | None = None
    """layers that are adapted, separated by commas: query, key, value, attention-output, feed-forward-input,
    feed-forward-output, or attention-input, attention, feed-forward, all-linear for several; null: all-linear, of ia3
    key, value and feed-forward-output, of houlsby both outputs"""
    rank: int = 8
    """of lora, dora and, when its budget is reached, on average adalora"""
    alpha: float | None = None
    """lora, dora, adalora: an adapter's output is multiplied by alpha / rank; null: alpha is twice the rank"""
    rslora: bool = False
    """lora, dora: multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023)"""
    dropout: float = 0.0
    """lora, dora, adalora: of an adapter's input; houlsby: of its output"""
    initial_rank: int = 12
    """adalora: rank of each adapter at the start"""
    warmup: float = 0.1
    """adalora: share of the steps before the budget begins to shrink"""
    final: float = 0.3
    """adalora: share of the steps, at the end, in which the ranks stay"""
    interval: int = 10
    """adalora: steps between changes of the ranks"""
    orthogonality: float = 0.5
    """adalora: weight of the penalty on factors that are not orthogonal"""
    bottleneck: int = 64
    """houlsby: width of a bottleneck"""
    virtual_tokens: int = 20
    """prefix, prompt: trained vectors in front of each sequence"""

    def validate(self) -> None:
        methods = get_args(Method)
        require(self.method in methods, "adapter.method", self.method, f"choose one of {', '.join(methods)}")
        self._check_read()
        for name in ("rank", "initial_rank", "interval", "bottleneck", "virtual_tokens"):
            require(getattr(self, name) >= 1, f"adapter.{name}", getattr(self, name), "give a whole number above 0")
        require(self.alpha is None or self.alpha > 0, "adapter.alpha", self.alpha, "give a positive number, or null")
        require(0.0 <= self.dropout < 1.0, "adapter.dropout", self.dropout, "give a probability in [0, 1)")
        require(self.orthogonality >= 0, "adapter.orthogonality", self.orthogonality, "give 0 or more")
        for name in ("warmup", "final"):
            share = getattr(self, name)
            require(0.0 <= share < 1.0, f"adapter.{name}", share, "give a share of the steps in [0, 1)")
        both = self.warmup + self.final
        require(both < 1.0, "adapter.final", self.final, f"with adapter.warmup {self.warmup} it leaves no step between")
        starts = self.method != "adalora" or self.initial_rank >= self.rank
        require(starts, "adapter.initial_rank", self.initial_rank, f"give at least adapter.rank ({self.rank})")
        self.layers()

    def _check_read(self) -> None:
        """Refuse an option that the method doesn't read, unless it has its default."""
        for part in fields(self):
            value, readers = getattr(self, part.name), [name for name, read in READ.items() if part.name in read]
            unread = part.name != "method" and self.method not in readers and value != part.default
            remedy = f"adapter.method {self.method} doesn't read it, only {', '.join(readers)}; leave it out"
            require(not unread, f"adapter.{part.name}", value, remedy)

    def layers(self) -> tuple[str, ...]:
        """Which of `SINGLE` are adapted.

        Raises:
            UserError: a name that is none.
        """
        if self.method not in DEFAULT_TARGETS:
            return ()
        found: list[str] = []
        for name in (self.targets or DEFAULT_TARGETS[self.method]).split(","):
            given = name.strip()
            known = given in SINGLE or given in GROUPS
            remedy = f"{given!r} is none of {', '.join((*SINGLE, *GROUPS))}"
            require(known, "adapter.targets", self.targets, remedy)
            found += GROUPS.get(given, (given,))
        if self.method == "houlsby":
            outputs = DEFAULT_TARGETS["houlsby"].split(",")
            fits = set(found) <= set(outputs)
            remedy = f"houlsby has its bottlenecks behind {' and '.join(outputs)}; give one of them or both"
            require(fits, "adapter.targets", self.targets, remedy)
        return tuple(name for name in SINGLE if name in found)

    @property
    def positions(self) -> int:
        """Positions of the model that each sequence needs beside its own tokens'."""
        return self.virtual_tokens if self.method in VIRTUAL else 0

    @property
    def scale(self) -> float:
        """alpha, also where none is given."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Frozen:
    """What train.freeze keeps from being trained."""

    parts: frozenset[str]
    """of embeddings, encoder, pooler"""
    layers: tuple[tuple[int, int | None], ...]
    """first and last number of ranges; None for no end"""

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether a parameter of a part of the encoder, or of its layer of this number, is frozen."""
        if "encoder" in self.parts:
            return True
        if layer is None:
            return part in self.parts
        return any(first <= layer and (last is None or layer <= last) for first, last in self.layers)


def frozen_parts(rules: str | None) -> Frozen:
    """The meaning of train.freeze, such as "embeddings,layers:0-5".

    Raises:
        UserError: a rule that is none.
    """
    parts: set[str] = set()
    layers: list[tuple[int, int | None]] = []
    for rule in (rules or "").split(",") if rules is not None else ():
        found = _RULE.fullmatch(rule.strip())
        if found is None:
            raise UserError(
                f"train.freeze: {rules!r} is not allowed; give embeddings, layers, layers:3, layers:0-5, pooler or "
                "encoder, separated by commas"
            )
        first, last = found[1], found[2] or found[1]
        if not found[0].startswith("layers"):
            parts.add(found[0])
        elif first is None:
            layers.append((0, None))
        else:
            require(int(first) <= int(last), "train.freeze", rules, f"{rule.strip()} ends before it begins")
            layers.append((int(first), int(last)))
    return Frozen(frozenset(parts), tuple(layers))
