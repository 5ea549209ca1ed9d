"""What `zerobert augment` is asked for; without torch, so that a command line can ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.data.augment.eda import OPERATIONS, TAGGED
from engine.data.labelled.tables import columns_in
from engine.errors import require
from engine.predict.options import STANDARD
from engine.predict.output import suffix_of

MethodName = Literal["eda", "eda_neighbours", "characters", "mlm", "translate", "pseudo_labels"]
TaskName = Literal[
    "sequence_classification",
    "regression",
    "multi_label_classification",
    "token_classification",
    "multiple_choice",
    "question_answering",
    "embeddings",
]
TAGS, CLASSES = "token_classification", "sequence_classification"
#: what the column of the text is called where nobody names it, the first of these that there is
USUAL = {"question_answering": ("question",), "multiple_choice": ("question", "sentence", "text")}
#: methods that read a model
READS_MODEL = ("eda_neighbours", "mlm", "pseudo_labels")
#: by option the methods that read it, where it is not all
WORDWISE = ("eda", "eda_neighbours", "characters", "mlm")
CHANGING = (*WORDWISE, "translate")
READ_BY = {
    "share": WORDWISE,
    "forward": ("translate",),
    "back": ("translate",),
    "beams": ("translate",),
    "top": ("mlm",),
    "copies": CHANGING,
    "balance": CHANGING,
    "only_new": CHANGING,
    "seed": CHANGING,
    "keep_by": CHANGING,
    "model": READS_MODEL,
}
#: where the confidence of a pseudo label is written
CONFIDENCE = "confidence"
#: the new column: 0 in the rows of the input, else the number of the copy
MARK = "augmented"


@dataclass(frozen=True)
class AugmentConfig:
    """Input, output, and how new rows are made of those that there are."""

    input: str
    """labelled rows: .csv, .tsv, .jsonl, .parquet, of token_classification also CoNLL columns; also .gz, .xz, .bz2"""
    output: str
    """.jsonl, .csv or .tsv; of token classification .jsonl"""
    method: MethodName = "eda"
    """eda: synonyms of WordNet in the place of words, words inserted, swapped and left out (Wei and Zou 2019);
    eda_neighbours: the same with near words of a model's word embeddings; characters: misspellings; mlm: words that a
    pre-trained model puts in the place of others or between them (Kobayashi 2018; Kumar et al. 2020); translate: the
    text translated there and back; pseudo_labels: rows without labels that a classifier is sure of, with its labels"""
    task: TaskName = "sequence_classification"
    """what the rows are examples of; the tags of token_classification move with their words"""
    text: str | None = None
    """column of the text that is changed; null: sentence or text; of questions, question; of tags as a run finds it"""
    text_pair: str | None = None
    """column of a second text that is changed too; null: none. All other columns stay as they are"""
    label: str = "label"
    """column of the class, which balance and keep_by read and pseudo_labels writes; of tags as a run finds it"""
    copies: int = 4
    """new rows of each row"""
    balance: bool = False
    """instead of copies, as many new rows as make all classes as frequent as the most frequent one"""
    share: float = 0.1
    """of a text's words that are changed (alpha in the paper), at least one"""
    operations: str | None = None
    """of eda, as a,b,c: replace, insert, swap, delete, and of tagged words mention (entities of the same type for those
    that are there); of mlm: replace, insert; null: all"""
    model: str | None = None
    """eda_neighbours: folder of an encoder; mlm: of a pre-trained one; pseudo_labels: of a classifier; or a name
    on the hub"""
    top: int = 10
    """mlm: among how many words one is drawn by its probability, the most probable ones; 0: all words of one piece"""
    forward: str | None = None
    """translate: folder of a sequence-to-sequence model of transformers, such as Marian's, to another language"""
    back: str | None = None
    """translate: folder of one that translates back"""
    beams: int = 4
    """translate: beams of both searches; a new text is one of so many translations of so many translations"""
    keep_by: str | None = None
    """folder of a classifier: keep new rows whose own label it finds probable; null: keep all"""
    confidence: float = 0.9
    """least probability of a label, of keep_by and pseudo_labels"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """of models; auto takes a GPU if there is one"""
    seed: int = 1
    """of the random numbers, which depend on it, the row and the copy alone"""
    only_new: bool = False
    """leave out the rows of the input"""
    processes: int = 1
    """processes of this machine"""
    chunk_rows: int = 1024
    """rows that are changed and written together"""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The operations that may be drawn."""
        return self.known_operations if self.operations is None else columns_in(self.operations)

    @property
    def known_operations(self) -> tuple[str, ...]:
        """Those of the method."""
        of_eda = (*OPERATIONS, *TAGGED) if self.task == TAGS else OPERATIONS
        known = {"eda": of_eda, "eda_neighbours": of_eda, "mlm": ("replace", "insert")}
        return known.get(self.method, ())

    def validate(self) -> None:
        """Refuse values that no input makes right.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        for name in ("input", "output"):
            require(bool(getattr(self, name).strip()), name, getattr(self, name), "give a path")
            require(getattr(self, name) != STANDARD, name, STANDARD, "a pipe can't be read twice; give a file")
        for name in ("copies", "processes", "chunk_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        require(0.0 < self.share <= 1.0, "share", self.share, "give a share in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "give a whole number in [0, 2^32)")
        self._check_method()
        self._check_task()
        suffix = suffix_of(self.output)
        require(self.task != TAGS or suffix == ".jsonl", "output", self.output, "tagged words are lists; write .jsonl")
        same = Path(self.input).resolve() == Path(self.output).resolve()
        require(not same, "output", self.output, "it is the input; give another path")

    def _check_method(self) -> None:
        reads = self.method in READS_MODEL
        require(not reads or self.model is not None, "model", self.model, f"method {self.method} reads one; give it")
        for name in ("forward", "back") if self.method == "translate" else ():
            require(getattr(self, name) is not None, name, None, "method translate reads two models; give both")
        require(self.beams >= 1, "beams", self.beams, "give at least 1")
        self._check_use()
        known, given = self.known_operations, self.operations
        remedy = f"method {self.method} has {', '.join(known) or 'no operations; leave it out'}"
        fits = given is None or (bool(self.chosen) and set(self.chosen) <= set(known))
        require(fits, "operations", given, f"{remedy} of task {self.task}" if known else remedy)
        require(self.top >= 0, "top", self.top, "give 0 or more")

    def _check_use(self) -> None:
        """Refuse what is given and would not be read."""
        judges = self.method == "pseudo_labels" or self.keep_by is not None
        unread = {name for name, methods in READ_BY.items() if self.method not in methods}
        unread |= set() if judges else {"confidence"}
        unread |= set() if judges or self.balance or self.task == TAGS else {"label"}
        unread |= set() if judges or self.method in ("mlm", "translate") else {"device"}
        for name in sorted(unread):
            value, usual = getattr(self, name), getattr(AugmentConfig, name)
            require(value == usual, name, value, f"method {self.method} has no use for it; leave it out")
        require(0.0 < self.confidence <= 1.0, "confidence", self.confidence, "give a probability in (0, 1]")

    def _check_task(self) -> None:
        remedy = f"only {CLASSES} has one class a row; leave it out"
        require(self.task == CLASSES or not self.balance, "balance", self.balance, remedy)
        require(self.task == CLASSES or self.keep_by is None, "keep_by", self.keep_by, remedy)
        kept = self.task != TAGS or self.method != "translate"
        require(kept, "method", self.method, "a translation has other words, whose tags nobody knows; take eda or mlm")
        pseudo = self.method == "pseudo_labels"
        require(self.task == CLASSES or not pseudo, "method", self.method, f"only {CLASSES} has one class a row")
        given = self.copies != AugmentConfig.copies and self.balance
        require(not given, "copies", self.copies, "balance decides how many there are; leave one of the two out")
        require(self.task != TAGS or self.text_pair is None, "text_pair", self.text_pair, "tags are of one text")
        if self.task == "question_answering":
            for name in ("text", "text_pair"):
                remedy = "answers are places in it, which would be others; name the question alone"
                require(getattr(self, name) != "context", name, "context", remedy)
