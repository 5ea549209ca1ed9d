"""The encoder."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.check import require

#: hidden size, layers, heads, feed-forward size (Turc et al. 2019, "Well-Read Students Learn Better"; Devlin et al.
#: 2019 for base and large; Shoeybi et al. 2019, "Megatron-LM", for 1.3b)
MODEL_SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (128, 2, 2, 512),
    "mini": (256, 4, 4, 1024),
    "small": (512, 4, 8, 2048),
    "medium": (512, 8, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "1.3b": (2048, 24, 32, 8192),
}


@dataclass
class ModelConfig:
    """The encoder: a named size, single dimensions, or weights to start from."""

    size: str = "tiny"
    """tiny, mini, small, medium, base, large or 1.3b"""
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
    """weights and dimensions to start from, in place of the dimensions above: a Hugging Face folder, or else the name
    of a model on the hub, such as bert-base-uncased or org/name@revision, which goes into the user's cache"""
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
