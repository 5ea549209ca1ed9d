"""The entries of tasks on labelled data in the table of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from engine.config.data import LabelledConfig
from engine.config.methods.regularise import OF_LOSS
from engine.config.task_entry import TaskEntry, Title
from engine.errors import require

if TYPE_CHECKING:
    from engine.config.run import RunConfig


#: what a plan takes the options of a question to be where a column holds them
USUAL_OPTIONS = 4
#: what every task on labelled texts reads
_DATA = ("train", "validation", "test")
_FOLDS = ("folds", "fold", "limit")
_WEIGHING = ("class_weights", "label_smoothing")
_AUGMENT = ("augment", "augment_share")
#: tasks that can change their training examples while they train
_AUGMENTED = (
    "sequence_classification",
    "regression",
    "multi_label_classification",
    "token_classification",
)
#: of tasks that learn something of each text: these need no label to be taught
_DISTILS = ("teachers", "texts")
_TEXTS = ("text", "text_pair", "label", "max_length", "metric", "group_by_length", *_FOLDS)
#: scores that choose the best checkpoint, and whether a higher one is better
_METRICS = {"accuracy": True, "macro_f1": True, "matthews": True, "loss": False}
#: scores that choose a token classifier's best checkpoint
_ENTITY_METRICS = {"f1": True, "precision": True, "recall": True, "accuracy": True, "loss": False}
#: further scores of a classifier whose classes have an order
_ORDINAL_METRICS = {"quadratic_kappa": True, "rank_error": False}
_REGRESSION_METRICS = {"pearson": True, "spearman": True, "mse": False, "mae": False}
_MULTI_LABEL_METRICS = {"micro_f1": True, "macro_f1": True, "exact_match": True, "loss": False}
_CHOICE_METRICS = {"accuracy": True, "loss": False}
_SIMILARITY_METRICS = {"spearman": True, "pearson": True}
_RETRIEVAL_METRICS = {"mrr_at_10": True, "ndcg_at_10": True, "recall_at_1": True, "recall_at_10": True}
_ANSWER_METRICS = {"f1": True, "exact_match": True, "loss": False}

_ACCURACY = Title("accuracy [share]", "Examples classified right.")
_PEARSON = Title("Pearson correlation", "-1 to 1; of predicted and true numbers.")
_SPEARMAN = Title("Spearman correlation", "-1 to 1; of the ranks of predicted and true numbers.")
_MACRO_F1 = Title("macro F1", "Mean of the classes' F1 scores, 0 to 1; rare classes count as frequent ones.")
_F1 = Title("F1", "Harmonic mean of precision and recall, 0 to 1: of entities, or of an answer's words.")
_EXACT_MATCH = Title("exact match [share]", "Examples that are right as a whole.")


def validate_labelled(config: RunConfig, complete: bool) -> None:
    """The checks of every task that learns from `labelled.train` and starts from a model."""
    train, start = config.labelled.train, config.model.init_from
    require(bool(train) or not complete, "labelled.train", train, "give a file of labelled examples")
    require(bool(start) or not complete, "model.init_from", start, "give the folder of a model")
    augment, pieces = config.labelled.augment, config.labelled.label_pieces
    remedy = f"task {config.task} can't do it while it trains; zerobert augment makes a file of its texts"
    require(augment is None or config.task in _AUGMENTED, "labelled.augment", augment, remedy)
    remedy = "labelled.augment changes how many pieces a word has; give first, or make a file by zerobert augment"
    countable = augment is None or config.task != "token_classification" or pieces == "first"
    require(countable, "labelled.label_pieces", pieces, remedy)


def _options(config: RunConfig) -> int:
    """Options of a question: the columns that hold one each; only the data tells how long a column's lists are."""
    columns = config.labelled.options.count(",") + 1
    return columns if columns > 1 else USUAL_OPTIONS


def _members(config: RunConfig) -> int:
    """A text, its positive, and a hard negative for each column of them, whose lists only the data tells."""
    negatives = config.labelled.negatives
    return 2 + (negatives.count(",") + 1 if negatives else 0)


