"""Data: the prepared store of pre-training, the labelled files of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.config.check import require

Objective = Literal["mlm_nsp", "mlm"]


@dataclass
class DataConfig:
    """Pre-training data: a store made by `zerobert prepare`, and how samples are made from it."""

    path: str | None = None
    """prepared store; null prepares the embedded text of the Python installation under the run's folder"""
    objective: Objective = "mlm_nsp"
    """mlm_nsp: masked tokens and next-sentence prediction, on pairs of segments of two documents or of one; mlm: masked
    tokens alone, documents end to end in sequences of exactly sequence_length tokens, one document suffices"""
    sequence_length: int = 128
    """tokens in a sequence, [CLS] and [SEP] included"""
    short_sequence_probability: float = 0.1
    """share of pairs with a random shorter target length (Devlin et al. 2019); of mlm_nsp"""
    mask_probability: float = 0.15
    """share of tokens that the MLM predicts"""
    whole_word_masking: bool = False
    """mask all pieces of a word together"""
    workers: int = 2
    """loader processes a rank; 0 loads in the training process"""

    def validate(self) -> None:
        choices = get_args(Objective)
        require(self.objective in choices, "data.objective", self.objective, f"choose {' or '.join(choices)}")
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
    group_by_length: bool = False
    """bring training examples of similar length into the same global batch: less padding, less random batches"""
    max_unknown_share: float = 0.2
    """largest share of [UNK] among the word pieces of the training examples; 1 takes any"""
    metric: str = "accuracy"
    """what chooses the best checkpoint: accuracy, macro_f1, matthews or loss"""

    def validate(self) -> None:
        require(self.max_length >= 4, "labelled.max_length", self.max_length, "give at least 4")
        bound = self.max_unknown_share
        require(0.0 <= bound <= 1.0, "labelled.max_unknown_share", bound, "give a share in [0, 1]")
        choices = ("accuracy", "macro_f1", "matthews", "loss")
        require(self.metric in choices, "labelled.metric", self.metric, f"choose one of {', '.join(choices)}")
