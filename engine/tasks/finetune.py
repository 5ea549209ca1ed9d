"""What the tasks on labelled data have in common: a model to start from, splits of examples, a gathered evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import dist
from engine.config import TASKS, LabelledConfig, RunConfig, Shape, architecture_of, require
from engine.config.methods.adapter import VIRTUAL
from engine.data.augment.build import WORD_SHARE, cheap_method
from engine.data.augment.eda import OPERATIONS
from engine.data.augment.source import Augmentation
from engine.data.loading.source import MicroBatch, SampleSource
from engine.data.tokenizer.check import check_examples, check_vocabulary, open_with_transformers, sample
from engine.data.tokenizer.unknown import check_unknown, count_unknown, share
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer
from engine.hub import local_folder
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.folder import is_adapter, open_adapted
from engine.model.build import build_config, initialise
from engine.model.int8_aware import round_layers
from engine.model.pretrained import LoadReport, base_weights, load_config, load_pretrained
from engine.model.regularised.dropout import Dropouts
from engine.model.regularised.fresh import check_fresh, top_of
from engine.model.regularised.layer_drop import drop_layers
from engine.tasks.distilled import pupil
from engine.tasks.distilled.distillation import Distillation
from engine.tasks.distilled.teachers import Student
from engine.tasks.identity import Fact
from engine.tasks.regularised import noise
from engine.tasks.regularised import objective as regularised
from engine.tasks.task import Evaluation, StepOutput, Task

S = TypeVar("S")


class LabelledSamples(SampleSource, Protocol):
    """A source of labelled examples: what a run's identity and its start say of one."""

    @property
    def fingerprint(self) -> str:
        """sha256 of all that is learned from."""
        ...

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids of all samples, end to end."""
        ...


class FineTuning(Task):
    """A task whose model starts from a folder and whose examples come from labelled files.

    A subclass names its head, sets `names`, `model_config` and `sources`, and writes `loss`, `metrics`, `divergence`,
    `soft`, `rows` and `score`; one whose loss is not of a micro-batch's logits writes `step`, not the first four.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    head: ClassVar[str]
    #: beginnings of the parameters in the folder that were trained for other examples, and start fresh
    fresh: tuple[str, ...] = ("classifier.",)
    #: EDA's, by which training examples may be changed
    operations: ClassVar[tuple[str, ...]] = OPERATIONS
    evaluation_samples = 0
    names: tuple[str, ...] | None
    """of the classes, in the order of their ids; None where there are none"""
    class_weights: Tensor | None = None
    """of the classes [C], in the training loss; None weighs all 1"""
    sources: Mapping[str, Any]
    """the `LabelledSamples` of each split by its name: train, validation, and test where it is given"""

    def __init__(self, config: RunConfig) -> None:
        assert config.model.init_from is not None
        self.config = config
        self.tokenizer = local_folder(config.model.init_from)
        metrics = TASKS.get(config.task).metrics
        self.best_metric: str | None = config.labelled.metric or next(iter(metrics))
        self.higher_is_better = metrics[self.best_metric]
        self.vocabulary = self._with_positions(load_tokenizer(self.tokenizer))
        self.loaded: LoadReport | None = None
        self._check_length()
        self._check_method()
        check_fresh(config, self.build_config().num_hidden_layers)
        self.augmentation = self._augmentation()
        self._check_regularisers()

    @classmethod
    def export_class(cls, config: Any) -> str:
        """That of the architecture for the task's head."""
        return architecture_of(config).class_for(cls.head)

    def build_config(self, names: Sequence[str] | None = None) -> Any:
        """The transformers configuration of the model, with these classes."""
        words = self.vocabulary
        return build_config(self.config.model, words.vocab_size, words.pad_id, names, words.listed)

    def _with_positions(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary without its folder's limit where the run gives the model more positions than the folder's."""
        found = load_config(self.tokenizer)
        given = self.config.model.max_positions
        extended = given is not None and given > architecture_of(found).positions(found)
        return replace(vocabulary, max_length=None) if extended else vocabulary

    def _check_length(self) -> None:
        config = self.build_config()
        limit, folder = architecture_of(config).positions(config), self.config.model.init_from
        length, taken = self.config.labelled.max_length, self.config.adapter.positions
        remedy = f"{folder} has {limit} positions, and each sequence needs some of its own: give fewer"
        require(taken < limit, "adapter.virtual_tokens", taken, remedy)
        before = f" and adapter.virtual_tokens take {taken} of them" if taken else ""
        remedy = f"{folder} has {limit} positions{before}: give at most {limit - taken}"
        require(length <= limit - taken, "labelled.max_length", length, remedy)
        longest = self.vocabulary.max_length
        remedy = f"model_max_length is {longest} in {self.tokenizer}/tokenizer_config.json: give at most that"
        require(longest is None or length <= longest, "labelled.max_length", length, remedy)

    def _check_method(self) -> None:
        """Refuse a prefix for attention that takes none, and vectors in front of what is pooled."""
        config, method = self.build_config(), self.config.adapter.method
        remedy = "task embeddings pools all states of a sequence, and those of trained vectors are no text's; take lora"
        require(method not in VIRTUAL or self.head != "embeddings", "adapter.method", method, remedy)
        remedy = (
            f"a model of type {config.model_type!r} has no place for keys and values of a prefix; take prompt or lora"
        )
        require(method != "prefix" or architecture_of(config).takes_prefix, "adapter.method", method, remedy)

    def _augmentation(self) -> Augmentation | None:
        """How training examples are changed; None where they are not."""
        labelled = self.config.labelled
        if labelled.augment is None:
            return None
        method = cheap_method(labelled.augment, WORD_SHARE, self.config.model.init_from, self.operations)
        return Augmentation(method, labelled.augment_share, self.config.seed)

    def _check_regularisers(self) -> None:
        """Refuse to compare passes that are all the same."""
        config, weight = self.config, self.config.regularise.r_drop
        of_model = architecture_of(self.build_config()).dropouts(config.model)
        rates = (*of_model, config.adapter.dropout, config.regularise.layer_drop)
        remedy = "the model has no dropout, so that both passes are the same; give model.hidden_dropout, such as 0.1"
        require(weight == 0 or any(rates), "regularise.r_drop", weight, remedy)

    def check_unknown(self) -> None:
        """Say how much of the texts the tokenizer doesn't know, and refuse too much of it."""
        counts = {name: count_unknown(self.vocabulary, source.tokens) for name, source in self.sources.items()}
        bound = self.config.labelled.max_unknown_share
        check_unknown(*counts["train"], bound, "the training examples", "labelled.max_unknown_share")
        if dist.place()[0] == 0:
            shares = ", ".join(f"{name} {share(*count):.2%}" for name, count in counts.items())
            print(f"[UNK] among word pieces: {shares}", flush=True)

    def check_ids(self, texts: Sequence[str], pairs: Sequence[str] | None) -> None:
        """Compare the ids of the first training texts with those that a user of the exported model will get.

        Args:
            texts, pairs: those of the training examples, in the order in which the source keeps them.

        Raises:
            UserError: they differ.
        """
        theirs = open_with_transformers(self.tokenizer)
        if theirs is None:
            return
        check_vocabulary(self.vocabulary, theirs, self.tokenizer)
        count = len(sample(texts))
        encoded = self.sources["train"].encoded
        rows = [encoded.tokens[start:stop].tolist() for start, stop in pairwise(encoded.offsets[: count + 1])]
        seconds = None if pairs is None else pairs[:count]
        length = self.config.labelled.max_length
        check_examples(self.vocabulary, theirs, self.tokenizer, texts[:count], seconds, rows, length)

    def build_model(self) -> nn.Module:
        """The pre-trained encoder under a fresh head."""
        model = self._new_model()
        initialise(model, self.config.seed)
        # a head in the folder was trained for classes that need not be these, even when there are as many
        fresh = (*self.fresh, *top_of(model, self.config.regularise.fresh_layers))
        self.loaded = load_pretrained(model, self.tokenizer, fresh, self.config.model.kept_layers)
        self.adaptation.apply(model, self.loaded)
        drop_layers(model, self.config.regularise.layer_drop)
        if self.config.train.int8_aware:
            round_layers(model)
        if self.config.regularise.dropout_end is not None:
            Dropouts(model).check(self.config.regularise.dropout_end)
        self.distillation.attach(model)
        return model

    @cached_property
    def distillation(self) -> Distillation:
        """The run's teachers, opened when a run begins: who evaluates its models doesn't need them."""
        student = Student(self.vocabulary, self.model_config, self.names, self.config.labelled.max_length)
        return Distillation(self.config, self.head, student)

    def describe_model(self) -> list[str]:
        return self.distillation.describe()

    @property
    def adaptation(self) -> Adaptation:
        """Which parts of the model are trained; known once the sources are."""
        config, base = self.config, self.config.model.init_from
        assert base is not None
        steps = config.train.total_steps(self.train_source().epoch_size(0))
        return Adaptation(config.adapter, config.train.freeze, config.seed, steps, base)

    def load_export(self, folder: Path) -> nn.Module:
        """The encoder and the head of an exported folder."""
        if is_adapter(folder):
            return open_adapted(folder, self.model_config, self.head)
        model = self._new_model()
        load_pretrained(model, folder)
        return model

    def _new_model(self) -> nn.Module:
        architecture = architecture_of(self.model_config)
        return architecture.build(self.head, self.model_config, self.config.model.activation_checkpointing)

    def facts(self) -> list[Fact]:
        """Classes, tokenizer, the encoded examples that are learned and that choose the best, and the base weights."""
        test, augmentation = self.sources.get("test"), self.augmentation
        changes = [] if augmentation is None else [augmentation.method.fingerprint]
        return [
            *(Fact("augmentation's words", "labelled.augment", fingerprint) for fingerprint in changes),
            Fact("classes", "labelled.train", None if self.names is None else list(self.names)),
            Fact("tokenizer's rules and pieces", "model.init_from", self.vocabulary.fingerprint),
            Fact("training examples", "labelled.train", self.sources["train"].fingerprint),
            Fact("validation examples", "labelled.validation", self.sources["validation"].fingerprint),
            Fact("test examples", "labelled.test", test.fingerprint if test else None, fixed=False),
            Fact("base weights", "model.init_from", base_weights(self.config.model.init_from)),
            self.distillation.fact(),
        ]

    def token_flops(self, batch: MicroBatch) -> float:
        """FLOPs of the encoder and of a head on its tokens: those that the batch says are read, else all."""
        shape = architecture_of(self.model_config).shape_of(self.model_config)
        lengths, read = batch.inputs["lengths"].tolist(), batch.inputs.get("read")
        rows = sum(lengths) if read is None else len(read)
        return self.step_flops(replace(shape, decoder=False, pooler=False), lengths, rows)

    def step_flops(self, shape: Shape, lengths: Sequence[int], rows: float, *, to_words: bool = False) -> float:
        """Of all passes that a regulariser makes of a micro-batch, of which all but the last one are for its noise too,
        and of the teachers."""
        last = super().step_flops(shape, lengths, rows, to_words=to_words)
        others = (self.passes - 1) * super().step_flops(shape, lengths, rows, to_words=True)
        taught = self.passes * self.distillation.flops(lengths, rows, pooler=shape.pooler)
        return self.config.regularise.copies * (last + others) + taught

    def group(self, fixed: bool) -> int | None:
        """The global batch that a source brings examples of similar length into; None of one in the file's order."""
        return self.config.train.global_batch if self.config.labelled.group_by_length and not fixed else None

    def train_source(self) -> SampleSource:
        source: SampleSource = self.sources["train"]
        return source

    def evaluation_source(self, split: str) -> SampleSource | None:
        """The examples of "validation" or "test" in the order of their file; None without labelled.test."""
        return self.sources.get(split)

    def weights_on(self, device: torch.device) -> Tensor | None:
        """The class weights, moved once."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)
        return self.class_weights

    @property
    def passes(self) -> int:
        return self.config.regularise.passes

    def ahead(self, model: nn.Module, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        return noise.passes(self, model, batches) if self.passes > 1 else batches

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        inputs = model_inputs(batch)
        if self.config.distil.folders:
            return pupil.step(self, self.distillation, model, batch, inputs)
        return regularised.step(self, model, batch, inputs)

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """See `engine.tasks.regularised.learner.Learner`, as for the next two."""
        raise NotImplementedError

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        raise NotImplementedError

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        raise NotImplementedError

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        """See `engine.tasks.distilled.pupil.Taught`, as for the next one."""
        raise NotImplementedError

    def sequences_in(self, batch: MicroBatch) -> float:
        return batch.totals["sequences"]

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """What an evaluation keeps of a micro-batch: tensors with a row for whatever is scored, of which `index` [rows]
        int64 tells the place among those of all micro-batches."""
        raise NotImplementedError

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """The evaluation of what `rows` kept of all samples, in the order of `index`; the same on every rank."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[MicroBatch]) -> Evaluation:
        """Score the samples of all ranks; collective.

        Dropout is off meanwhile. Scores don't depend on how the samples were spread over ranks and batches.
        """
        training = model.training
        model.eval()
        kept: list[dict[str, NDArray[Any]]] = []
        for batch in batches:
            rows = self.rows(model, batch)
            # ranks must run equally many forward passes (ZeRO-3 gathers parameters in each); dummies only fill up
            if not batch.dummy:
                kept.append({name: tensor.cpu().numpy() for name, tensor in rows.items()})
        model.train(training)
        # a rank may have no sample of its own
        joined = _end_to_end([part for part in dist.gather_objects(_end_to_end(kept)) if part])
        order = np.argsort(joined["index"], kind="stable")
        return self.score({name: values[order] for name, values in joined.items()})


def _end_to_end(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The rows of all parts, one after the other; nothing of no part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def read_splits(
    labelled: LabelledConfig,
    read: Callable[[str], S],
    split: Callable[[S], tuple[S, S]],
    read_training: Callable[[str], S] | None = None,
) -> dict[str, S]:
    """The examples of "train", "validation" (held out of the training examples unless given) and, if given, "test".

    Args:
        read: reads the examples of a path.
        split: divides the training examples into those that are learned from and those that are held out.
        read_training: reads the training examples where they are read otherwise.
    """
    assert labelled.train is not None
    training = (read_training or read)(labelled.train)
    if labelled.validation is None or labelled.limit is not None:
        training, validation = split(training)
    if labelled.validation is not None:
        validation = read(labelled.validation)
    splits = {"train": training, "validation": validation}
    return splits if labelled.test is None else splits | {"test": read(labelled.test)}


#: what a packed batch has for every model
PACKED = ("input_ids", "token_type_ids", "position_ids", "lengths")
#: what a batch carries for the loss and for the evaluation
NOT_READ = ("index", "labels", "known", "split", "context", "question", "option")


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """The model's arguments: the batch without the labels and places of its examples."""
    tensors = {name: tensor for name, tensor in batch.inputs.items() if name not in NOT_READ}
    return tensors | {"max_length": batch.max_length}
