"""What a prediction is asked for; without torch, so that a command line can ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError, require

InputFormat = Literal["csv", "tsv", "jsonl", "parquet", "txt"]

#: what stands for the standard input or output
STANDARD = "-"


@dataclass(frozen=True)
class PredictConfig:
    """Model, input, output, and how the one becomes the other."""

    model: str
    """a run's folder, an exported one, a Hugging Face folder with a task's head, or a model's name on the hub"""
    input: str
    """rows: csv, tsv, jsonl, parquet, or txt with a text a line; the text formats also .gz, .xz, .bz2; - reads stdin"""
    output: str
    """.jsonl, .csv or .tsv; - writes JSON lines to stdout"""
    format: InputFormat | None = None
    """of the input, whatever its name says; null: by its suffix, and JSON lines on stdin"""
    text: str | None = None
    """column of the text, or of the question; null: that of the run, where the model is one, else text or, where there
    is none, sentence; of questions, question"""
    text_pair: str | None = None
    """column of the second text, for pairs, or of a question's context; null: that of the run, else none; of contexts,
    context. Of embeddings: write how alike the two are instead of a vector; null: none"""
    options: str | None = None
    """choices: a column of lists of texts, or several columns of one text each, as a,b,c; null: those of the run, else
    options"""
    max_length: int | None = None
    """tokens that are read of a text or pair; classification cuts longer ones there, other tasks read them in windows;
    null: as the run, else all that the model has positions for"""
    probabilities: bool = False
    """also write the probability of every class"""
    base: str | None = None
    """of adapters, where the weights below them are, if moved"""
    prefix: str = "predicted_"
    """what the names of the new columns begin with"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""
    processes: int = 1
    """processes of this machine, each with the model; they share its cores, and its GPUs where there are any"""
    chunk_rows: int = 2048
    """rows that are sorted by length, computed and written together; 1 answers each row of a pipe at once"""
    batch_tokens: int | None = None
    """tokens of a forward pass, at least one text; null: 2,048 on CPUs, 32,768 on GPUs"""

    def validate(self) -> None:
        """Refuse values that no model, input or output makes right.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        for name in ("model", "input", "output"):
            require(bool(getattr(self, name).strip()), name, getattr(self, name), "give a path")
        for name, least in (("max_length", 4), ("processes", 1), ("chunk_rows", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"give at least {least}")
        if self.text is not None and self.text == self.text_pair:
            raise UserError(f"text_pair: {self.text!r} is text already; name another column")
