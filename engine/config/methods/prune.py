"""Gradual pruning while fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.config.methods.adapter import AdapterConfig
from engine.config.methods.regularise import RegulariseConfig
from engine.errors import require


@dataclass
class PruneConfig:
    """Gradual pruning while fine-tuning: heads and neurons on which the loss depends least are taken out step by step,
    on a cubic schedule (Zhu and Gupta 2017); off by default."""

    heads: float = 1.0
    """share of the attention heads that is kept in the end; each layer keeps one at least"""
    neurons: float = 1.0
    """share of the feed-forward neurons that is kept in the end; each layer keeps one at least"""
    even: bool = False
    """keep equally many in each layer; else those that matter most, wherever they are"""
    begin: float = 0.1
    """share of the steps before the first are taken out"""
    end: float = 0.7
    """share of the steps after which what is kept stays"""
    interval: int = 10
    """steps between changes"""

    def validate(self) -> None:
        for name in ("heads", "neurons"):
            share = getattr(self, name)
            require(0.0 < share <= 1.0, f"prune.{name}", share, "give a share in (0, 1]; 1 keeps all")
        for name in ("begin", "end"):
            share = getattr(self, name)
            require(0.0 <= share < 1.0, f"prune.{name}", share, "give a share of the steps in [0, 1)")
        require(self.begin < self.end, "prune.end", self.end, f"give more than prune.begin ({self.begin:g})")
        require(self.interval >= 1, "prune.interval", self.interval, "give a whole number above 0")
        for part in fields(self):
            value = getattr(self, part.name)
            remedy = "nothing is pruned; give prune.heads or prune.neurons, or leave it out"
            require(self.is_on or value == part.default, f"prune.{part.name}", value, remedy)

    @property
    def is_on(self) -> bool:
        """Whether anything is taken out."""
        return self.heads < 1.0 or self.neurons < 1.0

    def check_beside(
        self, adapter: AdapterConfig, regularise: RegulariseConfig, freeze: str | None, offload: str
    ) -> None:
        """Refuse it where weights don't change, or wouldn't stay zeros.

        Raises:
            UserError: names the field and the other option.
        """
        others = {
            "adapter.method": (adapter.method, "none", "the weights that are pruned are frozen below adapters"),
            "train.freeze": (freeze, None, "frozen weights can't be pruned while training"),
            "regularise.ema": (regularise.ema, 0.0, "averages of weights that are pruned would not be zeros"),
            "regularise.start_decay": (regularise.start_decay, 0.0, "it would bring back weights that are pruned"),
            "zero.offload_optimizer": (
                "nvme" if offload == "nvme" else "none",
                "none",
                "prune changes weights between steps, which are then in files; give cpu or none",
            ),
        }
        for name, (value, allowed, remedy) in others.items():
            require(not self.is_on or value == allowed, name, value, f"{remedy}; leave it or the section prune out")
