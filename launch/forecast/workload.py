"""What a memory forecast is made of: the shape of an encoder, and how it is trained. Pure numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import (
    ARCHITECTURES,
    TASKS,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    Shape,
    ZeroConfig,
    require,
)
from engine.config.methods.distil import model_in
from engine.model.adapters.trained import Trained
from launch.configure.start_model import folder_config, with_folder
from launch.zero.build import shape_bucket

#: bytes of an element
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def shape_of(model: ModelConfig, vocabulary: int) -> Shape:
    """The shape of a model that starts from fresh weights with all heads, over a vocabulary of so many token ids.

    Raises:
        UserError: the model's dimensions are those of a folder, which isn't read here.
    """
    require(model.init_from is None, "model.init_from", model.init_from, "a forecast needs model.size or dimensions")
    return ARCHITECTURES.get(model.fresh_architecture).shape(model, vocabulary)


def teacher_shapes(run: RunConfig) -> tuple[Shape, ...]:
    """The shapes of a run's teachers under its task's heads; those whose config.json can't be read are left out."""
    found = [folder_config(str(model_in(folder))) for folder in run.distil.folders]
    known = [(with_folder(ModelConfig(), shape), shape.vocabulary) for shape in found if shape is not None]
    return tuple(TASKS.get(run.task).with_heads(shape_of(*each), run) for each in known)


@dataclass(frozen=True)
class Workload:
    """One rank's part of a training run."""

    shape: Shape
    sequence_length: int
    micro_batch: int
    stage: int
    ranks: int
    ranks_per_node: int
    precision: Precision
    optimizer: str = OptimConfig.name
    activation_checkpointing: bool = False
    attention: str = "flash"
    """flash keeps no scores of tokens by tokens; plain does"""
    sequences_per_sample: int = 1
    """of multiple choice the options of a question"""
    passes: int = 1
    """forward and backward passes of a micro-batch, one after the other; all but the last one go to the embeddings"""
    read_share: float = 0.15
    """share of a sequence's tokens whose states the head reads; see `TaskEntry`"""
    offload_optimizer: str = "none"
    """none, cpu or nvme"""
    offload_parameters: str = "none"
    """none or cpu"""
    accelerator: str = "cuda"
    """cuda or cpu"""
    dropout: float = 0.1
    kernels: bool = True
    """whether our kernels may run (`train.kernels`): on GPUs they keep less of a layer"""
    accumulates: bool = True
    """whether an optimizer step has several micro-batches, so that a forward pass finds gradients already there"""
    overlap_comm: bool | None = None
    """None: on a GPU only, as launch.zero.build sets it"""
    reduce_bucket_size: int | None = None
    """this and all below in elements; None: what launch.zero.build chooses for the shape"""
    stage3_prefetch_bucket_size: int = 10_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    """parameters that are used again within so many aren't released (DeepSpeed's default)"""
    teachers: tuple[Shape, ...] = ()
    """models that each rank has whole beside its own, for their forward passes"""
    trained: Trained | None = None
    """what is trained of the weights; None for all"""
    copies: int = 0
    """further fp32 tensors of all trained weights, see `RegulariseConfig.weight_copies`"""
    verify_update: int = 1
    """updates that the certificate compares (train.verify_update): the first ones need copies"""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "sequence_length", "ranks", "ranks_per_node"):
            assert getattr(self, name) >= 1, name
        assert self.stage in (0, 1, 2, 3), self.stage
        assert self.precision in WIDTH, self.precision
        assert self.attention in ("flash", "plain"), self.attention
        longest = self.shape.positions
        require(
            self.sequence_length <= longest,
            "data.sequence_length",
            self.sequence_length,
            f"it exceeds model.max_positions ({longest}); lower it or raise that",
        )
        ZeroConfig(self.offload_optimizer, self.offload_parameters).check_stage(self.stage)  # type: ignore[arg-type]

    @property
    def bucket(self) -> int:
        """Elements of a reduction bucket; DeepSpeed allocates all of it."""
        if self.reduce_bucket_size is not None:
            return self.reduce_bucket_size
        return shape_bucket(self.shape)

    @property
    def parameters(self) -> int:
        """Elements of the model, adapters among them."""
        return self.shape.parameters() if self.trained is None else self.trained.all_parameters()

    @property
    def teachers_bytes(self) -> int:
        """Of the teachers' weights."""
        return self.width * sum(teacher.parameters() for teacher in self.teachers)

    @property
    def trained_parameters(self) -> int:
        """Elements that have gradients and optimizer states."""
        return self.shape.parameters() if self.trained is None else self.trained.parameters()

    @property
    def largest_trained(self) -> int:
        """Elements of the largest parameter that is trained."""
        return self.shape.largest_parameter() if self.trained is None else max(self.trained.tensors())

    @property
    def share(self) -> int:
        """Elements of a rank's part of the trained parameters, rounded up."""
        return -(-self.trained_parameters // self.ranks)

    @property
    def first_layer(self) -> int:
        """The lowest layer that a backward pass reaches; the number of layers where it reaches none."""
        return 0 if self.trained is None or self.passes > 1 else self.trained.first_layer()

    @property
    def trains_embeddings(self) -> bool:
        """Whether a backward pass reaches the embeddings."""
        return self.trained is None or self.trained.trains_embeddings()

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return WIDTH[self.precision]

    @property
    def overlaps(self) -> bool:
        return self.accelerator != "cpu" if self.overlap_comm is None else self.overlap_comm

    @property
    def sequences(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequences_per_sample

    @property
    def tokens(self) -> int:
        """Of a micro-batch of full sequences, so the forecast bounds packed batches with shorter ones."""
        return self.sequences * self.sequence_length

    @property
    def rows(self) -> int:
        """States that the head reads, beside those of first tokens."""
        if self.read_share == 0:
            return 0
        return self.sequences * max(1, round(self.sequence_length * self.read_share))