def _validate_classes(config: RunConfig, complete: bool) -> None:
    """Also refuse a score of classes with an order where the loss knows none."""
    validate_labelled(config, complete)
    metric, loss = config.labelled.metric, config.labelled.loss
    known = metric not in _ORDINAL_METRICS or loss == "ordinal"
    require(known, "labelled.metric", metric, f"it needs labelled.loss ordinal, and that is {loss}; give that too")


def _validate_embeddings(config: RunConfig, complete: bool) -> None:
    """Also refuse what leaves nothing to learn from or to score: no pairs, or no others beside them."""
    validate_labelled(config, complete)
    labelled, batch = config.labelled, config.train.global_batch
    pair, by_dropout = labelled.text_pair, labelled.positives == "dropout"
    remedy = "name the column of the positives" + (" in the evaluation files" if by_dropout else "")
    require(bool(pair) or not complete, "labelled.text_pair", pair, remedy)
    scored = not by_dropout or bool(labelled.validation) or not complete
    remedy = "labelled.positives dropout trains on texts without pairs, which can't be scored; give a file of pairs"
    require(scored, "labelled.validation", labelled.validation, remedy)
    remedy = "the other pairs of a global batch are its negatives; give at least 2"
    require(batch > 1 or labelled.negatives is not None, "train.global_batch", batch, remedy)


def _entry(
    about: str,
    implementation: str,
    *,
    fixed: tuple[str, ...],
    metrics: Mapping[str, bool],
    scores: Mapping[str, Title],
    compared: tuple[str, ...] = (),
    metric_of_data: bool = False,
    on_tokens: bool = False,
    regularisers: tuple[str, ...] = ("r_drop", "adversarial"),
    distils: tuple[str, ...] = ("teachers",),
    sequences_per_sample: Callable[[RunConfig], int] = lambda config: 1,
    validate: Callable[[RunConfig, bool], None] = validate_labelled,
) -> TaskEntry:
    """A task on labelled data.

    Args:
        compared: fields that runs are compared by, beside those of all.
        metric_of_data: as of `TaskEntry`.
        on_tokens: whether its head reads the state of every token, and not the pooled vector.
    """
    return TaskEntry(
        about=about,
        section="labelled",
        options=LabelledConfig,
        implementation=implementation,
        length="max_length",
        inputs=_DATA,
        required=("train",),
        starts_fresh=False,
        read_share=lambda config: float(on_tokens),
        sequences_per_sample=sequences_per_sample,
        pools=lambda config: not on_tokens,
        fixed=fixed,
        freezes=True,
        regularisers=regularisers,
        distils=distils,
        grouping="group_by_length",
        metrics=metrics,
        metric_of_data=metric_of_data,
        compared=("max_length", "group_by_length", *compared),
        results=tuple(f"{part}/{name}" for part in ("test", "eval") for name in metrics),
        scores=scores,
        validate=validate,
    )


SEQUENCE_CLASSIFICATION = _entry(
    "one label a text or pair of texts",
    "engine.tasks.sequence:SequenceClassification",
    regularisers=OF_LOSS,
    distils=_DISTILS,
    fixed=(*_TEXTS, "loss", *_WEIGHING, *_AUGMENT),
    metrics=_METRICS | _ORDINAL_METRICS,
    compared=("loss", *_WEIGHING, *_AUGMENT),
    scores={
        "accuracy": _ACCURACY,
        "macro_f1": _MACRO_F1,
        "matthews": Title("Matthews correlation", "-1 to 1; 0 is guessing, whatever the shares of the classes."),
        "quadratic_kappa": Title(
            "quadratic weighted kappa", "-1 to 1; agreement of classes with an order beyond chance (Cohen 1968)."
        ),
        "rank_error": Title("mean absolute error [ranks]", "How many classes away the predicted one is."),
    },
    validate=_validate_classes,
)

REGRESSION = _entry(
    "a number for a text or pair of texts",
    "engine.tasks.regression:Regression",
    regularisers=OF_LOSS,
    distils=_DISTILS,
    fixed=(*_TEXTS, *_AUGMENT),
    metrics=_REGRESSION_METRICS,
    compared=_AUGMENT,
    scores={
        "pearson": _PEARSON,
        "spearman": _SPEARMAN,
        "mse": Title("mean squared error", "In squares of the labels' unit."),
        "mae": Title("mean absolute error", "In the labels' unit."),
    },
)

