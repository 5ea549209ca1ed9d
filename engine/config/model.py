"""The encoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from engine.errors import require

#: of fresh weights, where nothing names another
DEFAULT_ARCHITECTURE = "bert"

#: by architecture and name: hidden size, layers, heads, feed-forward size
MODEL_SIZES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    # Turc et al. 2019, "Well-Read Students Learn Better"; Devlin et al. 2019 for base and large; Shoeybi et al. 2019,
    # "Megatron-LM", for 1.3b
    "bert": {
        "tiny": (128, 2, 2, 512),
        "mini": (256, 4, 4, 1024),
        "small": (512, 4, 8, 2048),
        "medium": (512, 8, 8, 2048),
        "base": (768, 12, 12, 3072),
        "large": (1024, 24, 16, 4096),
        "1.3b": (2048, 24, 32, 8192),
    },
    # Warner et al. 2024 for base and large. The others have BERT's widths and heads, base's ratio of widths (1.5), and
    # nearly twice BERT's layers, as base has: one more than a multiple of 3, so that the last sees the whole sequence
    "modernbert": {
        "tiny": (128, 4, 2, 192),
        "mini": (256, 7, 4, 384),
        "small": (512, 7, 8, 768),
        "medium": (512, 13, 8, 768),
        "base": (768, 22, 12, 1152),
        "large": (1024, 28, 16, 2624),
    },
}


#: by architecture, the positions of fresh weights that name none; rotary ones take no memory
POSITIONS = {"bert": 512, "modernbert": 8192}


def sizes_of(architecture: str) -> dict[str, tuple[int, int, int, int]]:
    """The named sizes of an architecture; BERT's for one that has none of its own."""
    return MODEL_SIZES.get(architecture, MODEL_SIZES[DEFAULT_ARCHITECTURE])


@dataclass
class ModelConfig:
    """The encoder: a named size, single dimensions, or weights to start from."""

    size: str = "tiny"
    """tiny, mini, small, medium, base, large or, of bert, 1.3b"""
    architecture: str | None = None
    """bert, modernbert, roberta or xlm-roberta; when null that of init_from, or bert"""
    hidden_size: int | None = None
    """width; overrides the size's"""
    layers: int | None = None
    """number of Transformer layers; overrides the size's"""
    heads: int | None = None
    """number of attention heads; overrides the size's"""
    intermediate_size: int | None = None
    """width of the feed-forward layer; overrides the size's"""
    max_positions: int | None = None
    """longest sequence; when null that of init_from, 512 of bert, 8,192 of modernbert, whose positions may also be
    extended beyond init_from's"""
    window: int | None = None
    """modernbert: tokens of a window, half of them on each side of a token; when null that of init_from, or 128"""
    global_every: int | None = None
    """modernbert: every so many layers, from the first on, one attends to the whole sequence, the others within
    windows; when null as init_from, or 3"""
    rope_theta: float | None = None
    """modernbert: base of the rotary positions in layers that attend to the whole sequence, greater for longer ones;
    when null that of init_from, or 160,000"""
    local_rope_theta: float | None = None
    """modernbert: the same in layers with windows; when null that of init_from, or 10,000"""
    hidden_dropout: float | None = None
    """dropout of embeddings and of each sub-layer's output, in modernbert inside the feed-forward network; when null as
    the architecture was published: 0.1 of bert, 0 of modernbert"""
    attention_dropout: float | None = None
    """dropout of attention probabilities; when null as hidden_dropout when null"""
    classifier_dropout: float | None = None
    """dropout before a task head; hidden_dropout when null"""
    init_from: str | None = None
    """weights and dimensions to start from, in place of the dimensions above: a Hugging Face folder, or else the name
    of a model on the hub, such as bert-base-uncased or org/name@revision, which goes into the user's cache"""
    init_layers: str | None = None
    """layers of init_from that the model has, from 0 and in their order, as 0,2,4,5; null: all"""
    activation_checkpointing: bool = False
    """recompute each layer in the backward pass instead of keeping its activations"""

    def validate(self) -> None:
        sizes = sizes_of(self.fresh_architecture)
        require(self.size in sizes, "model.size", self.size, f"choose one of {', '.join(sizes)}")
        for name in ("hidden_size", "layers", "heads", "intermediate_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}", value, "give a whole number of at least 1")
        hidden, _, heads, _ = self.dimensions()
        require(hidden % heads == 0, "model.heads", heads, f"model.hidden_size {hidden} must be a multiple of it")
        require(self.positions >= 8, "model.max_positions", self.max_positions, "give at least 8")
        even = self.window is None or (self.window >= 2 and self.window % 2 == 0)
        require(even, "model.window", self.window, "give an even number of at least 2")
        require(
            self.global_every is None or self.global_every >= 1,
            "model.global_every",
            self.global_every,
            "give 1 or more",
        )
        for name in ("rope_theta", "local_rope_theta"):
            value = getattr(self, name)
            require(value is None or 1.0 < value < float("inf"), f"model.{name}", value, "give a number above 1")
        self._check_layers()
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value < 1.0, f"model.{name}", value, "give a probability in [0, 1)")

    def _check_layers(self) -> None:
        given = self.init_layers
        require(given is None or self.init_from is not None, "model.init_layers", given, "it needs model.init_from")
        names = [] if given is None else [name.strip() for name in given.split(",")]
        fits = all(name.isascii() and name.isdecimal() for name in names)
        rises = fits and all(one < other for one, other in pairwise(map(int, names)))
        require(rises, "model.init_layers", given, "give layers' numbers from 0, rising, as 0,2,4,5")

    @property
    def kept_layers(self) -> tuple[int, ...] | None:
        """Those of `init_layers`; None for all."""
        return None if self.init_layers is None else tuple(map(int, self.init_layers.split(",")))

    @property
    def fresh_architecture(self) -> str:
        """The architecture of fresh weights."""
        return self.architecture or DEFAULT_ARCHITECTURE

    @property
    def positions(self) -> int:
        """Those of fresh weights."""
        usual = POSITIONS.get(self.fresh_architecture, POSITIONS[DEFAULT_ARCHITECTURE])
        return usual if self.max_positions is None else self.max_positions

    def dimensions(self) -> tuple[int, int, int, int]:
        """Hidden size, layers, heads and feed-forward size after overrides."""
        hidden, layers, heads, intermediate = sizes_of(self.fresh_architecture)[self.size]
        if self.intermediate_size or self.hidden_size:
            intermediate = self.intermediate_size or (self.hidden_size or hidden) * intermediate // hidden
        return self.hidden_size or hidden, self.layers or layers, self.heads or heads, intermediate
