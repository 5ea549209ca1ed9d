"""From a transformers model to an ONNX graph, by torch's exporter.

Inputs are int64 [batch, length], both of any size ([batch, options, length] of multiple choice): `input_ids`,
`attention_mask` (1 where there is a token) and, where the architecture reads them, `token_type_ids`. Outputs are fp32:
`logits`; of question answering `start_logits` and `end_logits`; of embeddings `sentence_embedding`, and
`token_embeddings`, which is what sentence-transformers' loader of ONNX models pools.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config import architecture_of
from engine.errors import UserError
from engine.model.sentence import FIELD
from engine.onnx.attention import register

#: of the standard operators: the first with GELU; each onnxruntime since 1.17 has it
OPSET = 20
#: bytes of the weights that one file can hold
LARGEST = 2**31 - 2**20
#: by head, the outputs of the graph; of the others, `logits`
OUTPUTS = {
    "question_answering": ("start_logits", "end_logits"),
    "embeddings": ("token_embeddings", "sentence_embedding"),
}
#: what the sizes of the inputs are called
SIZES = ("batch", "length")
SIZES_OF_CHOICES = ("batch", "options", "length")
#: sizes of the inputs that the exporter sees; none is 0 or 1, which it would take for fixed
SEEN = {"batch": 3, "options": 2, "length": 24}


def input_names(config: Any) -> tuple[str, ...]:
    """The inputs of a model's graph."""
    names = ("input_ids", "attention_mask")
    return names if architecture_of(config).segments(config) is None else (*names, "token_type_ids")


def output_names(head: str) -> tuple[str, ...]:
    """The outputs of a head's graph."""
    return OUTPUTS.get(head, ("logits",))


def sizes(head: str) -> tuple[str, ...]:
    """What the dimensions of a head's inputs are called."""
    return SIZES_OF_CHOICES if head == "multiple_choice" else SIZES


class Exported(nn.Module):
    """A model of transformers with the inputs and outputs of its graph."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.names = input_names(model.config)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        if self.head == "embeddings":
            return self._embedded(output.last_hidden_state.float(), inputs[1])
        return tuple(getattr(output, name).float() for name in output_names(self.head))

    def _embedded(self, states: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The states [B, L, H] and what they are pooled to [B, H]."""
        told = getattr(self.model.config, FIELD)
        held = mask[..., None].to(states.dtype)
        pooled = states[:, 0] if told["pooling"] == "cls" else (states * held).sum(1) / held.sum(1)
        return states, functional.normalize(pooled, dim=-1) if told["normalize"] else pooled


def to_onnx(model: nn.Module, head: str, dtype: torch.dtype = torch.float32) -> Any:
    """The graph of a model of transformers as an onnx ModelProto; changes the model's attention and its type.

    Args:
        head: one of `Architecture.export_classes`.
        dtype: fp32 or fp16, of weights and of what is computed inside.

    Raises:
        UserError: weights that no single file can hold, or that the type can't.
    """
    import transformers

    assert isinstance(model, transformers.PreTrainedModel)
    model.set_attn_implementation(register())
    model = model.to(dtype).eval()
    _check_weights(model)
    names, dimensions = input_names(model.config), sizes(head)
    example = torch.ones([SEEN[name] for name in dimensions], dtype=torch.int64)
    inputs = tuple(example.clone() for _ in names)  # of one tensor the exporter would make one input
    dynamic = dict.fromkeys(range(len(dimensions)), torch.export.Dim.DYNAMIC)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            Exported(model, head),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=output_names(head),
            dynamic_shapes={"inputs": (dynamic,) * len(names)},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return _named(program.model_proto, dimensions)


def _check_weights(model: nn.Module) -> None:
    held = sum(each.numel() * each.element_size() for each in model.parameters())
    if held > LARGEST:
        raise UserError(f"precision: weights of {held / 1e9:.1f} GB are more than the 2 GB of an ONNX file; give fp16")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"precision: {name} has values that are not finite in {kind}; give fp32, or other weights")


def _named(proto: Any, dimensions: Sequence[str]) -> Any:
    """A graph whose sizes have the same names in all inputs and outputs, and its operators those of their modules."""
    del proto.graph.value_info[:], proto.graph.metadata_props[:]
    names: Counter[str] = Counter()
    for node in proto.graph.node:
        node.name = _node_name(node, names)
        del node.metadata_props[:]
        node.ClearField("doc_string")
    known: dict[str, str] = {}
    for value in proto.graph.input:
        for name, size in zip(dimensions, value.type.tensor_type.shape.dim, strict=True):
            known[size.dim_param] = size.dim_param = name
    for value in proto.graph.output:
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = known.get(size.dim_param, size.dim_param)
    return proto


def _node_name(node: Any, names: Counter[str]) -> str:
    """The module that an operator is of, and which of its kind it is there; without the exporter's traces of our code.

    Args:
        names: how often each was given, which is counted on.
    """
    scopes = next((each.value for each in node.metadata_props if each.key.endswith("name_scopes")), "[]")
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
    name = f"{modules[-1].removeprefix('model.') if modules else 'graph'}/{node.op_type}"
    names[name] += 1
    return name if names[name] == 1 else f"{name}_{names[name]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells of its own progress, and of packages that it would know too."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