TOKEN_CLASSIFICATION = _entry(
    "entities: a tag for each word of a text",
    "engine.tasks.tokens.classification:TokenClassification",
    on_tokens=True,
    fixed=(
        *("text", "label", "max_length", "stride", "label_pieces", "metric", "group_by_length", *_FOLDS),
        *_WEIGHING,
        *_AUGMENT,
    ),
    metrics=_ENTITY_METRICS,
    compared=("stride", "label_pieces", *_WEIGHING, *_AUGMENT),
    scores={
        "f1": _F1,
        "precision": Title("precision of entities [share]", "Predicted ones with the words and type of a true one."),
        "recall": Title("recall of entities [share]", "True ones that are predicted with their words and type."),
        "accuracy": _ACCURACY,
    },
)

MULTI_LABEL_CLASSIFICATION = _entry(
    "any number of labels a text or pair of texts",
    "engine.tasks.multi_label:MultiLabelClassification",
    regularisers=OF_LOSS,
    distils=_DISTILS,
    fixed=(*_TEXTS, "separator", *_AUGMENT),
    metrics=_MULTI_LABEL_METRICS,
    compared=_AUGMENT,
    scores={
        "micro_f1": Title("micro F1", "F1 of all labels of all examples together, 0 to 1."),
        "macro_f1": _MACRO_F1,
        "exact_match": _EXACT_MATCH,
        "label_accuracy": Title("accuracy of labels [share]", "Labels told right at a threshold of 0.5."),
    },
)

MULTIPLE_CHOICE = _entry(
    "the right one of a question's options",
    "engine.tasks.multiple_choice:MultipleChoice",
    fixed=(*_TEXTS, "options"),
    metrics=_CHOICE_METRICS,
    sequences_per_sample=_options,
    scores={"accuracy": _ACCURACY},
)

QUESTION_ANSWERING = _entry(
    "answers in a text",
    "engine.tasks.answers.task:QuestionAnswering",
    on_tokens=True,
    fixed=("max_length", "stride", "max_answer_length", "metric", "group_by_length", *_FOLDS),
    metrics=_ANSWER_METRICS,
    compared=("stride",),
    scores={
        "f1": _F1,
        "exact_match": _EXACT_MATCH,
        "has_answer_f1": Title("F1 of questions with an answer", "Mean over those that their context answers."),
        "has_answer_exact_match": Title(
            "exact match of questions with an answer [share]", "Of those that their context answers."
        ),
        "no_answer_accuracy": Title("accuracy of questions without answer [share]", "Those of them that get none."),
    },
)

EMBEDDINGS = _entry(
    "vectors of texts, alike where texts are",
    "engine.tasks.embeddings.task:Embeddings",
    on_tokens=True,
    regularisers=(),  # its loss is of all micro-batches together
    fixed=(*_TEXTS, "negatives", "positives", "temperature", "symmetric", "pooling"),
    sequences_per_sample=_members,
    metrics=_SIMILARITY_METRICS | _RETRIEVAL_METRICS,
    metric_of_data=True,
    compared=("positives", "temperature", "symmetric", "pooling"),
    scores={
        "in_batch_accuracy": Title(
            "accuracy in the batch [share]", "Texts whose positive is nearest among those of the global batch."
        ),
        "pearson": _PEARSON,
        "spearman": _SPEARMAN,
        "mrr_at_10": Title("MRR@10", "Mean over texts of 1 / rank of the first positive; 0 beyond the tenth."),
        "ndcg_at_10": Title("nDCG@10", "Discounted gain of the positives among the ten nearest, 0 to 1."),
        "recall_at_1": Title("recall@1 [share]", "Positives of a text that are the nearest to it."),
        "recall_at_10": Title("recall@10 [share]", "Positives of a text that are among the ten nearest to it."),
    },
    validate=_validate_embeddings,
)
