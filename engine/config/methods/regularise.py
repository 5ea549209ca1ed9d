"""What keeps fine-tuning from learning its examples by heart, beside weight decay and label smoothing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from engine.config.methods.adapter import AdapterConfig
from engine.errors import require

Adversary = Literal["none", "fgm", "freelb"]
#: what runs have in their configurations that were made before the defaults changed
EARLIER_DEFAULTS = {"adversarial_norm": 1.0, "adversarial_rate": 0.1}
#: fields that change the loss: a task says which of them it takes, and a run has one of them at most
OF_LOSS = ("r_drop", "adversarial", "mixup")


@dataclass
class RegulariseConfig:
    """Regularisers of tasks on labelled data; all are off by default."""

    r_drop: float = 0.0
    """R-Drop (Liang et al. 2021): weight of the divergence between two passes of a micro-batch under different dropout;
    0 makes one pass"""
    adversarial: Adversary = "none"
    """noise on word embeddings that raises the loss: fgm (one step, Miyato et al. 2017), whose loss is added to that of
    the clean texts, or freelb (Zhu et al. 2020), the mean loss of several steps"""
    adversarial_norm: float = 0.03
    """largest L2 norm of a sequence's noise"""
    adversarial_steps: int = 3
    """freelb only: steps of the noise, each a forward and backward pass"""
    adversarial_rate: float = 0.01
    """freelb only: length of a step of a sequence's noise"""
    mixup: float = 0.0
    """mixup of pooled vectors (Zhang et al. 2018): both parameters of the beta distribution that mixing weights are
    drawn from; 0 mixes nothing"""
    start_decay: float = 0.0
    """decoupled decay of pre-trained weights towards what they were at the start (L2-SP, Li et al. 2018)"""
    ema: float = 0.0
    """decay of a moving average of the weights, which is what is evaluated and exported; 0 keeps none"""
    layer_drop: float = 0.0
    """chance that a sequence skips the last layer in a step; it falls linearly to 0 below the first one (stochastic
    depth, Huang et al. 2016)"""
    dropout_end: float | None = None
    """dropout at the last step as a share of that at the first, changing linearly between them; null keeps it"""
    fresh_layers: int = 0
    """top layers of the encoder that start afresh instead of from model.init_from (Zhang et al. 2021)"""

    def validate(self) -> None:
        require(
            self.adversarial in ("none", "fgm", "freelb"),
            "regularise.adversarial",
            self.adversarial,
            "choose none, fgm or freelb",
        )
        for name in ("r_drop", "mixup", "start_decay", "fresh_layers"):
            require(getattr(self, name) >= 0, f"regularise.{name}", getattr(self, name), "give 0 or more")
        for name in ("adversarial_norm", "adversarial_rate"):
            require(getattr(self, name) > 0, f"regularise.{name}", getattr(self, name), "give a positive number")
        steps = self.adversarial_steps
        require(steps >= 1, "regularise.adversarial_steps", steps, "give a whole number of at least 1")
        for name in ("ema", "layer_drop"):
            require(0 <= getattr(self, name) < 1, f"regularise.{name}", getattr(self, name), "give a share in [0, 1)")
        end = self.dropout_end
        require(end is None or end >= 0, "regularise.dropout_end", end, "give a share of the first dropout, or null")
        self._check_alone()
        if len(self.of_loss) > 1:
            first, second, *_ = self.of_loss
            remedy = f"regularise.{first} is given too, and no loss is defined with both; give one of them"
            require(False, f"regularise.{second}", getattr(self, second), remedy)

    def _check_alone(self) -> None:
        """Refuse what is given and would not be read."""
        for name in ("adversarial_norm", "adversarial_steps", "adversarial_rate"):
            needed = ("fgm", "freelb") if name == "adversarial_norm" else ("freelb",)
            read = self.adversarial in needed or f"regularise.{name}" not in self.given
            remedy = f"it needs regularise.adversarial {' or '.join(needed)}"
            require(read, f"regularise.{name}", getattr(self, name), remedy)

    def check_beside(self, adapter: AdapterConfig, rate: float, offload: str) -> None:
        """Refuse what the other parts of a run leave no sense.

        Args:
            rate: the run's optim.learning_rate.
            offload: its zero.offload_optimizer.

        Raises:
            UserError: names the field and the other option.
        """
        nvme, method = offload == "nvme", adapter.method
        for name in ("start_decay", "ema"):
            value = getattr(self, name)
            remedy = "zero.offload_optimizer nvme has no place for further weights; give cpu or none"
            require(value == 0.0 or not nvme, f"regularise.{name}", value, remedy)
        remedy = f"adapter.method {method} trains no pre-trained weight; leave it out"
        require(
            self.start_decay == 0.0 or method in ("none", "bitfit"), "regularise.start_decay", self.start_decay, remedy
        )
        remedy = "adapter.method adalora sets weights to 0 between steps, and averages would not be; leave it out"
        require(self.ema == 0.0 or method != "adalora", "regularise.ema", self.ema, remedy)
        remedy = f"times optim.learning_rate {rate:g} it is above 1, which overshoots the start; give less"
        require(self.start_decay * rate <= 1.0, "regularise.start_decay", self.start_decay, remedy)

    @property
    def weight_copies(self) -> int:
        """fp32 tensors of all trained weights that are kept beside the optimizer's own."""
        return int(self.start_decay > 0.0) + int(self.ema > 0.0)

    def check_micro_batch(self, size: int) -> None:
        """Refuse to mix the one example of a micro-batch with itself.

        Raises:
            UserError: names train.micro_batch.
        """
        remedy = "regularise.mixup pairs the examples of a micro-batch; give at least 2"
        require(size > 1 or not self.mixup, "train.micro_batch", size, remedy)

    @property
    def of_loss(self) -> tuple[str, ...]:
        """Those of `OF_LOSS` that are given."""
        return tuple(name for name in OF_LOSS if getattr(self, name) != getattr(RegulariseConfig, name))

    @property
    def copies(self) -> int:
        """How often a forward pass has each of its sequences."""
        return 2 if self.r_drop else 1

    @property
    def passes(self) -> int:
        """Forward and backward passes of a micro-batch."""
        return {"none": 1, "fgm": 2, "freelb": self.adversarial_steps}[self.adversarial]

    @property
    def given(self) -> tuple[str, ...]:
        """The dotted names of the fields that are not at their defaults, of today or of earlier versions."""
        defaults = {one.name: (one.default, EARLIER_DEFAULTS.get(one.name)) for one in fields(self)}
        return tuple(f"regularise.{name}" for name, known in defaults.items() if getattr(self, name) not in known)
