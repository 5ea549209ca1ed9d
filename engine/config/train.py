"""How a run trains: batch, length, precision, intervals; where ZeRO keeps its states, and where its curves go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from engine.config.methods.adapter import frozen_parts
from engine.errors import require

Precision = Literal["fp32", "bf16", "fp16"]
OffloadTarget = Literal["none", "cpu", "nvme"]

#: steps of a run that says neither steps nor epochs
DEFAULT_STEPS = 1000


@dataclass
class TrainConfig:
    """Batch, length of the run, sharding, precision and intervals (all intervals in steps)."""

    global_batch: int = 64
    """sequences in an optimizer step, over all ranks; fixed, whatever the number of GPUs"""
    micro_batch: int | Literal["auto"] | None = None
    """sequences in a forward pass of a rank; null takes the largest that divides, on CPUs up to 32, on GPUs up to
    16,384 tokens or what the forecast says that fits; auto the largest that fits in memory, tried at the start"""
    steps: int | None = None
    """optimizer steps; exclusive with epochs; 1000 when both are null"""
    epochs: float | None = None
    """passes over the training examples; exclusive with steps"""
    zero_stage: int = 2
    """ZeRO stage: 0 replicates; 1, 2, 3 shard optimizer states, gradients, parameters"""
    freeze: str | None = None
    """weights of model.init_from that are not trained, separated by commas: embeddings, layers (all), layers:3,
    layers:0-5 (from 0), pooler, or encoder for all of these; with adapters, layers that get none. Of fine-tuning"""
    int8_aware: bool = False
    """let the encoder's linear layers compute with weights and inputs rounded as int8 rounds them, so that
    `zerobert quantise` of the run loses less; of fine-tuning without adapters"""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 (fp16 scales the loss and needs a GPU)"""
    log_interval: int = 10
    """steps between points of the training curves"""
    eval_interval: int = 0
    """steps between evaluations; 0 evaluates only at the end"""
    eval_samples: int = 2000
    """held-out samples of an evaluation during pre-training; 0 takes all"""
    patience: int | None = None
    """evaluations in a row that are not better than the best before the run ends early; null never ends it; needs
    eval_interval, and a task that chooses its best weights by a score"""
    save_interval: int | None = 0
    """steps between checkpoints; 0 saves only at the end, null never"""
    keep: int = 2
    """checkpoints kept; the newest intact one is never deleted"""
    save_at: str | None = None
    """single steps, separated by commas and rising, whose checkpoints are made and kept beside the newest, as 100,1000
    """
    async_save: bool = True
    """write checkpoints while training goes on, from a copy in host memory: for AdamW and LAMB 12 bytes a parameter,
    divided by the ranks; false: training waits for the disk"""
    deterministic: bool = False
    """only deterministic algorithms"""
    detect_anomaly: bool = False
    """stop at the operation whose backward pass made the first NaN (slow)"""
    kernels: Literal["auto", "fused", "reference"] = "auto"
    """auto: our fused kernels, on a GPU if they agree there with plain torch at the start; fused: without that check;
    reference: plain torch, the same up to rounding; on CPUs it draws other dropout masks, so single losses differ"""
    verify_update: int = 1
    """first updates, also after a resume, that are compared with the exact ones of whole parameters; 0 turns it off"""
    audit: bool = False
    """write hashes of the samples that each step was computed from under <output>/audit (a GPU waits for them)"""
    profile: int | None = None
    """optimizer steps to record, after a warm-up, under <output>/profile: a trace, where their time went, and MFU"""
    threads: int | None = None
    """CPU threads of a rank; null divides the machine's cores among its ranks"""

    def total_steps(self, epoch_size: int) -> int:
        """Optimizer steps of the run, of which an epoch has `epoch_size` samples."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * epoch_size / self.global_batch))
        return DEFAULT_STEPS

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """Those of `save_at`."""
        return () if self.save_at is None else tuple(map(int, self.save_at.split(",")))

    def check_saved_steps(self, total: int) -> None:
        """Refuse checkpoints behind the end of the run.

        Raises:
            UserError: names train.save_at.
        """
        last = max(self.saved_steps, default=0)
        require(last <= total, "train.save_at", self.save_at, f"the run ends at step {total}; leave out what is later")

    def validate(self) -> None:
        choices = ("auto", "fused", "reference")
        require(self.kernels in choices, "train.kernels", self.kernels, f"choose one of {', '.join(choices)}")
        for name in ("global_batch", "log_interval", "keep"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "give a whole number of at least 1")
        for name in ("eval_interval", "eval_samples", "save_interval", "verify_update"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"train.{name}", value, "give 0 or more")
        for name in ("micro_batch", "steps", "threads", "profile", "patience"):
            value = getattr(self, name)
            require(value in (None, "auto") or value >= 1, f"train.{name}", value, "give a whole number of at least 1")
        require(self.epochs is None or self.epochs > 0, "train.epochs", self.epochs, "give a positive number")
        require(
            self.patience is None or self.eval_interval > 0,
            "train.patience",
            self.patience,
            "it counts evaluations during training; give train.eval_interval too",
        )
        names = [] if self.save_at is None else self.save_at.split(",")
        fits = all(name.isascii() and name.isdecimal() for name in names) and (
            all(one < other for one, other in pairwise([0, *self.saved_steps]))
        )
        require(fits, "train.save_at", self.save_at, "give steps from 1, rising, as 100,1000")
        frozen_parts(self.freeze)
        require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "choose 0, 1, 2 or 3")
        require(
            self.zero_stage > 0 or self.precision != "fp16",
            "train.zero_stage",
            self.zero_stage,
            "DeepSpeed doesn't scale the loss there in train.precision fp16; choose 1, the same on one GPU",
        )
        both = self.steps is not None and self.epochs is not None
        require(not both, "train.epochs", self.epochs, f"give either it or train.steps ({self.steps}), not both")


@dataclass
class ZeroConfig:
    """ZeRO-Offload and ZeRO-Infinity; the ZeRO stage itself is train.zero_stage."""

    offload_optimizer: OffloadTarget = "none"
    """optimizer states and fp32 weights: none keeps them on the GPU, cpu (stages 1 to 3) in host memory, nvme (stage 3)
    in files, of which a part at a time is read, stepped and written on the CPU; what is below 1 MiB stays in memory"""
    offload_parameters: OffloadTarget = "none"
    """parameters between their uses: none or cpu (stage 3)"""
    nvme_path: str | None = None
    """folder on a local disk for offload_optimizer nvme, with room for 16 bytes a parameter; a run's files there are
    its own and go at its end"""

    def validate(self) -> None:
        for name in ("offload_optimizer", "offload_parameters"):
            value = getattr(self, name)
            require(value in ("none", "cpu", "nvme"), f"zero.{name}", value, "choose none, cpu or nvme")
        require(
            self.offload_parameters != "nvme",
            "zero.offload_parameters",
            self.offload_parameters,
            "DeepSpeed 0.19 fails while it swaps parameters to NVMe; choose cpu",
        )
        needs_path = self.offload_optimizer == "nvme"
        require(bool(self.nvme_path) or not needs_path, "zero.nvme_path", self.nvme_path, "give a folder for nvme")

    def check_stage(self, stage: int) -> None:
        """Refuse an offload that the ZeRO stage doesn't have."""
        lowest = {"none": 0, "cpu": 1, "nvme": 3}[self.offload_optimizer]
        remedy = f"train.zero_stage {stage} can't; choose stage {lowest} or higher"
        require(stage >= lowest, "zero.offload_optimizer", self.offload_optimizer, remedy)
        remedy = f"train.zero_stage {stage} keeps whole parameters; choose stage 3"
        require(stage == 3 or self.offload_parameters == "none", "zero.offload_parameters", "cpu", remedy)


@dataclass
class MonitorConfig:
    """Where the curves go."""

    tensorboard: bool = True
    """write TensorBoard events under <output>/tensorboard"""
    norm_interval: int = 100
    """steps between norms of weights and updates and LAMB's trust ratios; 0 never; not for torch's own AdamW"""
    csv: bool = False
    """write a CSV file a curve under <output>/csv"""
    texts: bool = True
    """show a few held-out sentences with the model's guesses in TensorBoard; false keeps the data's text out of all
    that a run writes but its tokenizer (predictions.tsv has line numbers and labels, audits have hashes)"""
    wandb: bool = False
    """log to Weights & Biases (WANDB_MODE=offline for no network)"""
    wandb_project: str = "zerobert"
    """project of the Weights & Biases run"""
    wandb_group: str | None = None
    """group of the Weights & Biases run"""

    def validate(self) -> None:
        require(self.norm_interval >= 0, "monitor.norm_interval", self.norm_interval, "give 0 or more")


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`, itself at least 1: of a share, a micro-batch."""
    return max(size for size in range(1, min(number, limit) + 1) if number % size == 0)
