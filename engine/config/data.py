"""Data: the prepared store of pre-training, the labelled files of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import require

Objective = Literal["mlm_nsp", "mlm"]
LabelPieces = Literal["first", "all"]
ClassLoss = Literal["cross_entropy", "ordinal"]
Positives = Literal["pairs", "dropout"]
Pooling = Literal["mean", "cls"]
Augment = Literal["eda", "eda_neighbours", "characters"]


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
    mask_probability_end: float | None = None
    """that share at the end of the run, to which it changes linearly from mask_probability; null: it doesn't change"""
    eval_mask_probability: float | None = None
    """that share in evaluations, at every step; null: mask_probability. Give the same to all runs that you compare"""
    mask_replace_probability: float = 0.8
    """share of the predicted tokens that become [MASK]"""
    random_replace_probability: float = 0.1
    """share of them that become a random token; the others stay as they are"""
    mean_span_length: float = 1.0
    """mean length of masked spans, 1 to 10, in tokens or, with whole_word_masking, in words (SpanBERT: 5); lengths are
    geometric, at most 10, and the tokens of a span become [MASK], random or stay together; 1 masks each for itself"""
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
        for name in ("mask_probability", "mask_probability_end", "eval_mask_probability"):
            value = getattr(self, name)
            given = value is not None
            require(not given or 0.0 < value <= 0.5, f"data.{name}", value, "give a probability in (0, 0.5]")
        for name in ("mask_replace_probability", "random_replace_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"data.{name}", value, "give a probability in [0, 1]")
        require(
            self.mask_replace_probability + self.random_replace_probability <= 1.0,
            "data.random_replace_probability",
            self.random_replace_probability,
            f"with data.mask_replace_probability {self.mask_replace_probability} it exceeds 1; lower one of the two",
        )
        length = self.mean_span_length
        require(1.0 <= length <= 10.0, "data.mean_span_length", length, "give a mean length in [1, 10]")
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
    folds: int | None = None
    """equal parts, by class, of the training examples, of which the validation examples are one; null: a tenth"""
    fold: int | None = None
    """which of the folds the validation examples are, from 1"""
    limit: int | None = None
    """learn from this many of the training examples that are not held out: drawn by class with the run's seed, a
    smaller number from those of a larger one; of answers, contexts with all of their questions; null: from all"""
    text: str = "sentence"
    """column of the text. Token classification: of lists of tokens or of raw text, tokens, words or text where there is
    no such column; in CoNLL files the number of the tokens' column, the first unless given"""
    text_pair: str | None = None
    """column of the second text, for pairs; of embeddings the text's positive"""
    label: str = "label"
    """column of the label: any strings or numbers. Several labels a text: a column of lists, or of text with a
    separator, or several columns of 0 and 1, as a,b,c. Choices: the right option's index from 0, or letter from A.
    Token classification: of lists of tags or of spans, tags, ner_tags, spans, entities or labels where there is no such
    column; in CoNLL files its number, the last unless given. Embeddings: of evaluation files, a number that tells how
    alike the two texts are; where there is no such column, pairs are scored as retrieval"""
    separator: str = ","
    """between several labels in a column of text"""
    options: str = "options"
    """choices: a column of lists of texts, or several columns of one text each, as a,b,c"""
    negatives: str | None = None
    """embeddings: a column of texts, or of lists of them, that are no positives of the row's text (hard negatives), or
    several columns of one text each, as a,b,c; evaluation files may lack it"""
    positives: Positives = "pairs"
    """embeddings: pairs, the positive of a training text is in the column text_pair; dropout, it is the text itself
    under another dropout mask (SimCSE, Gao et al. 2021), and only evaluation files have pairs"""
    temperature: float = 0.05
    """embeddings: what cosines are divided by in the loss"""
    symmetric: bool = False
    """embeddings: half of the loss is that of finding each positive's text among the texts of the global batch"""
    pooling: Pooling | None = None
    """embeddings: a text's vector is the mean of its tokens' states, or (cls) the state of its first token; null: as
    model.init_from says, where it is a folder of sentence-transformers, else mean"""
    loss: ClassLoss = "cross_entropy"
    """of classification: cross_entropy, or ordinal (squared earth mover's distance of the probabilities, Hou et al.
    2016) where classes have an order and a near class is a smaller error than a far one"""
    class_weights: str | None = None
    """what an example of each class counts in training's mean loss: "balanced" (examples / (classes x the class's
    examples)) or such as "yes=2,no=0.5"; classes that are not named count 1; of token classification what a word of
    each tag counts, and the name of a type is that of its two tags, as in LOC=3,O=0.5"""
    label_smoothing: float = 0.0
    """share of a training example's label that is spread evenly over all classes, in [0, 1); of cross_entropy"""
    max_length: int = 128
    """tokens kept of an example, special tokens included; longer ones are truncated, or of token classification and
    answers cut into windows"""
    stride: int | None = None
    """tokens that the overlapping windows of a text longer than max_length share; null: a third of max_length"""
    label_pieces: LabelPieces = "first"
    """pieces of a word whose tag is learned: first, or all (I- behind the first); the first one tells the word's tag"""
    max_answer_length: int = 30
    """tokens of an answer in a text, at most, in evaluations"""
    group_by_length: bool = False
    """bring training examples of similar length into the same global batch: less padding, less random batches"""
    augment: str | None = None
    """change training examples anew in every epoch: eda (synonyms of WordNet, words inserted, swapped and left out, Wei
    and Zou 2019; of tags synonyms and swaps alone), eda_neighbours (the same with near words of the start model's word
    embeddings) or characters (misspellings); zerobert augment has these and slower methods as files"""
    augment_share: float = 0.5
    """of augment: probability that an example is changed in an epoch, by a tenth of its words"""
    max_unknown_share: float = 0.2
    """largest share of [UNK] among the word pieces of the training examples; 1 takes any"""
    metric: str | None = None
    """the score that chooses the best checkpoint; null: the task's first. Classification: accuracy, macro_f1, matthews
    or loss, with the ordinal loss also quadratic_kappa or rank_error. Regression: pearson, spearman, mse or mae.
    Several labels: micro_f1, macro_f1, exact_match or loss. Choices: accuracy or loss. Token classification: f1,
    precision, recall (of entities), accuracy (of tokens) or loss. Answers: f1, exact_match or loss. Embeddings:
    spearman or pearson of pairs with labels, mrr_at_10, ndcg_at_10, recall_at_1 or recall_at_10 of others"""

    @property
    def overlap(self) -> int:
        """Tokens that windows share."""
        return self.max_length // 3 if self.stride is None else self.stride

    def validate(self) -> None:
        self._validate_folds()
        require(self.max_length >= 4, "labelled.max_length", self.max_length, "give at least 4")
        room = self.max_length - 2
        fits = self.stride is None or 0 <= self.stride < room
        require(fits, "labelled.stride", self.stride, f"give 0 or more, and less than the {room} pieces of a window")
        pieces, choices = self.label_pieces, get_args(LabelPieces)
        require(pieces in choices, "labelled.label_pieces", pieces, f"choose {' or '.join(choices)}")
        require(self.max_answer_length >= 1, "labelled.max_answer_length", self.max_answer_length, "give at least 1")
        bound = self.max_unknown_share
        require(0.0 <= bound <= 1.0, "labelled.max_unknown_share", bound, "give a share in [0, 1]")
        require(bool(self.separator), "labelled.separator", self.separator, "give at least one character")
        losses, smoothing = get_args(ClassLoss), self.label_smoothing
        require(self.loss in losses, "labelled.loss", self.loss, f"choose {' or '.join(losses)}")
        require(0.0 <= smoothing < 1.0, "labelled.label_smoothing", smoothing, "give a share in [0, 1)")
        spread = self.loss == "cross_entropy" or smoothing == 0.0
        require(spread, "labelled.label_smoothing", smoothing, "labelled.loss ordinal has no smoothing; leave it out")
        self._validate_embeddings()
        self._validate_augment()

    def _validate_augment(self) -> None:
        given, share, choices = self.augment, self.augment_share, get_args(Augment)
        remedy = f"choose {', '.join(choices)} or null; slower methods make a file: zerobert augment"
        require(given is None or given in choices, "labelled.augment", given, remedy)
        require(0.0 < share <= 1.0, "labelled.augment_share", share, "give a probability in (0, 1]")
        read = given is not None or share == LabelledConfig.augment_share
        require(read, "labelled.augment_share", share, "it needs labelled.augment")

    def _validate_embeddings(self) -> None:
        for name, choices in (("positives", get_args(Positives)), ("pooling", (None, *get_args(Pooling)))):
            value = getattr(self, name)
            shown = " or ".join(choice for choice in choices if choice)
            require(value in choices, f"labelled.{name}", value, f"choose {shown}")
        sensible = 1e-3 <= self.temperature <= 10.0
        require(sensible, "labelled.temperature", self.temperature, "give a number from 0.001 to 10")

    def _validate_folds(self) -> None:
        fold, folds, given = self.fold, self.folds, self.validation
        require(folds is None or folds >= 2, "labelled.folds", folds, "give at least 2")
        require(folds is None or fold is not None, "labelled.folds", folds, "give labelled.fold too, from 1")
        inside = fold is None or (folds is not None and 1 <= fold <= folds)
        require(inside, "labelled.fold", fold, "give one of 1 to labelled.folds")
        remedy = "the validation examples are a fold of the training examples already; give only one of the two"
        require(folds is None or given is None, "labelled.validation", given, remedy)
        limit = self.limit
        require(limit is None or limit >= 1, "labelled.limit", limit, "give a whole number of at least 1, or null")
