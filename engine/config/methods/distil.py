"""Distillation: a model learns from what others, its teachers, make of the same texts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from engine.config.methods.regularise import RegulariseConfig
from engine.errors import require

#: weights of the losses that come from teachers
OF_TEACHERS = ("soft", "hidden", "relations")
#: fields whose change a resume allows: what they name is compared by its content
BY_CONTENT = ("teachers", "texts")


@dataclass
class DistilConfig:
    """Teachers and what is learned from them, beside the labels (in pre-training: beside the masked tokens)."""

    teachers: str | None = None
    """folders of trained models with the run's tokenizer and labels, or of runs, as a,b,c; of several the logits are
    averaged; null: none"""
    hard: float = 1.0
    """weight of the task's own loss, against the labels"""
    soft: float = 1.0
    """weight of the divergence from the teachers' predictions (Hinton et al. 2015); of numbers and of embeddings their
    squared difference"""
    temperature: float = 2.0
    """what logits of both are divided by before they are compared; the divergence is multiplied by its square"""
    hidden: float = 0.0
    """weight of the mean squared difference of hidden states, the student's through a learned projection where widths
    differ (Jiao et al. 2020); its layers are spread evenly over the teacher's"""
    relations: float = 0.0
    """weight of the divergence of queries', keys' and values' relations among a sequence's tokens (MiniLM v2, Wang et
    al. 2021), in the student's last layer"""
    relation_heads: int | None = None
    """parts that queries, keys and values are cut into for relations, alike in both models; null: the teacher's heads
    """
    relation_layer: int | None = None
    """the teacher's layer for relations, from 0; null: its last"""
    texts: str | None = None
    """a file of further training texts, whose labels, if it has any, aren't read: they are learned from teachers
    alone"""

    def validate(self) -> None:
        for name in ("hard", *OF_TEACHERS):
            require(getattr(self, name) >= 0, f"distil.{name}", getattr(self, name), "give 0 or more")
        require(self.temperature > 0, "distil.temperature", self.temperature, "give a positive number")
        heads, layer = self.relation_heads, self.relation_layer
        require(heads is None or heads >= 1, "distil.relation_heads", heads, "give a whole number of at least 1")
        require(layer is None or layer >= 0, "distil.relation_layer", layer, "give a layer's number, from 0")
        for entry in fields(self):
            value, unread = getattr(self, entry.name), not self.folders and entry.name != "teachers"
            require(not unread or value == entry.default, f"distil.{entry.name}", value, "it needs distil.teachers")
        require(self.teachers is None or bool(self.folders), "distil.teachers", self.teachers, "give a folder, or null")
        if self.folders:
            taught = any(getattr(self, name) for name in OF_TEACHERS)
            remedy = "nothing is learned from distil.teachers, hidden and relations being 0 too; give one above 0"
            require(taught, "distil.soft", self.soft, remedy)
        for name in ("relation_heads", "relation_layer"):
            value = getattr(self, name)
            require(value is None or self.relations > 0, f"distil.{name}", value, "it needs distil.relations above 0")
        needed = self.temperature == DistilConfig.temperature or self.soft > 0
        require(needed, "distil.temperature", self.temperature, "it needs distil.soft above 0")

    def check_beside(self, regularise: RegulariseConfig, augment: str | None) -> None:
        """Refuse what the other parts of a run leave no sense.

        Args:
            augment: the run's labelled.augment.

        Raises:
            UserError: names the field and the other option.
        """
        if not self.folders:
            return
        texts, lost = self.texts, "regularise.mixup mixes predictions, and distil.teachers have none of mixtures"
        require(not regularise.mixup, "regularise.mixup", regularise.mixup, f"{lost}; leave one of the two out")
        remedy = "labelled.augment changes the labelled texts alone; zerobert augment makes a file of further texts"
        require(texts is None or augment is None, "distil.texts", texts, remedy)
        for name in regularise.of_loss if self.compares_states else ():
            field = "hidden" if self.hidden else "relations"
            remedy = f"regularise.{name} makes several passes, and states are compared of one; leave it out"
            require(False, f"distil.{field}", getattr(self, field), remedy)

    @property
    def folders(self) -> tuple[str, ...]:
        """The teachers, one by one."""
        return tuple(name.strip() for name in (self.teachers or "").split(",") if name.strip())

    @property
    def compares_states(self) -> bool:
        """Whether it needs more of a model than its predictions."""
        return bool(self.folders) and (self.hidden > 0 or self.relations > 0)


def model_in(folder: str) -> Path:
    """The model that a teacher's folder holds: a run's own export, else the folder itself."""
    export = Path(folder) / "export"
    return export if (export / "config.json").is_file() else Path(folder)
