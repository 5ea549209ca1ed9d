"""The configuration of a run: one dataclass tree, validated once, saved with the run.

Values come from the defaults here, then a YAML recipe, then dotted overrides on the command line. Checks
of one field live in the part that owns it; checks across parts live in `RunConfig.validate`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from engine.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
ScheduleName = Literal["linear", "polynomial", "cosine", "wsd", "constant"]
TaskName = Literal["pretrain", "sequence_classification"]

#: hidden size, layers, heads, feed-forward size (Turc et al. 2019, "Well-Read Students Learn Better", and
#: Devlin et al. 2019 for base and large)
MODEL_SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (128, 2, 2, 512),
    "mini": (256, 4, 4, 1024),
    "small": (512, 4, 8, 2048),
    "medium": (512, 8, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a `UserError` that names the field, its value and the remedy unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}: {value!r} is not allowed; {remedy}")


@dataclass
class ModelConfig:
    """The encoder: a named size, single dimensions, or weights to start from."""

    size: str = "tiny"
    """tiny, mini, small, medium, base or large"""
    hidden_size: int | None = None
    """width; overrides the size's"""
    layers: int | None = None
    """number of Transformer layers; overrides the size's"""
    heads: int | None = None
    """number of attention heads; overrides the size's"""
    intermediate_size: int | None = None
    """width of the feed-forward layer; overrides the size's"""
    max_positions: int = 512
    """longest sequence that the position embeddings cover"""
    hidden_dropout: float = 0.1
    """dropout of embeddings and of each sub-layer's output"""
    attention_dropout: float = 0.1
    """dropout of attention probabilities"""
    classifier_dropout: float | None = None
    """dropout before a task head; hidden_dropout when null"""
    init_from: str | None = None
    """Hugging Face folder whose weights and dimensions to start from; dimensions above are then ignored"""
    activation_checkpointing: bool = False
    """recompute each layer in the backward pass instead of keeping its activations"""

    def validate(self) -> None:
        require(self.size in MODEL_SIZES, "model.size", self.size, f"choose one of {', '.join(MODEL_SIZES)}")
        for name in ("hidden_size", "layers", "heads", "intermediate_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}", value, "give a whole number of at least 1")
        hidden, _, heads, _ = self.dimensions()
        require(hidden % heads == 0, "model.heads", heads, f"model.hidden_size {hidden} must be a multiple of it")
        require(self.max_positions >= 8, "model.max_positions", self.max_positions, "give at least 8")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value < 1.0, f"model.{name}", value, "give a probability in [0, 1)")

    def dimensions(self) -> tuple[int, int, int, int]:
        """Hidden size, layers, heads and feed-forward size after overrides."""
        hidden, layers, heads, intermediate = MODEL_SIZES[self.size]
        intermediate = self.intermediate_size or (4 * self.hidden_size if self.hidden_size else intermediate)
        return self.hidden_size or hidden, self.layers or layers, self.heads or heads, intermediate


@dataclass
class DataConfig:
    """Pre-training data: a store made by `zerobert prepare`, and how samples are made from it."""

    path: str | None = None
    """prepared store; null prepares the embedded text of the Python installation under the run's folder"""
    sequence_length: int = 128
    """tokens in a sequence, [CLS] and [SEP] included"""
    short_sequence_probability: float = 0.1
    """share of pairs with a random shorter target length (Devlin et al. 2019)"""
    mask_probability: float = 0.15
    """share of tokens that the MLM predicts"""
    whole_word_masking: bool = False
    """mask all pieces of a word together"""
    workers: int = 2
    """loader processes a rank; 0 loads in the training process"""

    def validate(self) -> None:
        require(self.sequence_length >= 8, "data.sequence_length", self.sequence_length, "give at least 8")
        require(
            0.0 <= self.short_sequence_probability <= 1.0,
            "data.short_sequence_probability",
            self.short_sequence_probability,
            "give a probability in [0, 1]",
        )
        require(
            0.0 < self.mask_probability <= 0.5,
            "data.mask_probability",
            self.mask_probability,
            "give a probability in (0, 0.5]",
        )
        require(self.workers >= 0, "data.workers", self.workers, "give 0 or more")


