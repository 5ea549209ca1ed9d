"""Pre-training: masked language model, alone or with next-sentence prediction (Devlin et al. 2019)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import dist
from engine.config import Objective, RunConfig, architecture_of
from engine.data.loading.source import MicroBatch
from engine.data.pretraining.full import FullSequenceSource
from engine.data.pretraining.source import PretrainingOptions, PretrainingSource, TokenFacts
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.store.store import open_store
from engine.data.tokenizer.folder import has_tokenizer
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.hub import local_folder
from engine.model.build import build_config, initialise
from engine.model.flops import training_flops
from engine.model.pretrained import LoadReport, base_weights, check_segments, load_config, load_pretrained
from engine.tasks.distilled import pupil
from engine.tasks.distilled.distillation import Distillation
from engine.tasks.distilled.losses import soft_classes
from engine.tasks.distilled.teachers import Student
from engine.tasks.grow import growth_lines
from engine.tasks.identity import Fact
from engine.tasks.report_files import write
from engine.tasks.task import Evaluation, StepOutput, Task

SHOWN_SENTENCES = 4
#: word pieces of the text of the Python installation
EMBEDDED_VOCABULARY = 4096
NOTATION = (
    "Held-out sentences, some of whose words were masked. **word**: masked, and the model guessed it. "
    "*guess → word*: masked, and the model guessed otherwise. \\#\\# begins a piece that continues a word."
)
#: share of the global batch -> the model's output that it is of, and the total that divides it
SHARES = {
    "mlm_loss": ("mlm_loss_sum", "mlm"),
    "nsp_loss": ("nsp_loss_sum", "sequences"),
    "mlm_accuracy": ("mlm_correct", "mlm"),
    "nsp_accuracy": ("nsp_correct", "sequences"),
}
#: the architecture's head for each objective
HEADS: dict[Objective, str] = {"mlm_nsp": "pretraining", "mlm": "masked_lm"}

Source = PretrainingSource | FullSequenceSource


class Pretraining(Task):
    """MLM + NSP, or MLM alone, on a prepared store."""

    best_metric: str | None = None
    higher_is_better = False

    def __init__(self, config: RunConfig) -> None:
        """Open the store and check that it fits the model.

        Raises:
            UserError: no store, one with too few documents for pairs, or a sequence length or vocabulary that the
                model can't take.
        """
        assert config.data.path is not None
        self.config = config
        self.store = open_store(config.data.path)
        self.vocabulary = self.store.tokenizer
        self.tokenizer = self.store.tokenizer_path
        self._sources: dict[str, Source] = {}
        self.pairs = config.data.objective == "mlm_nsp"
        self.evaluation_samples = config.train.eval_samples
        self.loaded: LoadReport | None = None
        words = self.vocabulary
        listed = self._check_tokenizer()
        self.model_config = build_config(config.model, words.vocab_size, words.pad_id, listed=listed)
        self.architecture = architecture_of(self.model_config)
        self.head = HEADS[config.data.objective]
        if self.head not in self.architecture.export_classes:
            usable = [name for name, head in HEADS.items() if head in self.architecture.export_classes]
            raise UserError(
                f"data.objective: {config.data.objective!r} needs a head that no {self.model_config.model_type} has; "
                f"give --data.objective {' or '.join(usable)}"
            )
        self.model_config.architectures = [self.architecture.class_for(self.head)]
        self._check_positions()
        if self.pairs:
            self._check_documents()
            self._check_frame()
            check_segments(self.model_config, config.model.init_from, "pre-training on pairs of segments")

    @classmethod
    def export_class(cls, config: Any) -> str:
        """That of the architecture for the objective's heads; for both where the configuration doesn't tell."""
        named: str = (config.architectures or [architecture_of(config).class_for(HEADS["mlm_nsp"])])[0]
        return named

    @classmethod
    def with_own_data(cls, config: RunConfig, is_main: bool) -> RunConfig:
        """Prepare the text of the Python installation where data.path is null."""
        if config.data.path:
            return config
        folder = Path(config.output) / "data"
        if is_main and not (folder / "manifest.json").exists():
            prepare(PrepareConfig(output=str(folder), vocab_size=EMBEDDED_VOCABULARY))
        return replace(config, data=replace(config.data, path=str(folder)))

    def _check_positions(self) -> None:
        length, limit = self.config.data.sequence_length, self.architecture.positions(self.model_config)
        if length > limit:
            raise UserError(f"data.sequence_length: {length} exceeds the {limit} positions of the model; lower it")
        longest = self.vocabulary.max_length
        if longest is not None and length > longest:
            raise UserError(
                f"data.sequence_length: {length} exceeds model_max_length {longest} of {self.tokenizer}/"
                "tokenizer_config.json; lower it, or raise that"
            )

    def _check_documents(self) -> None:
        """Pairs need two documents, in the held-out split too, which would be missed at the first evaluation only."""
        for split, shards in self.store.manifest.splits.items():
            documents = self.store.manifest.counts(split).documents
            if shards and documents < 2:
                raise UserError(
                    f"data.objective: 'mlm_nsp' draws pairs from 2 documents and split {split!r} of {self.store.path} "
                    f"has {documents}; give --data.objective mlm, or prepare more documents"
                )

    def _check_frame(self) -> None:
        """Pairs are written as BERT's; a model whose tokenizer frames them otherwise would see none like them."""
        words = self.vocabulary
        if words.pair_frame not in (None, [words.cls_id, words.sep_id, words.sep_id]):
            raise UserError(
                f"data.objective: 'mlm_nsp' writes one {words.names['sep_token']} between the segments of a pair and "
                f"{self.tokenizer} does not; give --data.objective mlm, or prepare the data with another tokenizer"
            )

    def _check_tokenizer(self) -> int | None:
        """Weights know token ids, not tokens: another vocabulary of the same size would train on noise.

        Returns:
            The tokens that the weights of model.init_from must have rows for; None for fresh weights.
        """
        folder = self.config.model.init_from
        if folder is None:
            return None
        local = local_folder(folder)
        load_config(local)  # a folder of something else is better told by its kind than by its words
        if not has_tokenizer(local):
            raise UserError(
                f"model.init_from: {folder!r} holds no tokenizer, so nothing tells whether its ids are those of "
                f"{self.store.path}; copy the model's vocab.txt or tokenizer.json there"
            )
        base = load_tokenizer(local, self.vocabulary.lowercase)
        if not self.vocabulary.extends(base):
            raise UserError(
                f"model.init_from: the vocabulary of {folder!r} is not the one that {self.store.path} was "
                f"prepared with; prepare the data with --tokenizer {folder}"
            )
        return base.listed

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and what an epoch shows of the text."""
        lines = [*growth_lines(self.config.model.init_from, self.vocabulary), self.train_source().summary()]
        data = self.config.data
        if data.mask_probability_end is not None or data.eval_mask_probability is not None:
            begin, evaluated = data.mask_probability, data.eval_mask_probability or data.mask_probability
            end = data.mask_probability_end or begin
            lines.append(f"masked tokens: {begin:.1%} at the start, {end:.1%} at the end, {evaluated:.1%} held out")
        return lines

    def build_model(self) -> nn.Module:
        """The encoder with the objective's heads: seeded weights, or those of model.init_from."""
        model = self._new_model()
        initialise(model, self.config.seed)
        if self.config.model.init_from:
            start = local_folder(self.config.model.init_from)
            self.loaded = load_pretrained(model, start, layers=self.config.model.kept_layers)
        self.distillation.attach(model)
        return model

    @cached_property
    def distillation(self) -> Distillation:
        """The run's teachers, whose heads are MLM's whatever the run's own."""
        student = Student(self.vocabulary, self.model_config, None, self.config.data.sequence_length)
        return Distillation(self.config, HEADS["mlm"], student)

    def describe_model(self) -> list[str]:
        return self.distillation.describe()

    def load_export(self, folder: Path) -> nn.Module:
        """The encoder with the objective's heads, and the weights of an exported folder."""
        model = self._new_model()
        load_pretrained(model, folder)
        return model

    def _new_model(self) -> nn.Module:
        return self.architecture.build(self.head, self.model_config, self.config.model.activation_checkpointing)

    def facts(self) -> list[Fact]:
        """The store's content, the tokenizer, and the weights that training starts from."""
        return [
            Fact("tokenizer's rules and pieces", "data.path", self.store.manifest.tokenizer_fingerprint),
            Fact("prepared texts", "data.path", self.store.manifest.fingerprint),
            Fact("samples of an epoch", "data.path", f"version {self.train_source().plan_version}"),
            Fact("base weights", "model.init_from", base_weights(self.config.model.init_from)),
            self.distillation.fact(),
        ]

    def train_source(self) -> Source:
        return self._source("train")

    def evaluation_source(self, split: str) -> Source | None:
        """The held-out split with fixed samples and masks, so that evaluations compare; None where there is none."""
        held_out = split == "validation" and bool(self.store.manifest.splits["validation"])
        return self._source("validation") if held_out else None

    def _source(self, split: str) -> Source:
        """The one source of a split: it keeps the epoch's plan, which start and every evaluation would make again."""
        if split not in self._sources:
            self._sources[split] = self._make_source(split, fixed=split != "train")
        return self._sources[split]

    def _make_source(self, split: str, *, fixed: bool) -> Source:
        data, facts = self.config.data, TokenFacts.of(self.vocabulary)
        options = PretrainingOptions(
            sequence_length=data.sequence_length,
            short_sequence_probability=data.short_sequence_probability,
            mask_probability=data.mask_probability,
            whole_word=data.whole_word_masking,
            seed=self.config.seed,
            mask_share=data.mask_replace_probability,
            random_share=data.random_replace_probability,
            mean_span=data.mean_span_length,
        )
        if fixed:
            options = replace(options, mask_probability=data.eval_mask_probability or data.mask_probability)
        else:
            options = replace(options, mask_probability_end=data.mask_probability_end, run_epochs=self._run_epochs)
        kind = PretrainingSource if self.pairs else FullSequenceSource
        return kind(self.store.split(split), facts, options, fixed)

    def _run_epochs(self, first_size: int) -> float:
        """Epochs of the run, of which the first has so many samples."""
        train = self.config.train
        return train.total_steps(first_size) * train.global_batch / first_size

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """Shares of the global batch's mean MLM loss (over masked tokens) and, of pairs, NSP loss (over sequences)."""
        if self.config.distil.folders:
            return self._taught_step(model, batch)
        return self._own(model(**batch.inputs, max_length=batch.max_length), batch)

    def _own(self, outputs: dict[str, Tensor], batch: MicroBatch) -> StepOutput:
        shares = loss_shares(outputs, batch.totals)
        metrics = {name: share.detach() for name, share in shares.items()}
        loss = shares["mlm_loss"] + shares["nsp_loss"] if self.pairs else shares["mlm_loss"]
        return StepOutput(loss, metrics)

    def _taught_step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """The same with what teachers add: their predictions of masked tokens, hidden states and relations."""
        options, distillation = self.config.distil, self.distillation
        inputs = {**batch.inputs, "max_length": batch.max_length}
        lesson = distillation.teach({name: value for name, value in inputs.items() if name != "nsp_labels"})
        with distillation.watching() as seen:
            output = self._own(model(**inputs), batch)
        loss, metrics = options.hard * output.loss, output.metrics
        if lesson.logits is not None and seen.logits is not None:
            # a model may have rows that belong to no token, and further ones of no masked token
            masked, words = batch.inputs["mlm_labels"].numel(), self.vocabulary.vocab_size
            own, told = (logits[:masked, :words] for logits in (seen.logits, lesson.logits))
            soft = soft_classes(own, told, options.temperature).sum() / batch.totals["mlm"]
            loss, metrics = loss + options.soft * soft, metrics | {"soft_loss": soft.detach()}
        total = batch.totals["sequences"]
        return pupil.with_states(StepOutput(loss, metrics), distillation, lesson, seen, inputs, total)

    def flops(self, batch: MicroBatch) -> float:
        """Those of the objective's heads too: MLM's reads the masked tokens."""
        shape = replace(self.architecture.shape_of(self.model_config), pooler=self.pairs)
        lengths, masked = batch.inputs["lengths"].tolist(), batch.inputs["mlm_positions"].numel()
        decodes = self.config.distil.soft > 0
        taught = self.distillation.flops(lengths, masked, pooler=False, decoder=decodes)
        return training_flops(shape, lengths, masked) + taught

    def evaluate(self, model: nn.Module, batches: Iterable[MicroBatch]) -> Evaluation:
        """The losses and accuracies on held-out text, MLM's perplexity, and a few masked sentences with guesses."""
        sums: Tensor | None = None
        names: list[str] = []
        texts: dict[str, str] = {}
        for batch in batches:
            outputs = model(**batch.inputs, max_length=batch.max_length)
            shares = loss_shares(outputs, batch.totals)
            names = list(shares)
            row = torch.stack([share.double() for share in shares.values()])
            row = torch.zeros_like(row) if batch.dummy else row
            sums = row if sums is None else sums + row
            if not texts:
                texts["masked_sentences"] = self.show_guesses(batch.inputs, outputs["predictions"])
        assert sums is not None
        scalars = dict(zip(names, dist.sum_over_ranks(sums).tolist(), strict=True))
        scalars["loss"] = scalars["mlm_loss"] + scalars.get("nsp_loss", 0.0)
        scalars["perplexity"] = math.exp(min(scalars["mlm_loss"], 700.0))
        return Evaluation(scalars, texts)

    def show_guesses(self, inputs: dict[str, Tensor], predictions: Tensor) -> str:
        """Masked sentences as a Markdown list below NOTATION: right guesses bold, wrong ones before the truth."""
        ids = inputs["input_ids"].tolist()
        starts = [0, *inputs["lengths"].cumsum(0).tolist()]
        masked = zip(inputs["mlm_positions"].tolist(), inputs["mlm_labels"].tolist(), predictions.tolist(), strict=True)
        guesses = {position: (label, guess) for position, label, guess in masked}
        lines = []
        for first, last in islice(pairwise(starts), SHOWN_SENTENCES):
            words = [self._word(ids[index], guesses.get(index)) for index in range(first, last)]
            lines.append("-" + "".join(words))
        return NOTATION + "\n\n" + "\n".join(lines)

    def _word(self, token: int, guess: tuple[int, int] | None) -> str:
        """A token in Markdown, after a space unless it continues a word."""
        if guess is None:
            space = "" if self.vocabulary.continues_word[token] else " "
            return space + escape(self.vocabulary.text_of(token).removeprefix("##"))
        truth, guessed = (escape(self.vocabulary.text_of(index)) for index in guess)
        return f" **{truth}**" if truth == guessed else f" *{guessed} → {truth}*"

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """The held-out losses as a line, and as report.json; the curves hold the rest."""
        values = evaluation.scalars
        pairs = f", NSP accuracy {values['nsp_accuracy']:.4f}" if self.pairs else ""
        text = (
            f"held-out MLM loss {values['mlm_loss']:.4f} (perplexity {values['perplexity']:.1f}), MLM accuracy "
            f"{values['mlm_accuracy']:.4f}{pairs}"
        )
        return write(folder, {}, values, text)


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_~#<>\[\]])", r"\\\1", text)


def loss_shares(outputs: dict[str, Any], totals: dict[str, float]) -> dict[str, Tensor]:
    """Sums over a micro-batch divided by the totals of the global batch; of NSP too where the model has it."""
    return {name: outputs[key] / totals[total] for name, (key, total) in SHARES.items() if key in outputs}