@dataclass
class LabelledConfig:
    """Labelled data of a fine-tuning task: files (csv, tsv, jsonl[.gz|.xz], parquet) or saved datasets."""

    train: str | None = None
    """training examples"""
    validation: str | None = None
    """examples that choose the best checkpoint; null holds out a tenth of the training examples"""
    test: str | None = None
    """examples of the final report; null reports on the validation examples"""
    text: str = "sentence"
    """column of the text"""
    text_pair: str | None = None
    """column of the second text, for pairs"""
    label: str = "label"
    """column of the label: any strings or numbers"""
    max_length: int = 128
    """tokens kept of an example, special tokens included; longer ones are truncated"""
    metric: str = "accuracy"
    """what chooses the best checkpoint: accuracy, macro_f1, matthews or loss"""

    def validate(self) -> None:
        require(self.max_length >= 4, "labelled.max_length", self.max_length, "give at least 4")
        choices = ("accuracy", "macro_f1", "matthews", "loss")
        require(self.metric in choices, "labelled.metric", self.metric, f"choose one of {', '.join(choices)}")


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lamb"] = "adamw"
    """optimizer: adamw (Loshchilov & Hutter 2019) or lamb (You et al. 2020), exact at every ZeRO stage"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of the first and second moments"""
    eps: float = 1e-6
    """added to the denominator of the update"""
    weight_decay: float = 0.01
    """decoupled decay of weight matrices and embeddings; never of biases and LayerNorm"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm to this; 0 turns clipping off"""
    max_trust_ratio: float | None = None
    """lamb only: largest trust ratio; null for no bound"""
    nvlamb: bool = False
    """lamb only: scale biases and LayerNorm by their trust ratios too, which are 1 by default"""
    schedule: ScheduleName = "linear"
    """learning rate after warm-up: linear, polynomial, cosine, wsd (warmup-stable-decay) or constant"""
    warmup: float = 0.1
    """warm-up: a share of the steps when below 1, else a number of steps"""
    decay: float = 0.1
    """wsd only: the decay phase, as a share of the steps when below 1, else a number of steps"""
    power: float = 2.0
    """polynomial only: exponent of the decay"""
    min_ratio: float = 0.0
    """final learning rate as a share of the peak"""

    def validate(self) -> None:
        require(self.name in ("adamw", "lamb"), "optim.name", self.name, "choose adamw or lamb")
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "give a positive number")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "give two numbers in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "give a positive number")
        for name in ("weight_decay", "max_grad_norm", "warmup", "decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "give 0 or more")
        require(self.power > 0, "optim.power", self.power, "give a positive number")
        clamp = self.max_trust_ratio
        require(clamp is None or clamp > 0, "optim.max_trust_ratio", clamp, "give a positive number, or null")
        require(0 <= self.min_ratio <= 1, "optim.min_ratio", self.min_ratio, "give a share in [0, 1]")


@dataclass
class TrainConfig:
    """Batch, length of the run, sharding, precision and intervals (all intervals in steps)."""

    global_batch: int = 64
    """sequences in an optimizer step, over all ranks; fixed, whatever the number of GPUs"""
    micro_batch: int | None = None
    """sequences in a forward pass of a rank; null takes the largest that divides, up to 32"""
    steps: int | None = None
    """optimizer steps; exclusive with epochs; 1000 when both are null"""
    epochs: float | None = None
    """passes over the training examples; exclusive with steps"""
    zero_stage: int = 2
    """ZeRO stage: 0 replicates; 1, 2, 3 shard optimizer states, gradients, parameters"""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 (fp16 scales the loss and needs a GPU)"""
    log_interval: int = 10
    """steps between points of the training curves"""
    eval_interval: int = 0
    """steps between evaluations; 0 evaluates only at the end"""
    eval_samples: int = 2000
    """held-out samples of an evaluation during pre-training; 0 takes all"""
    save_interval: int | None = 0
    """steps between checkpoints; 0 saves only at the end, null never"""
    keep: int = 2
    """checkpoints kept; the newest is never deleted"""
    deterministic: bool = False
    """only deterministic algorithms"""
    detect_anomaly: bool = False
    """stop at the operation whose backward pass made the first NaN (slow)"""
    kernels: Literal["auto", "fused", "reference"] = "auto"
    """auto: our fused kernels, on a GPU if they agree there with plain torch at the start; fused: without that check;
    reference: plain torch"""
    verify_update: int = 1
    """first updates, also after a resume, that are compared with the exact ones of whole parameters; 0 turns it off"""
    threads: int | None = None
    """CPU threads of a rank; null divides the machine's cores among its ranks"""

    def validate(self) -> None:
        choices = ("auto", "fused", "reference")
        require(self.kernels in choices, "train.kernels", self.kernels, f"choose one of {', '.join(choices)}")
        for name in ("global_batch", "log_interval", "keep"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "give a whole number of at least 1")
        for name in ("eval_interval", "eval_samples", "save_interval", "verify_update"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"train.{name}", value, "give 0 or more")
        for name in ("micro_batch", "steps", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", value, "give a whole number of at least 1")
        require(self.epochs is None or self.epochs > 0, "train.epochs", self.epochs, "give a positive number")
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
class MonitorConfig:
    """Where the curves go."""

    tensorboard: bool = True
    """write TensorBoard events under <output>/tensorboard"""
    norm_interval: int = 100
    """steps between norms of weights and updates and LAMB's trust ratios; 0 never; not for torch's own AdamW"""
    csv: bool = False
    """write a CSV file a curve under <output>/csv"""
    wandb: bool = False
    """log to Weights & Biases (WANDB_MODE=offline for no network)"""
    wandb_project: str = "zerobert"
    """project of the Weights & Biases run"""
    wandb_group: str | None = None
    """group of the Weights & Biases run"""

    def validate(self) -> None:
        require(self.norm_interval >= 0, "monitor.norm_interval", self.norm_interval, "give 0 or more")


@dataclass
class RunConfig:
    """One run: what to train, on what, how, and where its files go."""

    task: TaskName = "pretrain"
    """pretrain (MLM + NSP) or sequence_classification"""
    output: str = "runs/default"
    """folder of everything that the run writes"""
    resume: str = "never"
    """never, auto (the newest checkpoint in the output folder, if any) or a checkpoint folder"""
    seed: int = 1
    """seed of weights, data order, masking and dropout"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    labelled: LabelledConfig = field(default_factory=LabelledConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def validate(self) -> None:
        """Check every field and every combination that needs neither data nor hardware.

        Raises:
            UserError: names the first field that is wrong.
        """
        require(self.task in get_args(TaskName), "task", self.task, f"choose one of {', '.join(get_args(TaskName))}")
        require(bool(self.output), "output", self.output, "give a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "give a whole number in [0, 2^32)")
        for part in (self.model, self.data, self.labelled, self.optim, self.train, self.monitor):
            part.validate()
        if self.task == "pretrain":
            self._validate_pretraining()
        else:
            require(
                bool(self.labelled.train), "labelled.train", self.labelled.train, "give a file of labelled examples"
            )
            require(bool(self.model.init_from), "model.init_from", self.model.init_from, "give the folder of a model")

    def _validate_pretraining(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_positions
        fits = bool(self.model.init_from) or length <= limit
        require(
            fits, "data.sequence_length", length, f"it exceeds model.max_positions ({limit}); lower it or raise that"
        )

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain values, ready for JSON and YAML."""
        return asdict(self)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The tree of a saved configuration; the inverse of `RunConfig.to_dict` through JSON."""
    parts = {
        "model": ModelConfig,
        "data": DataConfig,
        "labelled": LabelledConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "monitor": MonitorConfig,
    }
    built = {name: part(**values[name]) for name, part in parts.items()}
    config = RunConfig(**{**values, **built})
    config.optim.betas = (config.optim.betas[0], config.optim.betas[1])
    return config
